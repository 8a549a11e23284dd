"""GDPA's Triton kernels against the reference in float64: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, offsets_of
from torch import Tensor
from triton_cases import BOUNDS, DEVICE, LOW, check, poisoned, results_of

from kernels.gdpa import ACTIVATIONS, hopper, launch
from kernels.gdpa.launch import backward, forward, gdpa_triton
from kernels.gdpa.reference import gdpa_reference
from kernels.gdpa.tiles import Problem, Tiles, backward_tiles, forward_tiles, mean_tile_rows
from kernels.hopper import is_hopper

poison = pytest.fixture(autouse=True)(poisoned)

HEADS = 3
OTHER_LENGTHS = [5, 0, 33, 1, 9, 17, 2, 0, 3]
OPTIONS = {"inner_scale": 0.4, "outer_scale": 1.3}


def inputs(q_lengths, kv, width=16, dtype=torch.float32, seed=0) -> list[Tensor]:
    """q, k, v and out's gradient; `kv` is a number of dense keys or the lengths of jagged ones."""
    torch.manual_seed(seed)
    rows = (len(q_lengths), kv) if isinstance(kv, int) else (sum(kv),)
    shapes = [(sum(q_lengths), HEADS, width), *[(*rows, HEADS, width)] * 2, (sum(q_lengths), HEADS, width)]
    return [torch.randn(s).to(dtype).to(DEVICE) for s in shapes]


def run(function, tensors, q_lengths, kv, activation="gelu_tanh", window=None) -> list[Tensor]:
    """Output and gradients."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors[:3])
    kv_offsets = None if isinstance(kv, int) else offsets_of(kv).to(DEVICE)
    q_offsets = offsets_of(q_lengths).to(DEVICE)
    out = function(q, q_offsets, k, v, kv_offsets=kv_offsets, activation=activation, window=window, **OPTIONS)
    return [out, *torch.autograd.grad(out, (q, k, v), tensors[3].to(out.dtype))]


def compare(q_lengths, kv, *, width=16, dtype=torch.float32, activation="gelu_tanh", window=None) -> None:
    tensors = inputs(q_lengths, kv, width, dtype)
    arguments = (q_lengths, kv, activation, window)
    expected = run(gdpa_reference, [t.double() for t in tensors], *arguments)
    check("out dq dk dv", run(gdpa_triton, tensors, *arguments), expected, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("kv", [1, 5, 40])
@pytest.mark.parametrize("case", [c for c in LENGTHS if c != "no_examples"])
def test_dense_keys(case: str, kv: int, dtype: torch.dtype) -> None:
    compare(LENGTHS[case], kv, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, LOW], ids=str)
@pytest.mark.parametrize("window", [None, 0, 7])
@pytest.mark.parametrize("case", ["ragged", "all_empty", "odd"])
def test_self_attention(case: str, window: int | None, dtype: torch.dtype) -> None:
    compare(LENGTHS[case], LENGTHS[case], window=window, dtype=dtype)


@pytest.mark.parametrize("window", [None, 4])
def test_jagged_keys_of_other_lengths(window: int | None) -> None:
    compare(LENGTHS["ragged"], OTHER_LENGTHS, window=window)


@pytest.mark.parametrize("width", [4, 24, 32, 64, 128])
def test_head_widths(width: int) -> None:
    compare([3, 0, 20], 17, width=width, dtype=LOW)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    compare([3, 0, 20], 17, activation=activation)


def test_an_activation_for_each_head() -> None:
    compare([3, 0, 20], 17, activation=("relu", "gelu_tanh", "gelu_tanh"))


def test_many_keys_take_the_streaming_kernels() -> None:
    compare([3, 0, 20], 300, dtype=LOW)


def test_no_examples() -> None:
    out, *grads = run(gdpa_triton, inputs([], 4), [], 4)
    assert [len(t) for t in (out, *grads)] == [0, 0, 0, 0]


def test_no_keys_give_zeros() -> None:
    compare([3, 0, 2], 0)


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("late", [False, True], ids=["prompt", "late"])
@pytest.mark.parametrize("mode", ["store", "add", "carry", "skip"])
@pytest.mark.parametrize("layout", ["dense", "jagged", "window"])
def test_every_variant_computes_the_same(layout: str, mode: str, late: bool, tma: bool) -> None:
    if layout != "dense" and mode == "store":
        pytest.skip("jagged keys may need several tiles")
    q_lengths, window = [3, 0, 50, 33], 3 if layout == "window" else None
    kv = {"dense": 40, "jagged": [5, 0, 50, 1], "window": q_lengths}[layout]
    tensors = inputs(q_lengths, kv, dtype=LOW)
    tiles = Tiles(16, 64 if mode == "store" else 16, 4, 2, tma, late)
    offsets = offsets_of(q_lengths).to(DEVICE), None if isinstance(kv, int) else offsets_of(kv).to(DEVICE)
    rest = (offsets[1], "gelu_tanh", OPTIONS["inner_scale"], OPTIONS["outer_scale"], window)
    q, k, v, grad = tensors
    actual = [forward(q, offsets[0], k, v, *rest, tiles=tiles)]
    actual += backward(grad, q, offsets[0], k, v, *rest, tiles=tiles, dq_mode=mode)
    expected = run(gdpa_reference, [t.double() for t in tensors], q_lengths, kv, "gelu_tanh", window)
    check("out dq dk dv", actual, expected, BOUNDS[LOW])


def test_keys_that_are_asked_for_before_the_length_is_known() -> None:
    q_lengths, tiles = [0, 3, 20, 0], Tiles(16, 64, 4, 1, eager=True)
    q, k, v, grad = inputs(q_lengths, 40, dtype=LOW)
    scales = "gelu_tanh", OPTIONS["inner_scale"], OPTIONS["outer_scale"]
    out = forward(q, offsets_of(q_lengths).to(DEVICE), k, v, None, *scales, None, tiles=tiles)
    expected = run(gdpa_reference, [t.double() for t in (q, k, v, grad)], q_lengths, 40)
    check("out", [out], expected[:1], BOUNDS[LOW])


def test_short_examples_with_few_wide_keys_ask_early() -> None:
    def eager(width: int, queries: int, keys: int) -> bool:
        return forward_tiles(Problem(LOW, 100, 2, width, 100 * queries, keys, None)).eager

    assert eager(128, 128, 64)
    assert not any([eager(128, 129, 64), eager(64, 64, 64), eager(128, 64, 65), eager(128, 64, 32)])


def test_long_examples_carry_dq_in_float32_beside_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.gdpa.tiles.ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr("kernels.gdpa.launch.MAX_ROUNDED_SUMS", 1)
    compare([3, 0, 50, 20], [5, 140, 0, 300], dtype=LOW)


def test_a_wide_window_is_carried_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.gdpa.tiles.ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr("kernels.gdpa.launch.MAX_ROUNDED_SUMS", 1)
    compare([3, 0, 150], [3, 0, 150], window=100, dtype=LOW)


@pytest.mark.parametrize("same", [True, False])
def test_windows_go_to_hoppers_kernel_if_queries_and_keys_have_the_same_offsets(
    same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*_: object) -> bool:
        asked.append(True)
        return False

    monkeypatch.setattr("kernels.gdpa.hopper.window_slots", lambda *_: 6)
    monkeypatch.setattr("kernels.gdpa.launch.is_hopper", lambda device: True)
    monkeypatch.setattr("kernels.gdpa.hopper.window_backward_on_hopper", refuse)
    q, k, v, grad = inputs([130, 3], [130, 3], 64, LOW)
    offsets = offsets_of([130, 3]).to(DEVICE)
    options = ("silu", OPTIONS["inner_scale"], OPTIONS["outer_scale"], 7)
    actual = backward(grad, q, offsets, k, v, offsets if same else offsets.clone(), *options)
    assert len(asked) == (1 if same else 0)
    expected = run(gdpa_reference, [t.double() for t in (q, k, v, grad)], [130, 3], [130, 3], "silu", 7)
    check("dq dk dv", actual, expected[1:], BOUNDS[LOW])


@pytest.mark.skipif(not is_hopper(DEVICE), reason="runs on Hopper alone")
@pytest.mark.parametrize("lengths", [[0, 1, 63, 64, 65, 0, 130, 257], [700, 500, 0, 400], [1, 0]], ids=str)
@pytest.mark.parametrize("kv", [129, 256, 300, [0, 300, 700, 1, 128, 64, 500, 129]], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_backward_kernel_of_hopper(
    width: int, kv: int | list[int], lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = results_of(launch, "backward_on_hopper", monkeypatch)
    monkeypatch.setattr("kernels.gdpa.tiles.ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(hopper, "_ENOUGH_ELEMENTS", 0)
    monkeypatch.setattr(hopper, "_ENOUGH_QUERIES", 0)
    monkeypatch.setattr(launch, "hopper_rings", hopper.hopper_rings.__wrapped__)
    kv = kv if isinstance(kv, int) else kv[: len(lengths)]
    compare(lengths, kv, width=width, dtype=LOW)
    assert taken == [True]
    tensors = inputs(lengths, kv, width, LOW)
    first, second = (run(gdpa_triton, tensors, lengths, kv) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keys_of_another_type_are_refused() -> None:
    q, k, v, _ = inputs([3, 5], [4, 4])
    offsets = offsets_of([3, 5]).to(DEVICE)
    with pytest.raises(ValueError, match=r"gdpa: expected torch.float32 on .*, got torch.float64"):
        gdpa_triton(q, offsets, k.double(), v, kv_offsets=offsets, activation="gelu_tanh", window=None, **OPTIONS)


def test_columns_of_one_projection_need_no_copy() -> None:
    q_lengths, width = [3, 5], 16
    qkv, grad = torch.randn(8, 3, HEADS, width, device=DEVICE), torch.randn(8, HEADS, width, device=DEVICE)
    expected = run(gdpa_reference, [*qkv.double().unbind(1), grad.double()], q_lengths, q_lengths)
    offsets = offsets_of(q_lengths).to(DEVICE)
    out = gdpa_triton(
        *(qkv[:, 0], offsets, qkv[:, 1], qkv[:, 2]), kv_offsets=offsets, activation="gelu_tanh", window=None, **OPTIONS
    )
    check("out", [out], expected[:1], BOUNDS[torch.float32])


def test_two_runs_agree_to_the_bit() -> None:
    arguments = (LENGTHS["odd"], LENGTHS["odd"], "silu", None)
    tensors = inputs(LENGTHS["odd"], LENGTHS["odd"], dtype=LOW)
    first, second = run(gdpa_triton, tensors, *arguments), run(gdpa_triton, tensors, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="a GPU has no float64 product of two columns")
@pytest.mark.parametrize("kv", [2, [2, 0, 1]], ids=["dense", "self"])
def test_gradients_by_finite_differences(kv: int | list[int]) -> None:
    every = inputs([2, 0, 1], kv, width=2, dtype=torch.float64)
    tensors = [t[..., :1, :].clone().requires_grad_() for t in every[:3]]
    offsets = offsets_of([2, 0, 1])
    kv_offsets = None if isinstance(kv, int) else offsets

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return gdpa_triton(q, offsets, k, v, kv_offsets=kv_offsets, activation="silu", window=None, **OPTIONS)

    assert torch.autograd.gradcheck(call, tensors, eps=1e-5, atol=1e-5)


def test_compiled_graph_holds_the_op_and_its_gradient() -> None:
    q_lengths, kv = [2, 0, 3], 4
    tensors = inputs(q_lengths, kv)

    def doubled(q: Tensor, *rest: Tensor, **options: object) -> Tensor:
        return 2 * gdpa_triton(2 * q, *rest, **options)

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    expected = run(doubled, tensors, q_lengths, kv)
    check("out dq dk dv", run(compiled, tensors, q_lengths, kv), expected, 1e-6)


def test_autocast_computes_in_its_type() -> None:
    tensors = inputs([2, 0, 3], 4)
    with torch.autocast(DEVICE.type, dtype=LOW):
        out, *grads = run(gdpa_triton, tensors, [2, 0, 3], 4)
    assert out.dtype == LOW
    assert {g.dtype for g in grads} == {torch.float32}


@pytest.mark.parametrize("choose", [forward_tiles, backward_tiles])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("keys", [None, 0, 1, 31, 129, 5000])
@pytest.mark.parametrize("width", [3, 64, 100, 256])
def test_every_problem_has_tiles(choose, dtype, window, keys, width) -> None:
    tiles = choose(Problem(dtype, 7, 3, width, 900, keys, window))
    assert tiles.block_m >= 16
    assert tiles.block_n >= 16


@pytest.mark.parametrize("examples", [0, 1, 7, 300])
@pytest.mark.parametrize("block", [16, 48, 64, 128])
def test_batches_that_look_alike_are_shared_out_alike(examples: int, block: int) -> None:
    for rows in [0, 1, examples * 16, examples * 16 + 1, examples * 64 - 1, 4_001, 100_000]:
        exact, alike = (
            Problem(LOW, examples, 1, 64, n, 64, None) for n in (rows, mean_tile_rows(rows, examples))
        )  # fmt: skip
        assert exact.query_splits(block) == alike.query_splits(block)
        assert exact.tile_splits(block) == alike.tile_splits(block)
