"""The softmax kernels against the references in float64: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, offsets_of
from torch import Tensor
from triton_cases import BOUNDS, DEVICE, FLOAT64_PRODUCTS, LOW, check, poisoned, results_of

from kernels.attention import launch
from kernels.attention.hopper import backward_tiles
from kernels.attention.launch import seed_attention_triton, window_attention_triton
from kernels.hopper import is_hopper
from kernels.seed_attention.reference import seed_attention_reference
from kernels.window_attention.reference import window_attention_reference

poison = pytest.fixture(autouse=True)(poisoned)

HEADS = 3


def run(function, tensors: list[Tensor], lengths: list[int], **options) -> list[Tensor]:
    """Output and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    scale = 1.6 / tensors[0].shape[-1] ** 0.5  # scores are as far apart at every width
    out = function(*leaves, offsets_of(lengths).to(DEVICE), scale=scale, **options)
    torch.manual_seed(1)
    grad = torch.randn(out.shape, dtype=torch.float64).to(LOW).to(DEVICE, out.dtype)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def inputs(lengths: list[int], seeds: int | None, width=16, dtype=torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    rows = [sum(lengths) if seeds is None else seeds, sum(lengths), sum(lengths)]
    return [torch.randn(n, HEADS, width).to(dtype).to(DEVICE) for n in rows]


def compare(lengths, *, seeds=None, window=None, width=16, dtype=torch.float32) -> None:
    tensors = inputs(lengths, seeds, width, dtype)
    fast, slow, options = window_attention_triton, window_attention_reference, {"window": window}
    if seeds is not None:
        fast, slow, options = seed_attention_triton, seed_attention_reference, {}
    expected = run(slow, [t.double() for t in tensors], lengths, **options)
    check("out dq dk dv", run(fast, tensors, lengths, **options), expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("case", ["ragged", "all_empty", "odd"])
def test_window(case: str, window: int | None, dtype: torch.dtype) -> None:
    compare(LENGTHS[case], window=window, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("seeds", [1, 37, 70])
@pytest.mark.parametrize("case", ["ragged", "all_empty", "odd", "one_empty"])
def test_seeds(case: str, seeds: int, dtype: torch.dtype) -> None:
    compare(LENGTHS[case], seeds=seeds, dtype=dtype)


@pytest.mark.parametrize("width", [16, 24, 64])
@pytest.mark.parametrize("lengths", [[63, 0, 65, 1], [130, 3]], ids=["short", "longer"])
def test_tiles_of_every_class(lengths: list[int], width: int) -> None:
    compare(lengths, window=40, width=width, dtype=LOW)
    compare(lengths, window=None, width=width, dtype=LOW)
    compare(lengths, seeds=64, width=width, dtype=LOW)


@pytest.mark.parametrize("seeds", [None, 70])
def test_what_the_hopper_kernels_refuse_is_left_to_triton(seeds: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*_: object) -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr(launch, "is_hopper", lambda device: True)
    monkeypatch.setattr(launch, "backward_tiles", lambda *kind: backward_tiles(*kind[:2], 4096, *kind[3:]))
    monkeypatch.setattr(launch, "forward_on_hopper", refuse)
    monkeypatch.setattr(launch, "backward_on_hopper", refuse)
    monkeypatch.setattr(launch, "window_on_hopper", refuse)
    monkeypatch.setattr(launch, "takes_seeds", lambda *_: True)
    monkeypatch.setattr(launch, "seeds_backward_on_hopper", lambda *_: asked.append(True))
    compare([65, 70], seeds=seeds, window=None if seeds else 5, width=64, dtype=LOW)
    assert len(asked) == 3


@pytest.mark.skipif(not is_hopper(DEVICE), reason="runs on Hopper alone")
@pytest.mark.parametrize(
    ("width", "window", "seeds"),
    [
        (64, 0, None),
        (64, 128, None),
        (128, 1, None),
        (128, 64, None),
        (64, None, 65),
        (128, None, 129),
        (128, None, 300),
    ],
)
def test_backward_kernels_of_hopper(
    width: int, window: int | None, seeds: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "seeds_backward_on_hopper" if seeds else "window_on_hopper"
    taken = results_of(launch, name, monkeypatch)
    compare([0, 1, 63, 64, 65, 130, 257, 3] * 22, seeds=seeds, window=window, width=width, dtype=LOW)  # 528 programs
    assert len(taken) == 1
    assert taken[0] is not None
    assert taken[0] is not False


@pytest.mark.parametrize("width", [4, 24, 64, 128])
def test_head_widths(width: int) -> None:
    compare([3, 0, 20], window=5, width=width, dtype=LOW)
    compare([3, 0, 20], seeds=7, width=width, dtype=LOW)


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_scores_far_from_zero_neither_overflow_nor_vanish(shift: float) -> None:
    q, k, v = inputs([3, 0, 20], None)
    q[..., 0], k[..., 0] = shift, 3.0
    options = {"window": None}
    expected = run(window_attention_reference, [q.double(), k.double(), v.double()], [3, 0, 20], **options)
    # Float32 scores of order 400 carry errors of order 1e-5 each.
    check("out dq dk dv", run(window_attention_triton, [q, k, v], [3, 0, 20], **options), expected, 1e-3)


@pytest.mark.parametrize("seeds", [7, 40])
def test_scores_far_below_zero_leave_no_trace_of_keys_past_the_end(seeds: int) -> None:
    q, k, v = inputs([3, 0, 20], seeds)
    q[..., 0], k[..., 0] = -300.0, 3.0
    expected = run(seed_attention_reference, [q.double(), k.double(), v.double()], [3, 0, 20])
    check("out dq dk dv", run(seed_attention_triton, [q, k, v], [3, 0, 20]), expected, 1e-3)


def test_no_examples_give_seeds_no_gradient() -> None:
    out, dq, _, _ = run(seed_attention_triton, inputs([], 5), [])
    assert out.shape == (0, 5, HEADS, 16)
    assert torch.equal(dq, torch.zeros_like(dq))


def test_two_runs_agree_to_the_bit() -> None:
    for seeds in (37, 70):
        tensors = inputs(LENGTHS["odd"], seeds, dtype=LOW)
        first, second = (run(seed_attention_triton, tensors, LENGTHS["odd"]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    tensors = inputs(LENGTHS["odd"], None, dtype=LOW)
    first, second = (run(window_attention_triton, tensors, LENGTHS["odd"], window=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not FLOAT64_PRODUCTS, reason="float64 products: not on a GPU, nor before Triton 3.8")
def test_gradients_by_finite_differences() -> None:
    offsets = offsets_of([2, 0, 1])
    tensors = [t[:, :1].clone().requires_grad_() for t in inputs([2, 0, 1], None, width=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: window_attention_triton(*t, offsets, window=1, scale=0.4), tensors)
    tensors = [t[:, :1].clone().requires_grad_() for t in inputs([2, 0, 1], 2, width=2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: seed_attention_triton(*t, offsets, scale=0.4), tensors)


def test_compiled_graph_holds_the_op_and_its_gradient() -> None:
    tensors = inputs([2, 0, 3], 4)

    def doubled(q: Tensor, *rest: Tensor, **options: object) -> Tensor:
        return 2 * seed_attention_triton(2 * q, *rest, **options)

    expected = run(doubled, tensors, [2, 0, 3])
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    check("out dq dk dv", run(compiled, tensors, [2, 0, 3]), expected, 1e-6)
