"""What the GDPA block's backward does to the rows of a query tile around GDPA's own products, in Gluon.

With W numbers in a row (all heads), LayerNorm's q and RMSNorm's output unit = out - S, the gradient of GDPA's result is
`dg = rms (dO - unit sum(dO unit) / W)`, that of q is `dq = dg + dq_gdpa`, and
`dS = rstd (dq - sum(dq) / W - q sum(dq q) / W) + dO`. Sums are over all heads.

A tile's three places in shared memory hold out, S and dO; then dg, q and dO; at last q and, in dO's place,
`rstd dq + dO` and then dS. One group of four warps does all this, but for adding dQ, which the groups do that made it.
Warps of their own exchange the sums: a group leaves its share in shared memory and finds the total there.

Shape letters: R = 16 rows, M = 64 rows, C = 64 columns, D head width, H heads, W = H D.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kernels.gdpa_block.hopper_exchange import LANES, total
from kernels.gdpa_block.hopper_mailbox import TURNS
from kernels.hopper_ring import ROWS, all_warps, store, store_rows, take

_R = gl.constexpr(16)
_C = gl.constexpr(64)
_PARTS = gl.constexpr(ROWS // _R)
# Eight threads a row: no two that read at a time meet in a bank.
_PIECE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_ROW = gl.constexpr(gl.SliceLayout(1, _PIECE.value))


@gluon.jit
def _pieces(tiles):
    """A ring of tiles as pieces of 16 rows and 64 columns, which are whole in shared memory."""
    TYPE: gl.constexpr = tiles.dtype
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_R, _C], TYPE)
    return tiles._reinterpret(TYPE, [tiles.shape[0] * _PARTS * (tiles.shape[2] // _C), _R, _C], LAYOUT)


@gluon.jit
def _piece(tiles, t, i, c: gl.constexpr):
    """Rows 16 i to 16 i + 15 and columns 64 c to 64 c + 63 of tile t."""
    COLUMNS: gl.constexpr = tiles.shape[2] // _C
    return _pieces(tiles).index((t % tiles.shape[0] * COLUMNS + c) * _PARTS + i)


@gluon.jit
def _numbers(rows, which):
    """16 rows' numbers of an array that holds 64 rows' numbers in each line."""
    return rows._reinterpret(gl.float32, [rows.shape[0] * _PARTS, _R], rows.layout).index(which)


@gluon.jit
def _leave_first(first, t, tiles, full):
    """Wait for tile t; leave this head's share of sum(dO unit)."""
    factors, left_there, _ = first
    out_tiles, s_tiles, do_tiles = tiles
    PLACES: gl.constexpr = full.shape[0]
    mbarrier.wait(full.index(t % PLACES), t // PLACES & 1)
    for i in range(_PARTS):
        sum_RC = gl.full([_R, _C], 0.0, gl.float32, _PIECE)
        for c in gl.static_range(s_tiles.shape[2] // _C):
            out_RC = _piece(out_tiles, t, i, c).load(_PIECE).to(gl.float32)
            s_RC = _piece(s_tiles, t, i, c).load(_PIECE).to(gl.float32)
            sum_RC += (out_RC - s_RC) * _piece(do_tiles, t, i, c).load(_PIECE).to(gl.float32)
        _numbers(factors, i).store(gl.sum(sum_RC, 1))
    mbarrier.arrive(left_there, count=1)


@gluon.jit
def exchange_first(box, h, norms, first, news, D: gl.constexpr, H: gl.constexpr, AT_ONCE: gl.constexpr):
    """One warp: finds the factors that make dg and q of each row, zeros past the example's end."""
    factors, left_there, total_there = first
    m_M = gl.arange(0, ROWS, LANES)
    t = 0
    left, row = take(news, t, 2)
    while left > 0:
        at_M = norms + (row + m_M).to(gl.int64) * 3
        mean_M = gl.load(at_M, mask=m_M < left, other=0.0)
        rstd_M = gl.load(at_M + 1, mask=m_M < left, other=0.0)
        rms_M = gl.load(at_M + 2, mask=m_M < left, other=0.0)
        mbarrier.wait(left_there, t & 1)
        sum_M = total(box, h, t, factors.index(0).load(LANES), H, AT_ONCE)
        factors.index(0).store(sum_M * rms_M * (1.0 / (H * D)))
        factors.index(1).store(rms_M)
        factors.index(2).store(rstd_M)
        factors.index(3).store(mean_M * rstd_M)
        mbarrier.arrive(total_there, count=1)
        t += 1
        left, row = take(news, t, 2)


@gluon.jit
def _open_rows(first, t, tiles):
    """dg and q in the places of out and S."""
    factors, _, total_there = first
    out_tiles, s_tiles, do_tiles = tiles
    mbarrier.wait(total_there, t & 1)
    for i in range(_PARTS):
        along_R, rms_R = _numbers(factors, i).load(_ROW), _numbers(factors, 4 + i).load(_ROW)
        rstd_R, shift_R = _numbers(factors, 8 + i).load(_ROW), _numbers(factors, 12 + i).load(_ROW)
        made = ()
        for c in gl.static_range(s_tiles.shape[2] // _C):
            s_RC = _piece(s_tiles, t, i, c).load(_PIECE).to(gl.float32)
            unit_RC = _piece(out_tiles, t, i, c).load(_PIECE).to(gl.float32) - s_RC
            do_RC = _piece(do_tiles, t, i, c).load(_PIECE).to(gl.float32)
            q_RC = (s_RC * rstd_R[:, None] - shift_R[:, None]).to(s_tiles.dtype)
            dg_RC = (do_RC * rms_R[:, None] - unit_RC * along_R[:, None]).to(s_tiles.dtype)
            made = made + ((q_RC, dg_RC),)  # type: ignore[assignment]  # noqa: RUF005
        for c in gl.static_range(s_tiles.shape[2] // _C):
            _piece(s_tiles, t, i, c).store(made[c][0])
            _piece(out_tiles, t, i, c).store(made[c][1])


@gluon.jit
def add_dq(second, t, dq_MD, factor, rstd_M, tiles, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """GDPA's dQ of a group's columns joins dg and dO; leave the columns' share of the second sums, times rstd."""
    partial, left_there, _ = second
    out_tiles, s_tiles, do_tiles = tiles
    HALF: gl.constexpr = dq_MD.shape[1]
    dg = out_tiles.index(t % out_tiles.shape[0]).slice(GROUP * HALF, HALF, 1)
    q = s_tiles.index(t % s_tiles.shape[0]).slice(GROUP * HALF, HALF, 1)
    do = do_tiles.index(t % do_tiles.shape[0]).slice(GROUP * HALF, HALF, 1)
    dq_MD = (dq_MD * factor + dg.load(LAYOUT).to(gl.float32)) * rstd_M[:, None]
    partial.index(GROUP).store(gl.sum(dq_MD, 1))
    partial.index(2 + GROUP).store(gl.sum(dq_MD * q.load(LAYOUT).to(gl.float32), 1))
    do.store((dq_MD + do.load(LAYOUT).to(gl.float32)).to(do.dtype))
    mbarrier.arrive(left_there, count=1)


@gluon.jit
def exchange_second(
    box, h, second, news, D: gl.constexpr, H: gl.constexpr, WHICH: gl.constexpr, AT_ONCE: gl.constexpr
):  # fmt: skip
    """One warp: the sum of rstd dq of each row, or of rstd dq q, over W."""
    partial, left_there, total_there = second
    box += (1 + WHICH) * (TURNS * ROWS * H)
    t = 0
    (left,) = take(news, t, 1)
    while left > 0:
        mbarrier.wait(left_there, t & 1)
        share_M = partial.index(2 * WHICH).load(LANES) + partial.index(2 * WHICH + 1).load(LANES)
        sum_M = total(box, h, t, share_M, H, AT_ONCE)
        partial.index(2 * WHICH).store(sum_M * (1.0 / (H * D)))
        mbarrier.arrive(total_there, count=1)
        t += 1
        (left,) = take(news, t, 1)


@gluon.jit
def _close_rows(ds, ds_pointer, second, h, t, row, left, tiles, q_empty, D: gl.constexpr, H: gl.constexpr):
    """dS, stored from where dO was, or an example's last rows from the registers."""
    partial, _, total_there = second
    _, s_tiles, do_tiles = tiles
    mbarrier.wait(total_there, t & 1)
    for i in range(_PARTS):
        sum_R, along_R = _numbers(partial, i).load(_ROW), _numbers(partial, 8 + i).load(_ROW)
        made = ()
        for c in gl.static_range(D // _C):
            q_RC = _piece(s_tiles, t, i, c).load(_PIECE).to(gl.float32)
            dq_RC = _piece(do_tiles, t, i, c).load(_PIECE).to(gl.float32)
            ds_RC = dq_RC - sum_R[:, None] - q_RC * along_R[:, None]
            made = made + (ds_RC.to(s_tiles.dtype),)  # type: ignore[assignment]  # noqa: RUF005
        for c in gl.static_range(D // _C):
            if left >= ROWS:
                _piece(do_tiles, t, i, c).store(made[c])
            else:
                base = ds_pointer + row.to(gl.int64) * (H * D) + h * D + c * _C
                store_rows(base, made[c], i * _R, left, H * D, _PIECE)
    hopper.fence_async_shared()
    all_warps()
    mbarrier.arrive(q_empty.index(t % s_tiles.shape[0]), count=1)
    if left >= ROWS:
        store(ds, [row, h * D], do_tiles.index(t % do_tiles.shape[0]))


@gluon.jit
def row_group(
    ds, ds_pointer, h, tiles, full, q_empty, do_empty, ready, first, second, news, D: gl.constexpr, H: gl.constexpr
):  # fmt: skip
    """Four warps: leave a tile's first sums, close the tile that is two before it, open it; the tile between these is
    with the groups that make products."""
    PLACES: gl.constexpr = full.shape[0]
    t = 0
    row_1, left_1, row_2, left_2 = 0, 0, 0, 0  # of tiles t - 1 and t - 2
    left, row = take(news, t, 2)
    while left > 0:
        _leave_first(first, t, tiles, full)
        if left_2 > 0:
            _close_rows(ds, ds_pointer, second, h, t - 2, row_2, left_2, tiles, q_empty, D, H)
        _open_rows(first, t, tiles)
        hopper.fence_async_shared()
        all_warps()
        mbarrier.arrive(ready.index(t % 2), count=1)
        tma.store_wait(0)
        mbarrier.arrive(do_empty.index((t + PLACES - 2) % PLACES), count=1, pred=left_2 > 0)
        row_2, left_2, row_1, left_1 = row_1, left_1, row, left
        t += 1
        # Not earlier: it may come after an example's end, which comes after this tile is ready.
        left, row = take(news, t, 2)
    if left_2 > 0:
        _close_rows(ds, ds_pointer, second, h, t - 2, row_2, left_2, tiles, q_empty, D, H)
    # Totals of the tile before have been read: the last one's may take their place.
    mbarrier.arrive(ready.index(t % 2), count=1)
    if left_1 > 0:
        _close_rows(ds, ds_pointer, second, h, t - 1, row_1, left_1, tiles, q_empty, D, H)
    tma.store_wait(0)
