"""GDPA against a loop over examples and heads in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, activation_of, check_close, offsets_of
from torch import Tensor

from kernels.gdpa import ACTIVATIONS, gdpa

HEADS, WIDTH, NUM_KV = 2, 4, 5
FLOAT32_BOUND = 1e-5  # a few hundred float32 roundings


def loop(q, q_offsets, k, v, kv_offsets, activations, inner, outer, window) -> Tensor:
    """One example, one head, one query at a time."""
    rows = []
    for b in range(len(q_offsets) - 1):
        first, last = int(q_offsets[b]), int(q_offsets[b + 1])
        if kv_offsets is None:
            keys, values = k[b], v[b]
        else:
            keys, values = (x[int(kv_offsets[b]) : int(kv_offsets[b + 1])] for x in (k, v))
        for i in range(last - first):
            heads = []
            for h in range(q.shape[1]):
                out = torch.zeros(q.shape[2], dtype=q.dtype)
                for j in range(len(keys)):
                    if window is None or abs(i - j) <= window:
                        score = inner * (q[first + i, h] @ keys[j, h])
                        out = out + outer * activation_of(activations[h], score) * values[j, h]
                heads.append(out)
            rows.append(torch.stack(heads))
    return torch.stack(rows) if rows else q * 0 + (k.sum() + v.sum()) * 0


def inputs(q_lengths: list[int], kv_lengths: list[int] | None, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    rows = (len(q_lengths), NUM_KV) if kv_lengths is None else (sum(kv_lengths),)
    shapes = [(sum(q_lengths), HEADS, WIDTH), (*rows, HEADS, WIDTH), (*rows, HEADS, WIDTH)]
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def compare(q_lengths, kv_lengths, activations, *, inner=0.7, outer=1.3, window=None) -> None:
    tensors = inputs(q_lengths, kv_lengths)
    q_offsets = offsets_of(q_lengths)
    kv_offsets = None if kv_lengths is None else offsets_of(kv_lengths)
    expected = loop(tensors[0], q_offsets, tensors[1], tensors[2], kv_offsets, activations, inner, outer, window)
    singles = [t.detach().float().requires_grad_() for t in tensors]
    options = {"inner_scale": inner, "outer_scale": outer, "window": window, "kv_offsets": kv_offsets}
    one = activations[0] if len(set(activations)) == 1 else activations
    actual = gdpa(singles[0], q_offsets, singles[1], singles[2], activation=one, **options)
    check_close("out", actual, expected, FLOAT32_BOUND)
    grad = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, tensors, grad)
    actual_grads = torch.autograd.grad(actual, singles, grad.float())
    for name, a, e in zip(("dq", "dk", "dv"), actual_grads, expected_grads, strict=True):
        check_close(name, a, e, FLOAT32_BOUND)


@pytest.mark.parametrize("case", [c for c in LENGTHS if c != "no_examples"])
def test_dense_keys_match_the_loop(case: str) -> None:
    compare(LENGTHS[case], None, ["gelu_tanh"] * HEADS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_matches_its_formula(activation: str) -> None:
    compare(LENGTHS["ragged"], None, [activation] * HEADS)


def test_each_head_takes_its_own_activation() -> None:
    compare(LENGTHS["ragged"], None, ["silu", "relu_square"])


@pytest.mark.parametrize("window", [None, 0, 1, 5])
@pytest.mark.parametrize("case", ["ragged", "all_empty"])
def test_self_attention_matches_the_loop(case: str, window: int | None) -> None:
    compare(LENGTHS[case], LENGTHS[case], ["silu"] * HEADS, window=window)


def test_jagged_keys_of_other_lengths_match_the_loop() -> None:
    compare([3, 0, 5, 1, 2], [0, 4, 9, 1, 3], ["gelu"] * HEADS)


def test_identity_activation_is_exactly_linear_attention() -> None:
    q, k, v = inputs([3, 0, 6], None)
    out = gdpa(q, offsets_of([3, 0, 6]), k, v, activation="identity", inner_scale=1.0)
    folded = torch.einsum("bnhd,bnhe->bhde", k, v)
    example = torch.tensor([0] * 3 + [2] * 6)
    check_close("S (K^T V)", out, torch.einsum("thd,thde->the", q, folded[example]), 1e-14)


def test_an_example_without_queries_gives_zero_gradients_to_its_keys() -> None:
    q, k, v = inputs([2, 0, 3], None)
    gdpa(q, offsets_of([2, 0, 3]), k, v).square().sum().backward()
    assert k.grad is not None
    assert v.grad is not None
    assert torch.equal(k.grad[1], torch.zeros_like(k.grad[1]))
    assert torch.equal(v.grad[1], torch.zeros_like(v.grad[1]))
    assert k.grad[0].abs().sum() > 0


def test_no_examples_at_all() -> None:
    q, k, v = inputs([], None)
    assert gdpa(q, offsets_of([]), k, v).shape == (0, HEADS, WIDTH)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu_square", "silu"])
def test_gradients_by_finite_differences(activation: str) -> None:
    q, k, v = inputs([2, 0, 3], None, seed=1)
    offsets = offsets_of([2, 0, 3])
    assert torch.autograd.gradcheck(lambda *t: gdpa(t[0], offsets, t[1], t[2], activation=activation), (q, k, v))


def test_default_inner_scale_is_one_over_root_d() -> None:
    q, k, v = inputs([4], None)
    offsets = offsets_of([4])
    assert torch.equal(gdpa(q, offsets, k, v), gdpa(q, offsets, k, v, inner_scale=WIDTH**-0.5))


def test_an_example_does_not_depend_on_its_neighbours() -> None:
    q, k, v = inputs([3, 17, 2], None)
    together = gdpa(q, offsets_of([3, 17, 2]), k, v)
    alone = gdpa(q[3:20], offsets_of([17]), k[1:2], v[1:2])
    check_close("rows", together[3:20], alone, 1e-14)


def test_low_precision_is_computed_in_float32() -> None:
    tensors = [t.detach().bfloat16() for t in inputs([5, 2], None)]
    offsets = offsets_of([5, 2])
    out = gdpa(tensors[0], offsets, tensors[1], tensors[2])
    exact = gdpa(tensors[0].float(), offsets, tensors[1].float(), tensors[2].float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "softmax"}, "unknown activation 'softmax'"),
        ({"activation": ["relu"]}, "1 activations for 2 heads"),
        ({"window": 2}, "needs jagged keys"),
        ({"q_offsets": torch.tensor([0, 3])}, "int32"),
        ({"q_offsets": torch.tensor([[0, 0], [3, 0]], dtype=torch.int32)[:, 0]}, "contiguous"),
        ({"q_offsets": torch.tensor([0, 9], dtype=torch.int32)}, "number of rows"),
        ({"q_offsets": torch.tensor([0, 2, 1, 3], dtype=torch.int32)}, "must rise"),
        ({"k": torch.zeros(1, NUM_KV, HEADS, WIDTH + 1)}, "k and v must be"),
        ({"k": torch.zeros(2, NUM_KV, HEADS, WIDTH), "v": torch.zeros(2, NUM_KV, HEADS, WIDTH)}, "2 examples"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    q, k, v = inputs([3], None)
    arguments = {"q_THD": q, "q_offsets": offsets_of([3]), "k": k, "v": v, **change}
    with pytest.raises(ValueError, match=message):
        gdpa(**arguments)
