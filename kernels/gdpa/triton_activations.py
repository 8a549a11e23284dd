"""Activations of GDPA inside a Triton kernel: `outer act(inner r)` of a raw score r, and with it the derivative.

All share two rules: act(0) = 0 exactly, so rows past an example's end, read as zeros, add nothing; and value and
derivative come from one transcendental. APPROX takes the hardware's tanh (relative error 2^-11, below bf16's 2^-9).
"""

# mypy: disable-error-code="no-untyped-def"
# Device code: Triton gives the arguments their types at launch.
from __future__ import annotations

import triton
import triton.language as tl

_ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_HALF_OVER_PI = tl.constexpr(0.3989422804014327)
_LEAK = tl.constexpr(0.01)


@triton.jit
def _tanh(x, APPROX: tl.constexpr):
    if APPROX:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    # 1 - 2 / (e^2x + 1) neither overflows to NaN nor loses the sign; near 0 it cancels, to an absolute 1e-7.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def activate(r, inner, outer, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """outer * act(inner * r)."""
    if ACTIVATION == "identity":
        return r * (inner * outer)
    elif ACTIVATION == "gelu_tanh":
        linear = _ROOT_2_OVER_PI * inner
        half = r * (0.5 * inner * outer)
        t = _tanh(r * (r * r * (linear * _CUBIC * inner * inner) + linear), APPROX)
        return half * t + half
    elif ACTIVATION == "silu":
        half = r * (0.5 * inner * outer)
        return half * _tanh(r * (0.5 * inner), APPROX) + half
    elif ACTIVATION == "gelu":
        half = r * (0.5 * inner * outer)
        return half * tl.erf(r * (inner * _ROOT_HALF)) + half
    elif ACTIVATION == "relu":
        return tl.maximum(r * inner, 0.0) * outer
    elif ACTIVATION == "relu_square":
        x = tl.maximum(r * inner, 0.0)
        return x * x * outer
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        x = r * inner
        return tl.where(x > 0.0, x, x * _LEAK) * outer


@triton.jit
def activate_bare(r, inner, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """act(inner * r), but for a factor that all of a tensor have in common: a multiplication less for each."""
    if ACTIVATION == "gelu_tanh":
        linear = _ROOT_2_OVER_PI * inner
        return r * _tanh(r * (r * r * (linear * _CUBIC * inner * inner) + linear), APPROX) + r
    elif ACTIVATION == "silu":
        return r * _tanh(r * (0.5 * inner), APPROX) + r
    elif ACTIVATION == "gelu":
        return r * tl.erf(r * (inner * _ROOT_HALF)) + r
    else:
        return activate(r, inner, 1.0, ACTIVATION, APPROX)


@triton.jit
def bare_factor(inner, outer, ACTIVATION: tl.constexpr):
    """outer * act(inner * r) / activate_bare(r)."""
    if ACTIVATION == "gelu_tanh" or ACTIVATION == "silu" or ACTIVATION == "gelu":
        return 0.5 * inner * outer
    else:
        return outer


@triton.jit
def activate_with_slope(r, inner, outer, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """outer * act(inner * r) and its derivative by r, outer * inner * act'(inner * r)."""
    both = inner * outer
    if ACTIVATION == "identity":
        return r * both, both
    elif ACTIVATION == "gelu_tanh":
        linear = _ROOT_2_OVER_PI * inner
        cubic = linear * _CUBIC * inner * inner
        square = r * r
        half = r * (0.5 * both)
        t = _tanh(r * (square * cubic + linear), APPROX)
        rise = (1.0 - t * t) * (square * (3.0 * cubic) + linear)
        return half * t + half, half * rise + (t * (0.5 * both) + 0.5 * both)
    elif ACTIVATION == "silu":
        half = r * (0.5 * both)
        t = _tanh(r * (0.5 * inner), APPROX)
        return half * t + half, half * ((1.0 - t * t) * (0.5 * inner)) + (t * (0.5 * both) + 0.5 * both)
    elif ACTIVATION == "gelu":
        half = r * (0.5 * both)
        e = tl.erf(r * (inner * _ROOT_HALF))
        density = tl.exp(r * r * (-0.5 * inner * inner)) * (_ROOT_HALF_OVER_PI * inner * both)
        return half * e + half, r * density + (e * (0.5 * both) + 0.5 * both)
    elif ACTIVATION == "relu":
        return tl.maximum(r * inner, 0.0) * outer, tl.where(r * inner > 0.0, both, 0.0)
    elif ACTIVATION == "relu_square":
        x = tl.maximum(r * inner, 0.0)
        return x * x * outer, x * (2.0 * both)
    else:
        tl.static_assert(ACTIVATION == "leaky_relu")
        x = r * inner
        return tl.where(x > 0.0, x, x * _LEAK) * outer, tl.where(x > 0.0, both, both * _LEAK)


@triton.jit
def bare_with_slope(r, inner, outer, ACTIVATION: tl.constexpr, APPROX: tl.constexpr):
    """`activate_with_slope`, but for a factor of each that all of a tensor have in common, `slope_factors`.

    The slope of gelu, with t the tanh of a: 3/2 (1 + t) ((a - 2/3 sqrt(2/pi) x) (1 - t) + 1/3) at x = inner * r.
    """
    if ACTIVATION == "gelu_tanh":
        linear = _ROOT_2_OVER_PI * inner
        a = r * (r * r * (linear * _CUBIC * inner * inner) + linear)
        t = _tanh(a, APPROX)
        g = r * (linear * (-2.0 / 3.0)) + a
        z = g * (1.0 - t) + (1.0 / 3.0)
        return r * t + r, z * t + z
    elif ACTIVATION == "silu":
        a = r * (0.5 * inner)
        t = _tanh(a, APPROX)
        z = a * (1.0 - t) + 1.0
        return r * t + r, z * t + z
    else:
        return activate_with_slope(r, inner, outer, ACTIVATION, APPROX)


@triton.jit
def slope_factors(inner, outer, ACTIVATION: tl.constexpr):
    """What value and slope of `bare_with_slope` lack."""
    if ACTIVATION == "gelu_tanh":
        return 0.5 * inner * outer, 1.5 * inner * outer
    elif ACTIVATION == "silu":
        return 0.5 * inner * outer, 0.5 * inner * outer
    else:
        return inner * 0.0 + 1.0, inner * 0.0 + 1.0
