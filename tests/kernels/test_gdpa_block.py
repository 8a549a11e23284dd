"""The GDPA block's reference against its formula, one row at a time in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, check_close, offsets_of
from torch import Tensor

from kernels.gdpa import gdpa
from kernels.gdpa_block import gdpa_block

HEADS, WIDTH, NUM_KV = 2, 4, 5
FLOAT32_BOUND = 1e-5


def loop(s: Tensor, offsets: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Norms over all heads' numbers of a row, written out."""
    flat = s.flatten(1)
    q = torch.stack([(row - row.mean()) / torch.sqrt(((row - row.mean()) ** 2).mean() + 1e-5) for row in flat])
    g = gdpa(q.view(s.shape), offsets, k, v).flatten(1) + q
    return torch.stack([row / torch.sqrt((row**2).mean() + 1e-5) for row in g]).view(s.shape) + s


def inputs(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(sum(lengths), HEADS, WIDTH), *[(len(lengths), NUM_KV, HEADS, WIDTH)] * 2]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("case", ["ragged", "one_row", "odd"])
def test_matches_the_formula(case: str) -> None:
    tensors, offsets = inputs(LENGTHS[case]), offsets_of(LENGTHS[case])
    expected = loop(tensors[0], offsets, *tensors[1:])
    singles = [t.detach().float().requires_grad_() for t in tensors]
    actual = gdpa_block(singles[0], offsets, *singles[1:])
    check_close("out", actual, expected, FLOAT32_BOUND)
    grad = torch.randn_like(expected)
    actual_grads = torch.autograd.grad(actual, singles, grad.float())
    for name, a, e in zip(("ds", "dk", "dv"), actual_grads, torch.autograd.grad(expected, tensors, grad), strict=True):
        check_close(name, a, e, FLOAT32_BOUND)


@pytest.mark.parametrize("case", ["all_empty", "no_examples"])
def test_nothing_to_do(case: str) -> None:
    tensors = inputs(LENGTHS[case])
    out = gdpa_block(tensors[0], offsets_of(LENGTHS[case]), *tensors[1:])
    assert out.shape == tensors[0].shape


def test_a_constant_row_stays_finite() -> None:
    tensors = inputs([2])
    with torch.no_grad():
        tensors[0][0] = 3.0
    out = gdpa_block(tensors[0], offsets_of([2]), *tensors[1:])
    grads = torch.autograd.grad(out.square().sum(), tensors)
    assert all(torch.isfinite(t).all() for t in (out, *grads))


def test_norms_are_over_all_heads_together() -> None:
    s, k, v = (t.detach() for t in inputs([3]))
    before = gdpa_block(s, offsets_of([3]), k, v * 0)[:, 0]
    s[:, 1] *= 100
    assert not torch.allclose(gdpa_block(s, offsets_of([3]), k, v * 0)[:, 0], before)


def test_errors_name_the_op() -> None:
    s, k, v = inputs([3])
    with pytest.raises(ValueError, match="gdpa_block: k and v must be"):
        gdpa_block(s, offsets_of([3]), k[..., 1:], v)
