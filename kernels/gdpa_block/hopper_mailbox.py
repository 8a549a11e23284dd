"""How the programs of a team tell each other sums of rows, in Gluon: through words in the L2 cache.

A word is 64 bits that are written at once, a float32 and the turn it is of: who finds the turn has the number, and no
fence is needed. Turns follow one another in a ring of TURNS words: everyone reads all of a turn before posting what
follows from it, so nobody is two turns ahead. `zero` is 0 that changes in a loop for all the compiler knows: addresses
are then computed where they are used, and take no registers elsewhere. What is asked for early (`ask`) is on its way
while other work is done.

Shape letters: M = 64 rows, H heads, or more shares of a row, G shares that one program posts.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.hopper_ring import ROWS

TURNS = gl.constexpr(4)
GROUPS = gl.constexpr(2)  # of four warps in a program; each posts its columns', or its rows', share

# Several seconds; then the numbers are NaN. (With a trap in it ptxas gives the whole function half the registers.)
MOST_POLLS = 1 << 24

_POST = gl.constexpr("{ .reg .b64 word; mov.b64 word, {$2, $3}; st.relaxed.gpu.global.b64 [$1], word; mov.b32 $0, 0; }")
_POST_PAIR = gl.constexpr(
    "{ .reg .b64 word<2>; mov.b64 word0, {$2, $4}; mov.b64 word1, {$3, $4};"
    " st.relaxed.gpu.global.v2.b64 [$1], {word0, word1}; mov.b32 $0, 0; }"
)


@gluon.constexpr_function
def _polling(words, numbers, heads, is_asked=False):
    """Assembly that reads so many addresses of a thread, with 1 or 2 numbers each, until all have their turns' numbers.

    Operands: the first number of each address, then the second, then addresses and turns, and if `is_asked` what was
    found there before. All is asked for before any is looked at; a warp goes on when all its threads are served. In
    vain, a warp watches only its last row, which is written last: all rows' traffic would fill the L2 cache's lanes.
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
    asked = [f"mov.b64 w{i}, ${results + 2 * words + i};" for i in range(results)]
    first, look = ([*asked, "bra look;"], "look: ") if is_asked else ([], "")
    together = "vote.sync.all.pred p, p, 0xffffffff;"
    return " ".join(
        ["{ .reg .pred p, q; .reg .b32 t, u, below, polls;"]
        + [f".reg .b64 w<{results}>, a<{words}>; mov.b32 polls, 0; setp.ne.b32 q, 0, 0;"]
        + ["mov.u32 below, %laneid; shr.u32 below, below, 2; sub.u32 below, 15, below;", *places]
        + [*first, "again:", *asks, f"{look}setp.eq.b32 p, 0, 0;", *looks, "or.pred p, p, q;", together, "@p bra done;"]
        + ["watch:", *watches, "setp.eq.b32 p, 0, 0;", *sights]
        + [f"add.u32 polls, polls, 1; setp.gt.u32 q, polls, {MOST_POLLS}; or.pred p, p, q;", together]
        + ["@p bra again; bra watch; done:"]
        + [f"@q mov.b32 ${i}, 0x7fffffff;" for i in range(results)]
        + ["}"]
    )


@gluon.constexpr_function
def _operands(words, numbers, is_asked=False):
    asked = ["l"] * (words * numbers * is_asked)
    return ",".join(["=&r"] * (words * numbers) + ["l"] * words + ["r"] * words + asked)


@gluon.constexpr_function
def _asking(words, numbers):
    """Assembly that reads each address of a thread once, for its first words and then its second ones."""
    if numbers == 1:
        return " ".join(f"ld.relaxed.gpu.global.b64 ${i}, [${words + i}];" for i in range(words))
    return " ".join(f"ld.relaxed.gpu.global.v2.b64 {{${i}, ${words + i}}}, [${2 * words + i}];" for i in range(words))


@gluon.constexpr_function
def _asked(words, numbers):
    return ",".join(["=&l"] * (words * numbers) + ["l"] * words)


@gluon.constexpr_function
def _padded(heads):
    return max(4, 1 << (heads - 1).bit_length())


@gluon.constexpr_function
def _heads_layout(heads, warps):
    """Of what `read` returns: four threads share a row, as in a product's result, and its heads. Of eight warps, both
    halves have all rows."""
    heads = _padded(heads)
    more = [[0, 1 << i] for i in range(2, (heads - 1).bit_length())]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    of_warps = [[16, 0], [32, 0], [0, 0]][: warps.bit_length() - 1]
    return gl.DistributedLinearLayout([[8, 0], *more], lanes, of_warps, [], [64, heads])


@gluon.jit
def own_place(box, h, turn, row_M, H: gl.constexpr, NUMBERS: gl.constexpr):
    return box + (((turn & (TURNS - 1)) * ROWS + row_M) * H + h) * NUMBERS


@gluon.jit
def _own(box, zero, h, turn, x, H: gl.constexpr, NUMBERS: gl.constexpr):
    """Places and turns of head h's numbers, (M,) or (M, G)."""
    LAYOUT: gl.constexpr = x.type.layout
    if len(x.shape) == 1:
        place = own_place(box, h, turn, zero + gl.arange(0, ROWS, LAYOUT), H, NUMBERS)
    else:
        row_M = zero + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        share_G = h * x.shape[1] + gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
        place = own_place(box, share_G[None, :], turn, row_M[:, None], H, NUMBERS)
    return place.to(gl.int64), gl.full(x.shape, 1, gl.int32, LAYOUT) + turn


@gluon.jit
def sums_by_group(x_MD):
    """Of each row, by groups of columns."""
    return gl.sum(x_MD.reshape([ROWS, GROUPS, x_MD.shape[1] // GROUPS]), 2)


@gluon.jit
def post(box, zero, h, turn, x, H: gl.constexpr):
    """Head h's number of each row; or some, of as many shares each."""
    place, turns = _own(box, zero, h, turn, x, H, 1)
    gl.inline_asm_elementwise(
        _POST, "=r,l,r,r", [place, x.to(gl.int32, bitcast=True), turns], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def post_pair(box, zero, h, turn, x, y, H: gl.constexpr):
    """As `post`, two numbers."""
    place, turns = _own(box, zero, h, turn, x, H, 2)
    gl.inline_asm_elementwise(
        _POST_PAIR, "=r,l,r,r,r", [place, x.to(gl.int32, bitcast=True), y.to(gl.int32, bitcast=True), turns],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _places(box, zero, turn, H: gl.constexpr, NUMBERS: gl.constexpr):
    LAYOUT: gl.constexpr = _heads_layout(H, gl.num_warps())
    row_M = zero + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    head_H = gl.arange(0, _padded(H), gl.SliceLayout(0, LAYOUT))
    # Padding reads the last head's words.
    place_MH = own_place(box, gl.minimum(head_H, H - 1)[None, :], turn, row_M[:, None], H, NUMBERS)
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


@gluon.jit
def ask(box, zero, turn, H: gl.constexpr):
    """What is there now of all heads' numbers, for `read_asked`; this is not waited for."""
    place_MH, _ = _places(box, zero, turn, H, 1)
    WORDS: gl.constexpr = _padded(H) // 2
    return gl.inline_asm_elementwise(
        _asking(WORDS, 1), _asked(WORDS, 1), [place_MH], dtype=gl.int64, is_pure=False, pack=WORDS
    )


@gluon.jit
def ask_pair(box, zero, turn, H: gl.constexpr):
    """As `ask`, both numbers, for `read_pair_asked`."""
    place_MH, _ = _places(box, zero, turn, H, 2)
    WORDS: gl.constexpr = _padded(H) // 2
    return gl.inline_asm_elementwise(
        _asking(WORDS, 2), _asked(WORDS, 2), [place_MH], dtype=(gl.int64, gl.int64), is_pure=False, pack=WORDS
    )


@gluon.jit
def read_asked(asked_MH, box, zero, turn, H: gl.constexpr):
    """As `read`, after `ask`, if that was early enough at once."""
    place_MH, turn_MH = _places(box, zero, turn, H, 1)
    WORDS: gl.constexpr = _padded(H) // 2
    x_MH = gl.inline_asm_elementwise(
        _polling(WORDS, 1, H, True), _operands(WORDS, 1, True), [place_MH, turn_MH, asked_MH],
        dtype=gl.int32, is_pure=False, pack=WORDS,
    )  # fmt: skip
    return _real(x_MH, H)


@gluon.jit
def read_pair_asked(asked, box, zero, turn, H: gl.constexpr):
    """As `read_pair`, after `ask_pair`."""
    place_MH, turn_MH = _places(box, zero, turn, H, 2)
    WORDS: gl.constexpr = _padded(H) // 2
    x_MH, y_MH = gl.inline_asm_elementwise(
        _polling(WORDS, 2, H, True), _operands(WORDS, 2, True), [place_MH, turn_MH, asked[0], asked[1]],
        dtype=(gl.int32, gl.int32), is_pure=False, pack=WORDS,
    )  # fmt: skip
    return _real(x_MH, H), _real(y_MH, H)
