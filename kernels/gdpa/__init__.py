"""Generalized dot-product attention: `act(s_in Q K^T) s_out V`, elementwise activation, no softmax."""

from kernels.gdpa.op import ACTIVATIONS, gdpa

__all__ = ["ACTIVATIONS", "gdpa"]
