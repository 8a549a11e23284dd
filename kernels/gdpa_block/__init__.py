"""Kunlun's personalized feed-forward block: GDPA between its norms and residuals."""

from kernels.gdpa_block.op import gdpa_block

__all__ = ["gdpa_block"]
