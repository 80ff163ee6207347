"""What every op means, in plain torch, for the reader and for the tests: the oracle, in any floating dtype.

Slow on purpose. Called with float64 inputs these functions are the reference of the numerics contract; called with the
dtype of a test case they are the plain formula whose error an op may exceed at most twofold.
"""
