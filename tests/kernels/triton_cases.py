"""What the Triton tests share: device, types, bounds, outputs poisoned before a kernel writes them, a spy."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Needed by finite differences alone. Earlier versions assert that a product's accumulator is float32.
TRITON_VERSION = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
FLOAT64_PRODUCTS = DEVICE.type == "cpu" and TRITON_VERSION >= (3, 8)
# The interpreter computes with numpy, which has no bfloat16.
LOW = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
BOUNDS = {
    torch.bfloat16: 5e-3,  # two roundings of operands to 8 bits
    torch.float16: 1e-3,  # to 11 bits
    torch.float32: 1e-5,  # sums of a few hundred float32 products
    torch.float64: 1e-7,  # scales reach a kernel in float32
}


def poisoned() -> Iterator[None]:
    """While it runs, torch.empty gives NaN: an element that a kernel leaves out fails its test."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def results_of(module: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What this function of a module returns from now on, call by call."""
    results: list[Any] = []
    real = getattr(module, function)

    def spied(*args: object) -> object:
        results.append(real(*args))
        return results[-1]

    monkeypatch.setattr(module, function, spied)
    return results


def check(names: str, actual: list[Tensor], expected: list[Tensor], bound: float) -> None:
    """Relative L2 per named tensor; against a vanishing one, the absolute error."""
    for name, a, e in zip(names.split(), actual, expected, strict=True):
        assert a.shape == e.shape, f"{name}: {tuple(a.shape)} is not {tuple(e.shape)}"
        assert torch.isfinite(a).all(), f"{name}: not finite"
        norm = float(e.detach().double().norm())
        error = float((a.detach().double() - e.detach().double()).norm()) / (norm or 1.0)
        assert error <= bound, f"{name}: relative error {error:.2e} > {bound:.0e}"
