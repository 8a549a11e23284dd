"""Inputs and slow truths shared by the kernel tests: one example, one head at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LENGTHS = {
    "ragged": [3, 0, 1, 7, 2, 0, 17, 5, 4],  # 3 and 4, 7 and 5 are padded together
    "one_row": [1],
    "one_empty": [0],
    "all_empty": [0, 0, 0],
    "no_examples": [],
    "odd": [63, 64, 65, 1],
}


def offsets_of(lengths: list[int]) -> Tensor:
    """int32 (B + 1)."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def activation_of(name: str, x: Tensor) -> Tensor:
    """The formulas written out, so that they do not lean on torch's own."""
    zero = torch.zeros_like(x)
    if name == "identity":
        return x
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "silu":
        return x / (1 + torch.exp(-x))
    positive = torch.where(x > 0, x, zero)
    return {"relu": positive, "relu_square": positive**2, "leaky_relu": torch.where(x > 0, x, 0.01 * x)}[name]


def check_close(name: str, actual: Tensor, expected: Tensor, bound: float) -> None:
    """L2 error of a named tensor relative to its norm, or to 1 for a vanishing one; NaN never passes."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1.0)
    assert error <= bound, f"{name}: relative error {float(error):.2e} > {bound:.0e}"
