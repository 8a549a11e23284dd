"""Launch of the windows' backward kernel on Hopper."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.hopper import ROWS, counter, described, multiprocessors


def backward_on_hopper(
    qkvg: Sequence[Tensor], grads: Sequence[Tensor], sums: tuple[Tensor, Tensor] | None, offsets: Tensor, window: int,
    activation: str, scales: tuple[float, float], slots: int, **extra
) -> bool:
    engine = described((*qkvg, *grads), [ROWS] * 7)
    if engine is None:
        return False
    from kernels.launcher import launch
    from kernels.window.hopper_backward import _window_bwd_hopper_kernel
    _window_bwd_hopper_kernel = extra.pop('kernel', _window_bwd_hopper_kernel)

    q, k, v, grad = qkvg
    dq = grads[0]
    num_heads = q.shape[1]
    items = (offsets.shape[0] - 1) * num_heads
    lse, delta = sums or (q, q)
    launch(
        _window_bwd_hopper_kernel, (min(items, multiprocessors(q.device)),),
        *engine, *grads, lse, delta, offsets, counter(q.device), items, num_heads, window, *scales,
        stride_qh=q.stride(1), stride_kh=k.stride(1), stride_vh=v.stride(1), stride_doh=grad.stride(1),
        stride_gt=dq.stride(0), stride_gh=dq.stride(1),
        D=q.shape[2], SLOTS=slots, ACTIVATION=activation, APPROX=True, **extra, num_warps=4,
    )  # fmt: skip
    return True
