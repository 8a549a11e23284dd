"""Where there is no GPU, the Triton kernels run in Triton's interpreter; it must know before Triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
