"""The GDPA block's Triton kernels against the reference in float64: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, offsets_of
from torch import Tensor
from triton_cases import BOUNDS, DEVICE, FLOAT64_PRODUCTS, LOW, check, poisoned, results_of

from kernels.gdpa_block import hopper, launch
from kernels.gdpa_block.launch import gdpa_block_triton
from kernels.gdpa_block.reference import gdpa_block_reference
from kernels.hopper import is_hopper

poison = pytest.fixture(autouse=True)(poisoned)

OPTIONS = {"inner_scale": 0.4, "outer_scale": 1.3}


def inputs(lengths, kv=17, heads=3, width=16, dtype=torch.float32) -> list[Tensor]:
    """s, k, v and out's gradient; s is neither centered nor of unit spread."""
    torch.manual_seed(0)
    shapes = [(sum(lengths), heads, width), *[(len(lengths), kv, heads, width)] * 2, (sum(lengths), heads, width)]
    s, *rest = (torch.randn(shape) for shape in shapes)
    return [x.to(dtype).to(DEVICE) for x in (s * 2 + 0.5, *rest)]


def run(function, tensors, lengths, activation="gelu_tanh") -> list[Tensor]:
    """Output and gradients."""
    s, k, v = (t.detach().clone().requires_grad_() for t in tensors[:3])
    out = function(s, offsets_of(lengths).to(DEVICE), k, v, activation=activation, **OPTIONS)
    return [out, *torch.autograd.grad(out, (s, k, v), tensors[3].to(out.dtype))]


def compare(lengths, *, activation="gelu_tanh", dtype=torch.float32, **sizes) -> None:
    tensors = inputs(lengths, dtype=dtype, **sizes)
    expected = run(gdpa_block_reference, [t.double() for t in tensors], lengths, activation)
    check("out ds dk dv", run(gdpa_block_triton, tensors, lengths, activation), expected, BOUNDS[dtype])


def results_on_hopper(function: str, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What this launch of Hopper's kernels returns from now on, which may take small problems, too."""
    monkeypatch.setattr(hopper, "_ENOUGH_ELEMENTS", 0)
    monkeypatch.setattr(hopper, "_ENOUGH_QUERIES", 0)
    return results_of(launch, function, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("case", [c for c in LENGTHS if c != "no_examples"])
def test_lengths(case: str, dtype: torch.dtype) -> None:
    compare(LENGTHS[case], dtype=dtype)


@pytest.mark.parametrize(("heads", "width"), [(1, 4), (5, 24), (3, 32), (2, 64), (1, 128)])
def test_head_counts_and_widths(heads: int, width: int) -> None:
    compare([3, 0, 20], heads=heads, width=width, dtype=LOW)


def test_an_activation_for_each_head() -> None:
    compare([3, 0, 20], activation=("relu", "gelu_tanh", "silu"))


@pytest.mark.skipif(not is_hopper(DEVICE), reason="runs on Hopper alone")
@pytest.mark.parametrize(
    "lengths", [[0, 1, 63, 64, 65, 0, 130, 700, 1], [1], [0, 0]], ids=["odd", "one row", "all empty"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "width", "kv"),
    [(2, 128, 64), (3, 128, 100), (4, 128, 128), (8, 128, 200), (8, 64, 128), (4, 64, 50), (14, 64, 100)],
)
def test_one_kernel_whose_heads_exchange_sums(
    heads: int, width: int, kv: int, dtype: torch.dtype, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = results_on_hopper("forward_on_hopper", monkeypatch)
    compare(lengths, heads=heads, width=width, kv=kv, dtype=dtype)
    assert taken == [sum(lengths) > 0]


@pytest.mark.skipif(not is_hopper(DEVICE), reason="runs on Hopper alone")
@pytest.mark.parametrize(
    "lengths",
    [[0, 1, 63, 64, 65, 0, 130, 1000, 1, 0], [1], [0, 0], [n * 37 % 300 for n in range(300)]],
    ids=["odd", "one row", "all empty", "many"],
)
@pytest.mark.parametrize(("heads", "kv"), [(2, 64), (3, 50), (4, 64), (8, 33), (2, 128), (3, 100), (4, 65), (8, 128)])
def test_backward_in_one_kernel_whose_heads_exchange_sums(
    heads: int, kv: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = results_on_hopper("backward_on_hopper", monkeypatch)
    compare(lengths, heads=heads, width=128, kv=kv, dtype=LOW)
    assert [found is not None for found in taken] == [sum(lengths) > 0]
    tensors = inputs(lengths, heads=heads, width=128, kv=kv, dtype=LOW)
    first, second = (run(gdpa_block_triton, tensors, lengths) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_examples() -> None:
    assert [len(t) for t in run(gdpa_block_triton, inputs([]), [])] == [0, 0, 0, 0]


def test_two_runs_agree_to_the_bit() -> None:
    tensors = inputs(LENGTHS["odd"], dtype=LOW)
    first, second = (run(gdpa_block_triton, tensors, LENGTHS["odd"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(not FLOAT64_PRODUCTS, reason="float64 products: not on a GPU, nor before Triton 3.8")
def test_gradients_by_finite_differences() -> None:
    offsets = offsets_of([2, 0, 1])
    tensors = [t.double().requires_grad_() for t in inputs([2, 0, 1], kv=2, heads=2, width=2)[:3]]

    def call(*leaves: Tensor) -> Tensor:
        return gdpa_block_triton(leaves[0], offsets, *leaves[1:], activation="silu", **OPTIONS)

    assert torch.autograd.gradcheck(call, tensors, eps=1e-5, atol=1e-5)


def test_compiled_graph_holds_the_op_and_its_gradient() -> None:
    tensors = inputs([2, 0, 3], kv=4)

    def doubled(s: Tensor, *rest: Tensor, **options: object) -> Tensor:
        return 2 * gdpa_block_triton(2 * s, *rest, **options)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    check("out ds dk dv", run(compiled, tensors, [2, 0, 3]), run(doubled, tensors, [2, 0, 3]), 1e-6)


def test_autocast_multiplies_in_its_type_and_keeps_the_residual_in_float32() -> None:
    tensors = inputs([2, 0, 3])
    expected = run(gdpa_block_reference, [t.double() for t in tensors], [2, 0, 3])
    with torch.autocast(DEVICE.type, dtype=LOW):
        actual = run(gdpa_block_triton, tensors, [2, 0, 3])
    assert {t.dtype for t in actual} == {torch.float32}
    check("out ds dk dv", actual, expected, BOUNDS[LOW])
    assert not torch.equal(actual[0], run(gdpa_block_triton, tensors, [2, 0, 3])[0])
