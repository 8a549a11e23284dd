"""How the programs of a team tell each other sums of rows, in Gluon: through words in the L2 cache.

A word is 64 bits that are written at once, a float32 and the turn it is of: who finds the turn has the number, and no
fence is needed. Turns follow one another in a ring of TURNS words: everyone reads all of a turn before posting what
follows from it, so nobody is two turns ahead. `zero` is 0 that changes in a loop for all the compiler knows: addresses
are then computed where they are used, and take no registers elsewhere.

Shape letters: M = 64 rows, H heads.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.hopper_ring import ROWS

TURNS = gl.constexpr(4)

# Several seconds; then the numbers are NaN. (With a trap in it ptxas gives the whole function half the registers.)
_MOST_POLLS = 1 << 24

_POST = gl.constexpr("{ .reg .b64 word; mov.b64 word, {$2, $3}; st.relaxed.gpu.global.b64 [$1], word; mov.b32 $0, 0; }")
_POST_PAIR = gl.constexpr(
    "{ .reg .b64 word<2>; mov.b64 word0, {$2, $4}; mov.b64 word1, {$3, $4};"
    " st.relaxed.gpu.global.v2.b64 [$1], {word0, word1}; mov.b32 $0, 0; }"
)


@gluon.constexpr_function
def _polling(words, numbers, heads):
    """Assembly that reads so many addresses of a thread, with 1 or 2 numbers each, until all have their turns' numbers.

    Operands: the first number of each address, then the second, then addresses and turns. All is asked for before any
    is looked at; a warp goes on when all its threads are served. In vain, a warp watches only its last row, which is
    written last: all rows' traffic would fill the L2 cache's lanes.
    """
    results = words * numbers
    asks, looks, places, watches, sights = [], [], [], [], []
    for i in range(words):
        names = [f"w{n * words + i}" for n in range(numbers)]
        target = "{" + ", ".join(names) + "}" if numbers == 2 else names[0]
        asks.append(f"ld.relaxed.gpu.global{'.v2' * (numbers == 2)}.b64 {target}, [${results + i}];")
        turn = f"${results + words + i}"
        for n, name in enumerate(names):
            looks.append(f"mov.b64 {{${n * words + i}, t}}, {name}; setp.eq.and.b32 p, t, {turn}, p;")
        if i % 2 == 0:  # the other one is 8 rows below
            places.append(f"mad.wide.u32 a{i}, below, {heads * numbers * 8}, ${results + i};")
            watches.append(f"ld.relaxed.gpu.global.b64 {names[0]}, [a{i}];")
            sights.append(f"mov.b64 {{u, t}}, {names[0]}; setp.eq.and.b32 p, t, {turn}, p;")
    together = "vote.sync.all.pred p, p, 0xffffffff;"
    return " ".join(
        ["{ .reg .pred p, q; .reg .b32 t, u, below, polls;"]
        + [f".reg .b64 w<{results}>, a<{words}>; mov.b32 polls, 0; setp.ne.b32 q, 0, 0;"]
        + ["mov.u32 below, %laneid; shr.u32 below, below, 2; sub.u32 below, 15, below;", *places]
        + ["again:", *asks, "setp.eq.b32 p, 0, 0;", *looks, "or.pred p, p, q;", together, "@p bra done;"]
        + ["watch:", *watches, "setp.eq.b32 p, 0, 0;", *sights]
        + [f"add.u32 polls, polls, 1; setp.gt.u32 q, polls, {_MOST_POLLS}; or.pred p, p, q;", together]
        + ["@p bra again; bra watch; done:"]
        + [f"@q mov.b32 ${i}, 0x7fffffff;" for i in range(results)]
        + ["}"]
    )


@gluon.constexpr_function
def _operands(words, numbers):
    return ",".join(["=&r"] * (words * numbers) + ["l"] * words + ["r"] * words)


@gluon.constexpr_function
def _padded(heads):
    return max(4, 1 << (heads - 1).bit_length())


@gluon.constexpr_function
def _layout(heads):
    """Four threads share a row, as in a product's result, and its heads."""
    more = [[0, 1 << i] for i in range(2, (heads - 1).bit_length())]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[8, 0], *more], lanes, [[16, 0], [32, 0]], [], [64, heads])


@gluon.constexpr_function
def heads_layout(heads):
    """Of what `read` returns."""
    return _layout(_padded(heads))


@gluon.jit
def _place(box, h, turn, row_M, H: gl.constexpr, NUMBERS: gl.constexpr):
    return box + (((turn & (TURNS - 1)) * ROWS + row_M) * H + h) * NUMBERS


@gluon.jit
def post(box, zero, h, turn, x_M, H: gl.constexpr):
    """Head h's number of each row."""
    LAYOUT: gl.constexpr = x_M.type.layout
    place_M = _place(box, h, turn, zero + gl.arange(0, ROWS, LAYOUT), H, 1)
    turn_M = gl.full([ROWS], 1, gl.int32, LAYOUT) + turn
    gl.inline_asm_elementwise(
        _POST, "=r,l,r,r", [place_M.to(gl.int64), x_M.to(gl.int32, bitcast=True), turn_M],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def post_pair(box, zero, h, turn, x_M, y_M, H: gl.constexpr):
    """Head h's two numbers of each row."""
    LAYOUT: gl.constexpr = x_M.type.layout
    place_M = _place(box, h, turn, zero + gl.arange(0, ROWS, LAYOUT), H, 2)
    turn_M = gl.full([ROWS], 1, gl.int32, LAYOUT) + turn
    gl.inline_asm_elementwise(
        _POST_PAIR, "=r,l,r,r,r",
        [place_M.to(gl.int64), x_M.to(gl.int32, bitcast=True), y_M.to(gl.int32, bitcast=True), turn_M],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _places(box, zero, turn, H: gl.constexpr, NUMBERS: gl.constexpr):
    LAYOUT: gl.constexpr = heads_layout(H)
    row_M = zero + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    head_H = gl.arange(0, _padded(H), gl.SliceLayout(0, LAYOUT))
    # Padding reads the last head's words.
    place_MH = _place(box, gl.minimum(head_H, H - 1)[None, :], turn, row_M[:, None], H, NUMBERS)
    return place_MH.to(gl.int64), gl.full([ROWS, _padded(H)], 1, gl.int32, LAYOUT) + turn


@gluon.jit
def _real(x_MH, H: gl.constexpr):
    head_H = gl.arange(0, x_MH.shape[1], gl.SliceLayout(0, x_MH.type.layout))
    return gl.where((head_H < H)[None, :], x_MH.to(gl.float32, bitcast=True), 0.0)


@gluon.jit
def read(box, zero, turn, H: gl.constexpr):
    """All heads' numbers of each row, in columns; zeros in those past H."""
    place_MH, turn_MH = _places(box, zero, turn, H, 1)
    WORDS: gl.constexpr = _padded(H) // 2
    x_MH = gl.inline_asm_elementwise(
        _polling(WORDS, 1, H), _operands(WORDS, 1), [place_MH, turn_MH], dtype=gl.int32, is_pure=False, pack=WORDS
    )
    return _real(x_MH, H)


@gluon.jit
def read_pair(box, zero, turn, H: gl.constexpr):
    """As `read`, both numbers."""
    place_MH, turn_MH = _places(box, zero, turn, H, 2)
    WORDS: gl.constexpr = _padded(H) // 2
    x_MH, y_MH = gl.inline_asm_elementwise(
        _polling(WORDS, 2, H), _operands(WORDS, 2), [place_MH, turn_MH],
        dtype=(gl.int32, gl.int32), is_pure=False, pack=WORDS,
    )  # fmt: skip
    return _real(x_MH, H), _real(y_MH, H)
