"""Seed attention against a loop over examples, seeds and heads in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, check_close, offsets_of
from torch import Tensor

from kernels.seed_attention import seed_attention

SEEDS, HEADS, WIDTH = 3, 2, 4
FLOAT32_BOUND = 1e-5


def loop(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float) -> Tensor:
    out = []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for s in range(len(q)):
            for h in range(q.shape[1]):
                weights = [torch.exp(scale * (q[s, h] @ k[j, h])) for j in range(first, last)]
                total = sum(weights, torch.zeros((), dtype=q.dtype))
                parts = [w / total * v[j, h] for w, j in zip(weights, range(first, last), strict=True)]
                out.append(sum(parts, (q.sum() + k.sum() + v.sum()) * 0 + torch.zeros(q.shape[2], dtype=q.dtype)))
    return torch.stack(out).view(len(offsets) - 1, *q.shape)


def inputs(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(0)
    rows = [SEEDS, sum(lengths), sum(lengths)]
    return [torch.randn(n, HEADS, WIDTH, dtype=torch.float64, requires_grad=True) for n in rows]


@pytest.mark.parametrize("case", ["ragged", "one_row", "one_empty", "all_empty", "odd"])
def test_matches_the_loop(case: str) -> None:
    tensors = inputs(LENGTHS[case])
    offsets = offsets_of(LENGTHS[case])
    expected = loop(*tensors, offsets, 0.7)
    singles = [t.detach().float().requires_grad_() for t in tensors]
    actual = seed_attention(*singles, offsets, scale=0.7)
    check_close("out", actual, expected, FLOAT32_BOUND)
    grad = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(actual, singles, grad.float()), torch.autograd.grad(expected, tensors, grad), strict=True
    )
    for name, (a, e) in zip(("dq", "dk", "dv"), pairs, strict=True):
        check_close(name, a, e, FLOAT32_BOUND)


def test_gradients_by_finite_differences() -> None:
    tensors = inputs([3, 0, 4])
    offsets = offsets_of([3, 0, 4])
    assert torch.autograd.gradcheck(lambda *t: seed_attention(*t, offsets), tensors)


def test_an_empty_example_gives_zeros_at_its_place() -> None:
    q, k, v = inputs([2, 0, 1])
    out = seed_attention(q, k, v, offsets_of([2, 0, 1]))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().sum() > 0
    check_close("single event", out[2], v[2].expand(SEEDS, HEADS, WIDTH), 1e-14)


def test_an_example_does_not_depend_on_its_neighbours() -> None:
    q, k, v = inputs([3, 17, 2])
    together = seed_attention(q, k, v, offsets_of([3, 17, 2]))
    check_close("rows", together[1:2], seed_attention(q, k[3:20], v[3:20], offsets_of([17])), 1e-14)


def test_no_examples_at_all() -> None:
    assert seed_attention(*inputs([]), offsets_of([])).shape == (0, SEEDS, HEADS, WIDTH)


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs([3])
    with pytest.raises(ValueError, match="seed_attention: q must be"):
        seed_attention(q[..., :2], k, v, offsets_of([3]))
