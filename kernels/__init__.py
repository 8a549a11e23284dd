"""One folder per op: reference.py is the truth, triton_kernels.py is fast, op.py chooses."""
