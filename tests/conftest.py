"""Set before torch or Triton is imported: kernels run in Triton's interpreter, on CPU tensors.

One thread a process: the tensors of the tests are small, and several tests start processes of their
own.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
