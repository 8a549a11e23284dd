"""Softmax self-attention over a symmetric window of a jagged sequence."""

from kernels.window_attention.op import window_attention

__all__ = ["window_attention"]
