"""A warp that exchanges sums of rows with the programs of its team, in Gluon: through words in the L2 cache.

As in `hopper_mailbox` a word is a float32 and the turn it is of, written at once, and turns follow one another in a
ring. Here groups leave their program's sums in shared memory, and a warp posts them, waits for the other heads' and
leaves the totals. It watches one word a head, so as not to fill the L2 cache's lanes; words of a head's rows follow one
another.

Shape letters: M = 64 rows, H heads.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.gdpa_block.hopper_mailbox import MOST_POLLS, TURNS
from kernels.hopper_ring import ROWS

# A thread has two rows that follow one another: 16 bytes.
LANES = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))

_POST = gl.constexpr(
    "{ .reg .b64 word<2>; mov.b64 word0, {$4, $6}; mov.b64 word1, {$5, $6};"
    " st.relaxed.gpu.global.v2.b64 [$2], {word0, word1}; mov.b32 $0, 0; mov.b32 $1, 0; }"
)


@gluon.constexpr_function
def _gathering(heads, at_once):
    """Assembly that adds up two rows' numbers of all heads, in order. `at_once`: loads in flight, of 4 registers."""
    code = ["{ .reg .pred p, q; .reg .b32 t, x, lane, polls; .reg .f32 f; .reg .b64 a;"]
    code += [f".reg .b64 w<{2 * at_once}>; mov.b32 polls, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000;"]
    # Each lane watches the last row of a head.
    code += [f"mov.u32 lane, %laneid; mad.wide.s32 a, lane, -16, $2; rem.u32 lane, lane, {heads};"]
    code += [f"mad.wide.u32 a, lane, {8 * 64}, a;"]
    code += [f"watch: ld.relaxed.gpu.global.b64 w0, [a + {8 * 63}]; mov.b64 {{x, t}}, w0; setp.eq.b32 p, t, $4;"]
    code += [f"add.u32 polls, polls, 1; setp.gt.u32 q, polls, {MOST_POLLS}; or.pred p, p, q;"]
    code += ["vote.sync.all.pred p, p, 0xffffffff; @!p bra watch;"]
    for first in range(0, heads, at_once):
        some = range(min(at_once, heads - first))
        code.append(f"again{first}:")
        code += [f"ld.relaxed.gpu.global.v2.b64 {{w{2 * i}, w{2 * i + 1}}}, [$2 + {(first + i) * 512}];" for i in some]
        code.append("setp.eq.b32 p, 0, 0;")
        code += [f"mov.b64 {{x, t}}, w{i}; setp.eq.and.b32 p, t, $4, p;" for i in range(2 * len(some))]
        code.append(f"add.u32 polls, polls, 1; setp.gt.u32 q, polls, {MOST_POLLS}; or.pred p, p, q;")
        code.append(f"vote.sync.all.pred p, p, 0xffffffff; @!p bra again{first};")
        code += [f"mov.b64 {{x, t}}, w{i}; mov.b32 f, x; add.f32 ${i % 2}, ${i % 2}, f;" for i in range(2 * len(some))]
    return " ".join([*code, "@q mov.b32 $0, 0x7fffffff; @q mov.b32 $1, 0x7fffffff; }"])


@gluon.jit
def total(box, h, turn, x_M, H: gl.constexpr, AT_ONCE: gl.constexpr):
    """The sum over heads of each row's number, of which x_M is head h's."""
    place_M = box + (turn & (TURNS - 1)) * (H * ROWS) + gl.arange(0, ROWS, LANES)
    turn_M = gl.full([ROWS], 1, gl.int32, LANES) + turn
    gl.inline_asm_elementwise(
        _POST, "=r,=r,l,l,r,r,r,r", [(place_M + h * ROWS).to(gl.int64), x_M.to(gl.int32, bitcast=True), turn_M],
        dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    return gl.inline_asm_elementwise(
        _gathering(H, AT_ONCE), "=&f,=&f,l,l,r,r", [place_M.to(gl.int64), turn_M],
        dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip
