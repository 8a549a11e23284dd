"""What the warp-specialized kernels on Hopper share, in Gluon: one warp has tiles copied, groups of four warps compute.

`produce`, `pass_by` and `allocate` are of GDPA's and softmax attention's forward alone, and so is what follows.

Shape letters: H heads, D head width, N rows of a key tile. An item is an example and a head, or after the first
`num_whole` one of `num_parts` that share out its query tiles. These are taken one after another, GROUPS x 64 rows, 64
to a group; for each, all key tiles pass by in a ring of stages that all groups read. The groups are not in step: while
one computes weights, others have products in flight. A program that is done with an item takes another off a counter.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Renamed in Triton 3.7 and 3.8.
all_warps = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_SUM = ir.DESCRIPTOR_REDUCE_KIND.ADD

ROWS = gl.constexpr(64)  # of a group: what one matrix instruction takes
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def key_range(m, rows, length, window, N: gl.constexpr, WINDOW: gl.constexpr):
    """Keys that rows [m, m + rows) meet: at least one tile, if of masked keys, so that every row has a result."""
    lo = 0
    hi = length
    if WINDOW:
        lo = gl.maximum(gl.minimum(m - window, length - 1), 0) // N * N
        hi = gl.minimum(m + rows + window, length)
    return lo, gl.maximum(hi, lo + 1)


@gluon.jit
def copy_in(x, row, column, full, tile, pred):
    """Start the copy of a tile; barrier `full` completes when it is there."""
    BYTES: gl.constexpr = tile.shape[0] * tile.shape[1] * (x.dtype.primitive_bitwidth // 8)
    mbarrier.expect(full, BYTES, pred=pred)
    _load(x, [row, column], full, tile, pred=pred)


@builtin
def add(x, coordinates, tile, _semantic=None):
    """Start adding a tile in shared memory to x, in the L2 cache. Gluon has no name for it yet."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(_SUM, x.handle, coordinates, tile.handle)


@gluon.jit
def put(place, number):
    """An integer for other warps, in a shared tile of one."""
    place.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])) + number)


@gluon.jit
def get(place):
    return gl.max(place.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def barriers_of(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """New ones, that COUNT arrivals complete.

    Make none that nobody waits for: Triton takes its place for something else, which the barrier may overwrite later.
    """
    barriers = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@gluon.jit
def news_of(SLOTS: gl.constexpr, WORDS: gl.constexpr, READERS: gl.constexpr):
    """Shared places for SLOTS announcements of WORDS integers, and for each two barriers: it is there, and all READERS
    have read it."""
    places = gl.allocate_shared_memory(gl.int32, [WORDS * SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return places, barriers_of(SLOTS, 1), barriers_of(SLOTS, READERS)


@gluon.jit
def announce(numbers, news, at):
    """Tell the groups some integers, for the at-th time."""
    places, full, empty = news
    SLOTS: gl.constexpr = full.shape[0]
    WORDS: gl.constexpr = places.shape[0] // SLOTS
    slot = at % SLOTS
    mbarrier.wait(empty.index(slot), (at // SLOTS & 1) ^ 1)
    for i in gl.static_range(len(numbers)):
        put(places.index(slot * WORDS + i), numbers[i])
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def take(news, at, COUNT: gl.constexpr):
    """The COUNT integers of the at-th announcement."""
    places, full, empty = news
    SLOTS: gl.constexpr = full.shape[0]
    WORDS: gl.constexpr = places.shape[0] // SLOTS
    slot = at % SLOTS
    mbarrier.wait(full.index(slot), at // SLOTS & 1)
    numbers = ()
    for i in gl.static_range(COUNT):
        numbers = numbers + (get(places.index(slot * WORDS + i)),)  # type: ignore[assignment]  # noqa: RUF005
    all_warps()  # have read
    mbarrier.arrive(empty.index(slot), count=1)
    return numbers


@gluon.jit
def example(turn, num_examples, offsets):
    """The example that is taken in a turn: as they come, but the last 32 longest first, so that programs end together.

    Not all of them: long examples keep the tensor cores busy and short ones the memory, so they had better be mixed.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    b = turn
    tail = gl.maximum(num_examples - 32, 0)
    if turn >= tail:
        lane = gl.arange(0, 32, LAYOUT)
        exists = tail + lane < num_examples
        first = gl.load(offsets + tail + lane, mask=exists, other=0)
        length = gl.load(offsets + tail + lane + 1, mask=exists, other=-1) - first
        key = gl.minimum(length, 2**26 - 1) * 32 + (31 - lane)  # no two are alike
        next_key = gl.max(key, 0)
        for _ in range(turn - tail):
            next_key = gl.max(gl.where(key < next_key, key, -(2**31)), 0)
        b = tail + 31 - (next_key & 31)
    return b


@gluon.jit
def produce(
    q, k, v, q_offsets, kv_offsets, counter, num_items, num_whole, num_parts, num_heads, num_q_each, num_kv_each,
    window, tiles, barriers, news,
    stride_qh: gl.constexpr, stride_kh: gl.constexpr, stride_vh: gl.constexpr,
    GROUPS: gl.constexpr, SHARED: gl.constexpr, JAGGED: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """The warp that takes items and has their tiles copied, as far ahead as there is room.

    SHARED: the same `num_q_each` queries serve every example; else they are jagged. JAGGED: keys are; else every
    example has `num_kv_each`. A part's queries end where the next part's begin. `counter` is two int32 that are 0
    before and after the kernel.
    """
    q_tiles, k_tiles, v_tiles, _ = tiles
    q_full, q_empty, k_full, v_full, empty = barriers
    Q_SLOTS: gl.constexpr = q_tiles.shape[0] // GROUPS
    SLOTS: gl.constexpr = k_tiles.shape[0]
    N: gl.constexpr = k_tiles.shape[1]
    tile = 0  # query tiles so far
    at = 0  # key tiles so far
    count = 0  # items so far
    offsets = kv_offsets if SHARED else q_offsets
    num_examples = num_items // num_heads
    if num_parts > 1:
        num_examples = (num_whole + (num_items - num_whole) // num_parts) // num_heads
    item = gl.program_id(0)
    while item < num_items:
        pair, part = item, 0
        if num_parts > 1:
            rest = gl.maximum(item - num_whole, 0)
            pair = gl.minimum(item, num_whole) + rest // num_parts
            part = rest % num_parts
        b, h = example(pair // num_heads, num_examples, offsets), pair % num_heads
        q_first, first, num_q = b * 0, b * num_q_each, num_q_each
        if not SHARED:
            first = gl.load(q_offsets + b)
            q_first, num_q = first, gl.load(q_offsets + b + 1) - first
        kv_first, length = b * num_kv_each, num_kv_each
        if JAGGED:
            kv_first = gl.load(kv_offsets + b)
            length = gl.load(kv_offsets + b + 1) - kv_first
        m_first = 0
        if num_parts > 1:
            share = gl.cdiv(num_q, GROUPS * ROWS * gl.where(item < num_whole, 1, num_parts)) * (GROUPS * ROWS)
            m_first = part * share
            num_q = gl.minimum(num_q, m_first + share)
        announce((item, h, first, num_q, length, m_first), news, count)
        for m in range(m_first, num_q, GROUPS * ROWS):
            slot = tile % Q_SLOTS
            mbarrier.wait(q_empty.index(slot), (tile // Q_SLOTS & 1) ^ 1)
            for group in gl.static_range(GROUPS):
                row = m + group * ROWS
                full = q_full.index(slot * GROUPS + group)
                mbarrier.arrive(full, count=1, pred=row >= num_q)
                copy_in(q, q_first + row, h * stride_qh, full, q_tiles.index(slot * GROUPS + group), row < num_q)
            tile += 1
            lo, hi = key_range(m, GROUPS * ROWS, length, window, N, WINDOW)
            for n in range(lo, hi, N):
                slot = at % SLOTS
                mbarrier.wait(empty.index(slot), (at // SLOTS & 1) ^ 1)
                copy_in(k, kv_first + n, h * stride_kh, k_full.index(slot), k_tiles.index(slot), True)
                copy_in(v, kv_first + n, h * stride_vh, v_full.index(slot), v_tiles.index(slot), True)
                at += 1
        # Not before this item's last copies are on their way: a program that is busy must not hold a second one.
        item = gl.atomic_add(counter, 1) + gl.num_programs(0)
        count += 1
    announce((item, 0, 0, 0, 0, 0), news, count)
    give_back(counter)


@gluon.jit
def give_back(counter):
    """Called when there are no items left: the last program to come here leaves both counts as it found them."""
    if gl.atomic_add(counter + 1, 1) == gl.num_programs(0) - 1:
        gl.store(counter, 0)
        gl.store(counter + 1, 0)


@gluon.jit
def start_step(queries, p, s_MN, o, k_tiles, v_tiles, k_full, v_full, at, is_first):
    """Start the scores of the key tile after `at`, whose registers `s_MN` lends, and add P times the values at `at`."""
    SLOTS: gl.constexpr = k_tiles.shape[0]
    mbarrier.wait(k_full.index((at + 1) % SLOTS), (at + 1) // SLOTS & 1)
    keys = k_tiles.index((at + 1) % SLOTS).permute((1, 0))
    s = hopper.warpgroup_mma(queries, keys, s_MN, use_acc=False, is_async=True)
    return s, add_values(p, o, v_tiles, v_full, at, is_first)


@gluon.jit
def add_values(p, o, v_tiles, v_full, at, is_first):
    """Start adding P times the values at `at`."""
    SLOTS: gl.constexpr = v_tiles.shape[0]
    mbarrier.wait(v_full.index(at % SLOTS), at // SLOTS & 1)
    return hopper.warpgroup_mma(p, v_tiles.index(at % SLOTS), o, use_acc=not is_first, is_async=True)


@gluon.jit
def pass_by(at, count, k_full, v_full, empty):
    """Let `count` key tiles pass that this group does not need."""
    SLOTS: gl.constexpr = empty.shape[0]
    for _ in range(count):
        slot = at % SLOTS
        mbarrier.wait(k_full.index(slot), at // SLOTS & 1)
        mbarrier.wait(v_full.index(slot), at // SLOTS & 1)
        mbarrier.arrive(empty.index(slot), count=1)
        at += 1
    return at


@gluon.jit
def store_rows(base, x, row, limit, stride: gl.constexpr, LAYOUT: gl.constexpr):
    """Those of x that are before row `limit`, from the registers; row r is at base + r * stride."""
    r = row + gl.arange(0, x.shape[0], gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    gl.store(base + (r[:, None] * stride + d[None, :]), x.to(base.dtype.element_ty), mask=(r < limit)[:, None])


@gluon.jit
def store_tile(x_MD, out, base, column, staged, first, m, num_q, stride: gl.constexpr, LAYOUT: gl.constexpr):
    """A whole tile through shared memory and the copy engine, an example's last rows from the registers."""
    if m + staged.shape[0] <= num_q:
        staged.store(x_MD.to(staged.dtype))
        hopper.fence_async_shared()
        store(out, [first + m, column], staged)
    else:
        store_rows(base, x_MD, m, num_q, stride, LAYOUT)


@gluon.jit
def allocate(q, k, out, D: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, GROUPS: gl.constexpr):
    """The tiles, the barriers and what `announce` writes to, for two query tiles and SLOTS stages of keys and values.

    All is allocated before any barrier is initialized: in turns, Triton puts 8 to 16 more block barriers into a kernel.
    """
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(q.dtype, [2 * GROUPS, ROWS, D], q.layout)
    o_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS, ROWS, D], out.layout)
    k_tiles = gl.allocate_shared_memory(q.dtype, [SLOTS, BLOCK_N, D], k.layout)
    v_tiles = gl.allocate_shared_memory(q.dtype, [SLOTS, BLOCK_N, D], k.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2 * GROUPS, 1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    items = gl.allocate_shared_memory(gl.int32, [16, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(2 * GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(q_empty.index(i), count=GROUPS)
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=GROUPS)
    for i in gl.static_range(SLOTS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    hopper.fence_async_shared()
    tiles = (q_tiles, k_tiles, v_tiles, o_tiles)
    barriers = (q_full, q_empty, k_full, v_full, empty)
    return tiles, barriers, (items, item_full, item_empty)
