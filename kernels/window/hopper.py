"""Launch of the windows' backward kernel on Hopper, and where it runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.hopper import ROWS, counter, described, multiprocessors
from kernels.jagged import ENOUGH_PROGRAMS

_SLOTS = {64: 6, 128: 3}  # by head width: tiles of each of Q, K, V and dO that shared memory holds
SHORT_ROWS = 64  # mean rows of an example up to which narrow heads are left to others
REGISTERS = 248  # of a thread of the group that makes dK and dV; the other group gets what is left


@functools.lru_cache(1024)
def window_slots(dtype: torch.dtype, width: int, programs: int, short: bool, window: int | None) -> int | None:
    """Tiles on chip; None: the tiles that one tile's window meets do not fit, or the kernel cannot take the problem.

    Programs are (example, head) pairs: each walks all tiles of its own, so that few leave the card idle. `short`: an
    example has at most SHORT_ROWS rows in the mean.
    """
    if window is None or dtype not in (torch.bfloat16, torch.float16) or programs < ENOUGH_PROGRAMS:
        return None
    if short and width == 64:
        return None
    slots = _SLOTS.get(width, 0)
    return slots if 1 + 2 * -(-window // ROWS) <= slots else None


def window_backward_on_hopper(
    qkvg: Sequence[Tensor],
    grads: Sequence[Tensor],
    result: tuple[Tensor, Tensor] | None,
    offsets: Tensor,
    window: int,
    slots: int,
    activation: str,
    scales: tuple[float, float],
) -> bool:
    """Fill dQ, dK and dV of self-attention; False, with nothing done, where a tensor's layout forbids it.

    Args:
        result: softmax's, contiguous, and its base-2 log-sums; None for GDPA.
        activation: "softmax", or the name of one of GDPA's.
        scales: GDPA's inner and outer; softmax's scale times log2(e), and its scale.
    """
    q, k, v, grad = qkvg
    out, lse = result or (q, q)  # GDPA reads neither
    engine = described((*qkvg, *grads), [ROWS] * 7)
    if engine is None:
        return False
    from kernels.launcher import launch
    from kernels.window.hopper_backward import _window_bwd_hopper_kernel

    num_heads, (stride_gt, stride_gh, _) = q.shape[1], grads[0].stride()
    items = (offsets.shape[0] - 1) * num_heads
    launch(
        _window_bwd_hopper_kernel, (min(items, multiprocessors(q.device)),),
        *engine, *grads, out, lse, offsets, counter(q.device), items, num_heads, window, *scales,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1), stride_doh=grad.stride(1),
        stride_gt=stride_gt, stride_gh=stride_gh,
        D=q.shape[2], SLOTS=slots, REGISTERS=REGISTERS, ACTIVATION=activation, APPROX=True, num_warps=4,
    )  # fmt: skip
    return True
