"""Sliding-window attention against a loop over examples, heads and queries in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, check_close, offsets_of
from torch import Tensor

from kernels.window_attention import window_attention

HEADS, WIDTH = 2, 4
FLOAT32_BOUND = 1e-5


def loop(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, window: int | None, scale: float) -> Tensor:
    rows = []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        for i in range(first, last):
            seen = [j for j in range(first, last) if window is None or abs(i - j) <= window]
            heads = []
            for h in range(q.shape[1]):
                weights = torch.stack([torch.exp(scale * (q[i, h] @ k[j, h])) for j in seen])
                heads.append(sum(w * v[j, h] for w, j in zip(weights / weights.sum(), seen, strict=True)))
            rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else (q + k + v) * 0


def inputs(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(sum(lengths), HEADS, WIDTH, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("window", [None, 0, 1, 5, 100])
@pytest.mark.parametrize("case", ["ragged", "one_row", "one_empty", "all_empty"])
def test_matches_the_loop(case: str, window: int | None) -> None:
    tensors = inputs(LENGTHS[case])
    offsets = offsets_of(LENGTHS[case])
    expected = loop(*tensors, offsets, window, 0.7)
    singles = [t.detach().float().requires_grad_() for t in tensors]
    actual = window_attention(*singles, offsets, window=window, scale=0.7)
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
    assert torch.autograd.gradcheck(lambda *t: window_attention(*t, offsets, window=1), tensors)


def test_a_row_outside_the_window_changes_nothing() -> None:
    q, k, v = (t.detach() for t in inputs([9]))
    before = window_attention(q, k, v, offsets_of([9]), window=2)
    k[8] += 10
    v[8] += 10
    after = window_attention(q, k, v, offsets_of([9]), window=2)
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_an_example_does_not_depend_on_its_neighbours() -> None:
    q, k, v = inputs([3, 17, 2])
    together = window_attention(q, k, v, offsets_of([3, 17, 2]), window=4)
    alone = window_attention(q[3:20], k[3:20], v[3:20], offsets_of([17]), window=4)
    check_close("rows", together[3:20], alone, 1e-14)


def test_no_examples_at_all() -> None:
    q, k, v = inputs([])
    assert window_attention(q, k, v, offsets_of([])).shape == (0, HEADS, WIDTH)


def test_huge_scores_stay_finite() -> None:
    tensors = [(t.detach() * 1e4).requires_grad_() for t in inputs([5, 2])]
    out = window_attention(*tensors, offsets_of([5, 2]))
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(torch.isfinite(t).all() for t in (out, *grads))


def test_arguments_that_do_not_fit_are_refused() -> None:
    q, k, v = inputs([3])
    with pytest.raises(ValueError, match="window must be >= 0"):
        window_attention(q, k, v, offsets_of([3]), window=-1)
    with pytest.raises(ValueError, match="alike"):
        window_attention(q, k[:2], v, offsets_of([3]))
