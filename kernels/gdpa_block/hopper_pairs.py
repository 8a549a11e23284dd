"""Row work on tiles of bf16 as pairs: two numbers of neighboring columns in 32 bits, in Gluon.

A tile in shared memory is read as int32 with half the columns, in the registers that a matrix instruction's factor has:
an instruction takes two numbers, and the tensor cores add up rows. A factor of a row is two bf16, the second what the
first one lacks: products with both are rounded once.

Shape letters: M = 64 rows, C = 64 pairs of columns, G = 2 groups of four warps, each with half of the columns.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.hopper_ring import ROWS

_COLUMNS = 64
# As a product's result of eight warps, that is four by two, 16 rows each.
PAIRS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8], [0, 16]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 32]],
        [],
        [64, _COLUMNS],
    )
)
PAIR_ROW = gl.constexpr(gl.SliceLayout(1, PAIRS.value))
_NUMBERS = gl.constexpr(16)  # registers of a thread: rows g and g + 8 of its warp's 16 in turns


@gluon.jit
def as_pairs(tiles):
    """The same shared memory."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    return tiles._reinterpret(gl.int32, [tiles.shape[0], tiles.shape[1], tiles.shape[2] // 2], LAYOUT)


@gluon.jit
def _each(ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, args):
    return gl.inline_asm_elementwise(ASM, CONSTRAINTS, args, dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def subtract(a_MC, b_MC):
    return _each("sub.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a_MC, b_MC])


@gluon.jit
def add_pairs(a_MC, b_MC):
    return _each("add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a_MC, b_MC])


@gluon.jit
def fused(a_MC, b_MC, c_MC):
    """a b + c."""
    return _each("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a_MC, b_MC, c_MC])


@gluon.jit
def multiply(a_MC, b_MC):
    return _each("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a_MC, b_MC])


@gluon.jit
def both(low, high):
    """Two float32 rounded, as a pair."""
    return _each("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high])


@gluon.jit
def scaled(x_MC, factor, shift):
    """x factor + shift, of float32 factors and rounded once."""
    return _each(
        "{ .reg .b32 a, b; shl.b32 a, $1, 16; and.b32 b, $1, 0xffff0000; fma.rn.f32 a, a, $2, $3;"
        " fma.rn.f32 b, b, $2, $3; cvt.rn.bf16x2.f32 $0, b, a; }",
        "=r,r,f,f",
        [x_MC, factor, shift],
    )


@gluon.jit
def scaled_sum(low_MC, high_MC, factor, x_MC):
    """Float32 numbers times a factor, and x; rounded once."""
    return _each(
        "{ .reg .b32 a, b; shl.b32 a, $4, 16; and.b32 b, $4, 0xffff0000; fma.rn.f32 a, $1, $3, a;"
        " fma.rn.f32 b, $2, $3, b; cvt.rn.bf16x2.f32 $0, b, a; }",
        "=r,f,f,f,r",
        [low_MC, high_MC, factor, x_MC],
    )


@gluon.jit
def low_of(x_MC):
    return (x_MC << 16).to(gl.float32, bitcast=True)


@gluon.jit
def high_of(x_MC):
    return (x_MC & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def halves(x_MD):
    """A product's result as its even and its odd columns."""
    low_MC, high_MC = gl.split(x_MD.reshape([ROWS, x_MD.shape[1] // 2, 2]))
    return gl.convert_layout(low_MC, PAIRS, True), gl.convert_layout(high_MC, PAIRS, True)


@gluon.jit
def whole(low_MC, high_MC, LAYOUT: gl.constexpr):
    """As `halves`, back."""
    x_MD = gl.join(low_MC, high_MC).reshape([ROWS, 2 * low_MC.shape[1]])
    return gl.convert_layout(x_MD, LAYOUT, True)


@gluon.constexpr_function
def _posting(numbers):
    """Assembly that posts each row's sum(a b), or sum(a) and sum(a b): words of a number and its turn.

    A product of a with b transposed has the sums on its diagonal: of each 16 rows, those of 8 in the first and the
    others' in the second. The thread that holds a row's posts it. Operands: the result, 0, and a, b, places, turns.
    """
    n, ones = _NUMBERS.value, "0x3f803f80"
    chains = ["x", "y", "z"][: numbers + 1]
    code = ["{ .reg .pred is_odd, holds; .reg .b32 lane, g, one;"]
    code += [f".reg .f32 {c}<4>;" for c in chains] + [f"mov.f32 {c}{i}, 0f00000000;" for c in chains for i in range(4)]
    code += [f"mov.b32 one, {ones};"]
    for i in range(n, 2 * n, 4):  # of a
        a = ", ".join(f"${i + j}" for j in range(4))
        factors = [f"${i + n}, ${i + n + 2}", f"${i + n + 1}, ${i + n + 3}", "one, one"]
        for c, b in zip(chains, factors, strict=False):
            to = ", ".join(f"{c}{j}" for j in range(4))
            code += [f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{to}}}, {{{a}}}, {{{b}}}, {{{to}}};"]
    # Thread 4 g + c has columns 2 c and 2 c + 1 of rows g and g + 8.
    code += ["mov.u32 lane, %laneid; shr.u32 g, lane, 2; and.b32 lane, lane, 3;"]
    code += ["and.b32 one, g, 1; setp.ne.b32 is_odd, one, 0; shr.u32 g, g, 1; setp.eq.b32 holds, g, lane;"]
    code += ["selp.f32 x0, x1, x0, is_odd; selp.f32 y2, y3, y2, is_odd;", ".reg .b64 word<2>;"]
    for row, along in ((0, "x0"), (1, "y2")):
        place, turn = f"${3 * n + row}", f"${4 * n + row}"
        if numbers == 2:
            code += [f"mov.b64 word0, {{z{2 * row}, {turn}}}; mov.b64 word1, {{{along}, {turn}}};"]
            code += [f"@holds st.relaxed.gpu.global.v2.b64 [{place}], {{word0, word1}};"]
        else:
            code += [f"mov.b64 word0, {{{along}, {turn}}}; @holds st.relaxed.gpu.global.b64 [{place}], word0;"]
    return " ".join([*code, *(f"mov.b32 ${i}, 0;" for i in range(n)), "}"])


@gluon.constexpr_function
def _operands():
    n = _NUMBERS.value
    return ",".join(["=r"] * n + ["r"] * (2 * n) + ["l"] * n + ["r"] * n)


@gluon.jit
def post_sums(place_M, turn_M, a_MC, b_MC, NUMBERS: gl.constexpr):
    """Post each group's share of sum(a b) of each row, or (NUMBERS = 2) of sum(a) and that.

    place_M: addresses of a row's words, those of the first group.
    """
    group_C = gl.arange(0, a_MC.shape[1], gl.SliceLayout(0, PAIRS)) // (a_MC.shape[1] // 2)
    place_MC = place_M[:, None] + group_C[None, :] * NUMBERS
    gl.inline_asm_elementwise(
        _posting(NUMBERS), _operands(), [a_MC, b_MC, place_MC.to(gl.int64), turn_M[:, None]],
        dtype=gl.int32, is_pure=False, pack=_NUMBERS,
    )  # fmt: skip


@gluon.jit
def as_factor(x_M):
    """A float32 of each row as two pairs, whose sum it is to 16 bits."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 h; .reg .f32 f; cvt.rn.bf16x2.f32 $0, $2, $2; and.b32 h, $0, 0xffff0000; sub.f32 f, $2, h;"
        " cvt.rn.bf16x2.f32 $1, f, f; }",
        "=&r,=r,f", [x_M], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
