"""Set before any Triton module is imported: kernels run in Triton's interpreter, on CPU tensors."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
