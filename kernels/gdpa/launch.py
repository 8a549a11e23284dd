"""Launches of GDPA's Triton kernels, and their registration as one torch op with a gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.gdpa import triton_kernels
from kernels.gdpa.hopper import backward_on_hopper, forward_on_hopper, hopper_rings, hopper_tiles, window_on_hopper
from kernels.gdpa.tiles import (
    MAX_ROUNDED_SUMS,
    Problem,
    Tiles,
    backward_query_tiles,
    backward_tiles,
    forward_tiles,
    mean_tile_rows,
)
from kernels.hopper import engine_view, is_hopper
from kernels.jagged import accumulator, check_alike, like
from kernels.launcher import descriptor, launch, needs_gradient

_LONGEST = 2**31 - 1
_REMEMBERED = 1024  # classes of shapes
# The interpreter, which tests on CPU use, knows no inline assembly.
_COMPILED = isinstance(triton_kernels._gdpa_fwd_kernel, triton.JITFunction)


def gdpa_triton(
    q_THD: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_offsets: Tensor | None,
    activation: str | Sequence[str],
    inner_scale: float,
    outer_scale: float,
    window: int | None,
) -> Tensor:
    """See `kernels.gdpa.gdpa`. Under autocast q, k and v are computed with in autocast's type."""
    names = activation if isinstance(activation, str) else ",".join(activation)
    device_type = q_THD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        q_THD, k, v = q_THD.to(dtype), k.to(dtype), v.to(dtype)
    check_alike("gdpa", q_THD, k, v)
    if torch.compiler.is_compiling():
        out: Tensor = _gdpa(q_THD, q_offsets, k, v, kv_offsets, names, inner_scale, outer_scale, window)
        return out
    # Eagerly past the dispatcher, whose way through a Python op costs more than a small shape's kernel.
    run = _Eager.apply if needs_gradient(q_THD, k, v) else forward
    out = run(q_THD, q_offsets, k, v, kv_offsets, names, inner_scale, outer_scale, window)
    return out


def forward(
    q: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor | None,
    activation: str,
    inner: float,
    outer: float,
    window: int | None,
    tiles: Tiles | None = None,
) -> Tensor:
    """`tiles` overrides the rule: for measurements."""
    q, k, v = _rows_of_heads(q), _rows_of_heads(k), _rows_of_heads(v)
    out = like(q)
    problem = _problem(q, q_offsets, k, kv_offsets, window)
    on_hopper = hopper_tiles(problem) if tiles is None and is_hopper(q.device) else None
    tiles = tiles or forward_tiles(problem)
    if problem.num_examples == 0:
        return out
    short = problem.dense_keys is not None and 0 < problem.dense_keys <= tiles.block_n
    splits = problem.query_splits(tiles.block_m) if short else problem.tile_splits(tiles.block_m)
    for name, heads in _runs(activation, problem.num_heads):
        tensors = _of_heads((q, k, v, out), heads)
        if on_hopper and forward_on_hopper(tensors, q_offsets, kv_offsets, problem, on_hopper, name, inner, outer):
            continue
        strides = _strides(("q", "k", "v", "o"), tensors)
        num_heads = tensors[0].shape[1]
        grid = (problem.num_examples * num_heads, splits)
        options = _options(problem, tiles, name)
        streamed = _described(tensors[:1] if short else tensors[1:3], tiles, tiles.block_m if short else tiles.block_n)
        if streamed is not None:
            tensors[0 if short else 1 : 1 if short else 3] = streamed
        if short:
            launch(
                triton_kernels._gdpa_fwd_short_kernel, grid,
                *tensors, q_offsets, num_heads, problem.dense_keys, inner, outer,
                LATE=tiles.late, EAGER=tiles.eager, TMA=streamed is not None, **strides, **options,
            )  # fmt: skip
        else:
            launch(
                triton_kernels._gdpa_fwd_kernel, grid, *tensors, q_offsets, _offsets(kv_offsets, q_offsets), num_heads,
                problem.dense_keys or 0, window or 0, inner, outer,
                JAGGED=kv_offsets is not None, WINDOW=window is not None, TMA=streamed is not None,
                **strides, **options,
            )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor | None,
    activation: str,
    inner: float,
    outer: float,
    window: int | None,
    tiles: Tiles | None = None,
    dq_mode: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV. `tiles` and `dq_mode` override the rule: for measurements."""
    q, k, v, grad = _rows_of_heads(q), _rows_of_heads(k), _rows_of_heads(v), _rows_of_heads(grad)
    dq, dk, dv = like(q), like(k), like(v)
    problem = _problem(q, q_offsets, k, kv_offsets, window)
    by_rule = tiles is None and dq_mode is None and is_hopper(q.device)
    on_hopper = hopper_rings(problem) if by_rule else None
    tiles = tiles or backward_tiles(problem)
    if problem.num_examples == 0:
        return dq, dk, dv
    if by_rule and window is not None and all(
        window_on_hopper(
            _of_heads((q, k, v, grad), heads), _of_heads((dq, dk, dv), heads), q_offsets, kv_offsets, problem, name,
            inner, outer,
        )
        for name, heads in _runs(activation, problem.num_heads)
    ):  # fmt: skip
        return dq, dk, dv
    modes = _dq_modes(problem, tiles, k.shape[0]) if dq_mode is None else [dq_mode]
    splits = _backward_splits(problem, tiles, modes[0])
    scratch = torch.empty(q.shape, dtype=accumulator(q.dtype), device=q.device) if "carry" in modes else dq
    dk_parts, dv_parts = dk, dv
    if modes[0] == "store" and splits > 1:
        dk_parts, dv_parts = torch.empty((2, splits, *k.shape), dtype=accumulator(k.dtype), device=k.device).unbind()
    offsets = q_offsets, _offsets(kv_offsets, q_offsets)
    for name, heads in _runs(activation, problem.num_heads):
        qkvg = _of_heads((q, k, v, grad), heads)
        grads = _of_heads((dq, dk_parts, dv_parts, scratch), heads)
        strides = _strides(("q", "k", "v", "do", "g"), [*qkvg, dq])
        for mode in modes:
            lengths = _lengths(mode, modes, tiles)
            scales = name, inner, outer
            if (
                on_hopper
                and mode in ("store", "add")
                and backward_on_hopper(qkvg, grads[:3], q_offsets, kv_offsets, problem, on_hopper, *scales, lengths[1])
            ):
                continue
            options = strides | {"JAGGED": kv_offsets is not None, "WINDOW": window is not None}
            scalars = problem.dense_keys or 0, window or 0, inner, outer
            _launch_backward(problem, tiles, mode, splits, name, qkvg, grads, offsets, lengths, scalars, options)
    if dk_parts is not dk:
        dk, dv = dk_parts.sum(0).to(k.dtype), dv_parts.sum(0).to(v.dtype)
    return dq, dk, dv


def _launch_backward(
    problem: Problem,
    tiles: Tiles,
    mode: str,
    splits: int,
    activation: str,
    qkvg: list[Any],
    grads: list[Any],
    offsets: tuple[Tensor, Tensor],
    lengths: tuple[int, int],
    scalars: tuple[int, int, float, float],
    options: dict[str, Any],
) -> None:
    """One run of heads of one activation."""
    num_heads, programs = qkvg[0].shape[1], problem.num_examples * qkvg[0].shape[1]
    streamed = _described([qkvg[0], qkvg[3]], tiles, tiles.block_m)
    q_and_grad = [qkvg[0], qkvg[3]] if streamed is None else streamed
    launch(
        triton_kernels._gdpa_bwd_kernel, (programs, splits),
        q_and_grad[0], *qkvg[1:3], q_and_grad[1], *grads, *offsets, num_heads, qkvg[1].shape[:-2].numel(),
        *lengths, *scalars, DQ=mode, LATE=tiles.late and mode != "skip", TMA=streamed is not None,
        **options, **_options(problem, tiles, activation),
    )  # fmt: skip
    if mode == "skip":
        query_tiles = backward_query_tiles(problem)
        launch(
            triton_kernels._gdpa_bwd_q_kernel, (programs, problem.tile_splits(query_tiles.block_m)),
            *qkvg, grads[0], *offsets, num_heads, *scalars, **options, **_options(problem, query_tiles, activation),
        )  # fmt: skip


def _dq_modes(problem: Problem, tiles: Tiles, kv_rows: int) -> list[str]:
    """How dQ is made (see `_gdpa_bwd_kernel`): one way, or "add" for short examples and "carry" for the others."""
    if problem.dense_keys is not None and 0 < problem.dense_keys <= tiles.block_n:
        return ["store"]
    if not (tiles.carry and problem.enough_examples):
        return ["skip"]
    if not problem.low_precision:
        return ["add"]
    key_tiles = problem.key_tiles(tiles)
    if key_tiles is None:
        return ["add"] if kv_rows <= MAX_ROUNDED_SUMS * tiles.block_n else ["add", "carry"]
    return ["add"] if key_tiles <= MAX_ROUNDED_SUMS else ["carry"]


def _lengths(mode: str, modes: list[str], tiles: Tiles) -> tuple[int, int]:
    """The launch is for examples of more than the first number of keys, and at most the second."""
    if len(modes) == 1:
        return -1, _LONGEST
    limit = MAX_ROUNDED_SUMS * tiles.block_n
    return (-1, limit) if mode == "add" else (limit, _LONGEST)


def _backward_splits(problem: Problem, tiles: Tiles, mode: str) -> int:
    """The second grid axis of `_gdpa_bwd_kernel`."""
    if mode == "store":
        return problem.query_splits(tiles.block_m)
    if mode in ("carry", "add"):
        return 1
    if problem.dense_keys is not None:
        return max(1, -(-problem.dense_keys // tiles.block_n))
    return problem.tile_splits(tiles.block_n)


def _problem(q: Tensor, q_offsets: Tensor, k: Tensor, kv_offsets: Tensor | None, window: int | None) -> Problem:
    rows, num_heads, width = q.shape
    num_examples = q_offsets.shape[0] - 1
    dense_keys = k.shape[1] if kv_offsets is None else None
    return _problem_of(
        q.dtype, num_examples, num_heads, width, mean_tile_rows(rows, num_examples), dense_keys, window, q.device
    )


@functools.lru_cache(_REMEMBERED)
def _problem_of(
    dtype: torch.dtype, num_examples: int, num_heads: int, width: int, query_rows: int, dense_keys: int | None,
    window: int | None, device: torch.device,
) -> Problem:  # fmt: skip
    card = _is_datacenter_card(device)
    return Problem(dtype, num_examples, num_heads, width, query_rows, dense_keys, window, card)


def _is_datacenter_card(device: torch.device) -> bool:
    """True of the interpreter too, which then runs the code that such a card runs."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@functools.lru_cache(_REMEMBERED)
def _options(problem: Problem, tiles: Tiles, activation: str) -> dict[str, Any]:
    return {
        "D": problem.width,
        "BLOCK_D": problem.block_d,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "ACTIVATION": activation,
        "APPROX": problem.low_precision and _COMPILED,
        "PRECISION": None if problem.low_precision else "ieee",
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _described(tensors: Sequence[Tensor], tiles: Tiles, block: int) -> list[TensorDescriptor] | None:
    """Copy-engine descriptors of (rows, columns of all heads) in blocks of one head; None where it cannot read them."""
    if not tiles.tma:
        return None
    views = [engine_view(x) for x in tensors]
    if None in views:
        return None
    return [
        descriptor(TensorDescriptor, x, view, [block, x.shape[-1]])
        for x, view in zip(tensors, views, strict=True)
        if view is not None
    ]


def _strides(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, int]:
    """By row and by head. They are constants of a compiled kernel: a tile's addresses then share one register pair."""
    return _named_strides(*names, *[x.stride()[-3:-1] for x in tensors])


@functools.lru_cache(_REMEMBERED)
def _named_strides(*names_and_strides: Any) -> dict[str, int]:
    half = len(names_and_strides) // 2
    return {
        f"stride_{name}{axis}": stride
        for name, strides in zip(names_and_strides[:half], names_and_strides[half:], strict=True)
        for axis, stride in zip("th", strides, strict=True)
    }


@functools.lru_cache(_REMEMBERED)
def _runs(activation: str, num_heads: int) -> list[tuple[str, slice]]:
    """Neighboring heads of one activation: a launch each, so that no kernel branches on it."""
    names = activation.split(",")
    names = names * num_heads if len(names) == 1 else names
    runs, first = [], 0
    for name, run in groupby(names):
        size = len(list(run))
        runs.append((name, slice(first, first + size) if size < num_heads else slice(None)))
        first += size
    return runs


def _of_heads(tensors: Sequence[Tensor], heads: slice) -> list[Any]:
    return list(tensors) if heads == slice(None) else [x[..., heads, :] for x in tensors]


def _rows_of_heads(x: Tensor) -> Tensor:
    """x, copied only if a head's row is not contiguous or dense examples do not follow one another."""
    plain = x.stride(-1) == 1 and (x.dim() == 3 or x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if plain else x.contiguous()


def _offsets(offsets: Tensor | None, instead: Tensor) -> Tensor:
    """A pointer to pass where there are no offsets; it is not read."""
    return instead if offsets is None else offsets


@torch.library.custom_op("exfm::gdpa", mutates_args=())
def _gdpa(
    q: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor | None,
    activation: str,
    inner: float,
    outer: float,
    window: int | None,
) -> Tensor:
    return forward(q, q_offsets, k, v, kv_offsets, activation, inner, outer, window)


@_gdpa.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@torch.library.custom_op("exfm::gdpa_backward", mutates_args=())
def _gdpa_backward(
    grad: Tensor,
    q: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    kv_offsets: Tensor | None,
    activation: str,
    inner: float,
    outer: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(grad, q, q_offsets, k, v, kv_offsets, activation, inner, outer, window)


@_gdpa_backward.register_fake
def _(grad: Tensor, q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, q_offsets, k, v, kv_offsets = ctx.saved_tensors
    dq, dk, dv = _gdpa_backward(grad, q, q_offsets, k, v, kv_offsets, *ctx.options)
    return dq, None, dk, dv, None, None, None, None, None


_gdpa.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same forward and backward without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _save(ctx, inputs, inputs[0])
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, q_offsets, k, v, kv_offsets = ctx.saved_tensors
        dq, dk, dv = backward(grad, q, q_offsets, k, v, kv_offsets, *ctx.options)
        return dq, None, dk, dv, None, None, None, None, None
