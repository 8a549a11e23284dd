"""Launch of the windows' backward kernel on Hopper: where it runs, and how."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.hopper import ROWS, counter, described, multiprocessors
from kernels.jagged import ENOUGH_PROGRAMS


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The constants of `_window_bwd_hopper_kernel`; registers are those of a thread that makes dK and dV."""

    slots: int
    groups: int
    in_place: bool
    turns: bool
    registers: int

    @property
    def reach(self) -> int:
        """How many tiles away a row's window may end."""
        return (self.slots - self.groups) // 2


# By head width and whether it is softmax's. Softmax needs the room for O, and stages its gradients in place.
_PLANS = {
    (64, True): WindowPlan(6, 1, True, False, 248),
    (64, False): WindowPlan(6, 1, True, False, 248),
    (128, True): WindowPlan(3, 1, True, False, 248),
    (128, False): WindowPlan(3, 1, False, False, 248),
}


@functools.lru_cache(1024)
def window_plan(dtype: torch.dtype, width: int, programs: int, window: int | None, softmax: bool) -> WindowPlan | None:
    """None: the tiles that one tile's window meets do not fit on chip, or the kernel cannot take the problem.

    Programs are (example, head) pairs: each walks all tiles of its own, so that few leave the card idle.
    """
    if window is None or dtype not in (torch.bfloat16, torch.float16) or programs < ENOUGH_PROGRAMS:
        return None
    plan = _PLANS.get((width, softmax))
    return plan if plan is not None and window <= plan.reach * ROWS else None


def window_backward_on_hopper(
    qkvg: Sequence[Tensor],
    grads: Sequence[Tensor],
    saved: tuple[Tensor, Tensor] | None,
    offsets: Tensor,
    window: int,
    plan: WindowPlan,
    activation: str,
    scales: tuple[float, float],
) -> bool:
    """Fill dQ, dK and dV of self-attention; False, with nothing done, where a tensor's layout forbids it.

    Args:
        saved: softmax's output and base-2 log-sums; None for GDPA.
        activation: "softmax", or the name of one of GDPA's.
        scales: GDPA's inner and outer; softmax's scale times log2(e), and its scale.
    """
    q, k, v, grad = qkvg
    out, lse = saved or (q, q)  # GDPA reads neither
    engine = described((*qkvg, out, *grads), [ROWS] * 8)
    if engine is None:
        return False
    from kernels.launcher import launch
    from kernels.window.hopper_backward import _window_bwd_hopper_kernel

    num_heads, (stride_gt, stride_gh, _) = q.shape[1], grads[0].stride()
    items = (offsets.shape[0] - 1) * num_heads
    launch(
        _window_bwd_hopper_kernel, (min(items, multiprocessors(q.device)),),
        *engine, *grads, lse, offsets, counter(q.device), items, num_heads, window, *scales,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1), stride_doh=grad.stride(1),
        stride_gt=stride_gt, stride_gh=stride_gh,
        D=q.shape[2], SLOTS=plan.slots, GROUPS=plan.groups, IN_PLACE=plan.in_place, TURNS=plan.turns,
        REGISTERS=plan.registers, ACTIVATION=activation, APPROX=True, num_warps=4,
    )  # fmt: skip
    return True
