"""GDPA's activations inside a Triton kernel against torch's derivatives in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import DEVICE

from kernels.gdpa import ACTIVATIONS
from kernels.gdpa.reference import gdpa_reference
from kernels.gdpa.triton_activations import bare_with_slope, slope_factors

INNER, OUTER = 0.7, 1.3


@triton.jit
def _value_and_slope_kernel(r, value, slope, inner, outer, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, dx = bare_with_slope(tl.load(r + i), inner, outer, ACTIVATION, False)
    value_factor, slope_factor = slope_factors(inner, outer, ACTIVATION)
    tl.store(value + i, x * value_factor)
    tl.store(slope + i, dx * slope_factor)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_value_and_slope_without_their_common_factors(activation: str, scale: float) -> None:
    r = torch.linspace(-scale, scale, 256, dtype=torch.float64)
    # One key of one number: its score is the query, and its value is 1.
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    queries = r.view(-1, 1, 1).requires_grad_()
    out = gdpa_reference(
        queries, torch.tensor([0, 256], dtype=torch.int32), one, one, kv_offsets=None, activation=activation,
        window=None, inner_scale=INNER, outer_scale=OUTER,
    )  # fmt: skip
    (expected_slope,) = torch.autograd.grad(out.sum(), queries)
    value, slope = torch.empty(2, 256, device=DEVICE).unbind()
    _value_and_slope_kernel[(1,)](r.float().to(DEVICE), value, slope, INNER, OUTER, activation, 256)
    for actual, expected in ((value, out), (slope, expected_slope)):
        expected = expected.detach().flatten()
        assert float((actual.cpu().double() - expected).norm() / expected.norm()) <= 2e-6
