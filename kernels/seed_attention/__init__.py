"""Softmax attention of a few shared seeds over each jagged sequence."""

from kernels.seed_attention.op import seed_attention

__all__ = ["seed_attention"]
