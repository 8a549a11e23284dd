"""The shapes that `exfm bench kernels` measures, their inputs, and what each must cost.

Shape letters: B examples, H heads, D head width, T query rows of all examples, S key rows of all examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foundation_model.layers.hsp import sum_kron_linear
from kernels.gdpa import gdpa
from kernels.gdpa_block import gdpa_block
from kernels.seed_attention import seed_attention
from kernels.window_attention import window_attention

ELEMENT_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One row of the registry. Lengths marked jagged are uniform on 1 .. the number."""

    name: str
    op: Literal["gdpa", "gdpa_block", "window_attention", "seed_attention", "sum_kron"]
    examples: int
    heads: int
    width: int
    queries: int
    keys: int | None = None
    """Dense keys per example; None: self-attention, or for seeds the jagged sequence of `queries` rows."""
    jagged: bool = True
    window: int | None = None
    seeds: int | None = None
    terms: int | None = None
    """Of SumKronLinear, which maps `queries` rows to `keys`; `width` is a row's, in one head."""
    public_ms: tuple[float, float] | None = None
    """Best public kernels on an H100, forward and forward + backward (docs/kernels.md says which were measured)."""

    @property
    def kron(self) -> tuple[int, int, int, int]:
        """Rows in, rows out, width and terms of a SumKronLinear."""
        return self.queries, self.keys or 0, self.width, self.terms or 0


def _gdpa(
    name: str, b: int, h: int, d: int, q: int, k: int | None, ms: tuple[float, float] | None, **rest: Any
) -> Shape:
    options = {"op": "gdpa"} | rest
    return Shape(name=name, examples=b, heads=h, width=d, queries=q, keys=k, public_ms=ms, **options)


def _kron(name: str, b: int, w: int, n: int, m: int, k: int) -> Shape:
    return Shape(name=name, op="sum_kron", examples=b, heads=1, width=w, queries=n, keys=m, terms=k, jagged=False)


# Names of "model" are the sizes of a default teacher's tower.
SHAPES = (
    _gdpa("b768_h4_d128_q1024j_k128", 768, 4, 128, 1024, 128, (0.501, 1.766)),
    _gdpa("b1024_h4_d128_q512j_k256", 1024, 4, 128, 512, 256, (0.501, 1.932)),
    _gdpa("b1024_h4_d128_q512j_k64", 1024, 4, 128, 512, 64, (0.269, 1.449)),
    _gdpa("b2048_h8_d64_q512j_k128", 2048, 8, 64, 512, 128, (0.731, 2.431)),
    _gdpa("b2048_h4_d64_q256j_k32", 2048, 4, 64, 256, 32, (0.140, 1.051)),
    _gdpa("b2048_h2_d128_q64j_k64", 2048, 2, 128, 64, 64, (0.071, 0.927)),
    _gdpa("b1024_h4_d128_q512_k256", 1024, 4, 128, 512, 256, (0.830, 3.170), jagged=False),
    _gdpa("self_b1024_h8_d64_q512j", 1024, 8, 64, 512, None, (0.691, 2.600)),
    _gdpa("self_w64_b1024_h4_d128_q512j", 1024, 4, 128, 512, None, (0.419, 1.661), window=64),
    _gdpa("model_b1024_h4_d16_q50j_k64", 1024, 4, 16, 50, 64, None),
    _gdpa("b768_h4_d128_q1024j_k128", 768, 4, 128, 1024, 128, None, op="gdpa_block"),
    _gdpa("b1024_h4_d128_q512j_k256", 1024, 4, 128, 512, 256, None, op="gdpa_block"),
    _gdpa("b1024_h4_d128_q512j_k64", 1024, 4, 128, 512, 64, None, op="gdpa_block"),
    _gdpa("b2048_h8_d64_q512j_k128", 2048, 8, 64, 512, 128, None, op="gdpa_block"),
    _gdpa("model_b1024_h4_d16_q50j_k64", 1024, 4, 16, 50, 64, None, op="gdpa_block"),
    Shape(
        name="w64_b1024_h4_d128_q512j", op="window_attention", examples=1024, heads=4, width=128, queries=512,
        window=64, public_ms=(0.806, 2.887),
    ),
    Shape(
        name="w100_b1024_h8_d64_q1024j", op="window_attention", examples=1024, heads=8, width=64, queries=1024,
        window=100, public_ms=(3.836, 9.976),
    ),
    Shape(
        name="s256_b1024_h4_d128_k512j", op="seed_attention", examples=1024, heads=4, width=128, queries=512,
        seeds=256, public_ms=(0.563, 2.953),
    ),
    Shape(
        name="s64_b1024_h4_d64_k512j", op="seed_attention", examples=1024, heads=4, width=64, queries=512,
        seeds=64, public_ms=(0.228, 1.101),
    ),
    Shape(
        name="model_w32_b1024_h4_d16_q50j", op="window_attention", examples=1024, heads=4, width=16, queries=50,
        window=32,
    ),
    Shape(
        name="model_s64_b1024_h4_d16_k50j", op="seed_attention", examples=1024, heads=4, width=16, queries=50, seeds=64,
    ),
    _kron("b1024_n256_m32_w384_k8", 1024, 384, 256, 32, 8),
    _kron("model_b1024_n64_m16_w64_k4", 1024, 64, 64, 16, 4),
)  # fmt: skip


@dataclass(slots=True)
class Case:
    """A shape's tensors on the device, bf16: `leaves` are q, k, v, or of SumKronLinear h, z, w; `grad` is out's."""

    shape: Shape
    leaves: list[Tensor]
    grad: Tensor
    offsets: Tensor
    lengths: list[int]

    def call(self) -> Callable[..., Tensor]:
        """Our op of q, k, v; `backend` may be given."""
        shape, offsets = self.shape, self.offsets
        if shape.op == "gdpa":
            kv_offsets = None if shape.keys else offsets
            return lambda q, k, v, backend="triton": gdpa(
                q, offsets, k, v, kv_offsets=kv_offsets, window=shape.window, backend=backend
            )
        if shape.op == "gdpa_block":
            return lambda q, k, v, backend="triton": gdpa_block(q, offsets, k, v, backend=backend)
        if shape.op == "sum_kron":
            return lambda h, z, w, backend=None: sum_kron_linear(h, z, w, shape.kron[1])
        if shape.op == "window_attention":
            return lambda q, k, v, backend="triton": window_attention(
                q, k, v, offsets, window=shape.window, backend=backend
            )
        return lambda q, k, v, backend="triton": seed_attention(q, k, v, offsets, backend=backend)


def make_case(shape: Shape, device: torch.device, *, examples: int | None = None, seed: int = 0) -> Case:
    """Random inputs: q and k of standard deviation D^-1/4, so that scores are of order 1; v and grad of 1."""
    generator = torch.Generator(device).manual_seed(seed)
    b = examples or shape.examples
    lengths = torch.full((b,), shape.queries, device=device)
    if shape.jagged:
        lengths = torch.randint(1, shape.queries + 1, (b,), generator=generator, device=device)
    offsets = torch.zeros(b + 1, dtype=torch.int32, device=device)
    offsets[1:] = lengths.cumsum(0)
    rows = int(offsets[-1])

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator, device=device) * scale).bfloat16()

    if shape.op == "sum_kron":
        n, m, w, terms = shape.kron
        h, z = normal(b, n, w), normal(n, terms * m, scale=n**-0.5)
        weight = normal(terms * w, w, scale=(terms * w) ** -0.5)
        leaves = [x.requires_grad_() for x in (h, z, weight)]
        return Case(shape, leaves, normal(b, m, w), offsets, lengths.tolist())
    tail, small = (shape.heads, shape.width), shape.width**-0.25
    q = normal(shape.seeds or rows, *tail, scale=small)
    kv = (b, shape.keys) if shape.keys else (rows,)
    k, v = normal(*kv, *tail, scale=small), normal(*kv, *tail)
    grad = normal(b, shape.seeds, *tail) if shape.seeds else normal(rows, *tail)
    return Case(shape, [x.requires_grad_() for x in (q, k, v)], grad, offsets, lengths.tolist())


def pairs(case: Case) -> int:
    """Query-key pairs that count, of all examples."""
    shape = case.shape
    if shape.seeds or shape.keys:
        return sum(case.lengths) * (shape.seeds or shape.keys or 0)
    w = shape.window
    if w is None:
        return sum(n * n for n in case.lengths)
    return sum(n * n if n <= w else n * (2 * w + 1) - w * (w + 1) if n > 2 * w else _band(n, w) for n in case.lengths)


def _band(n: int, w: int) -> int:
    return sum(min(n, i + w + 1) - max(0, i - w) for i in range(n))


def flops(case: Case, *, backward: bool) -> float:
    """True FLOPs, unpadded: 4 D H a pair forward, 2.5 times that backward (five matmuls).

    SumKronLinear's are those of the cheaper order, Z first, and twice as many backward.
    """
    if case.shape.op == "sum_kron":
        n, m, w, terms = case.shape.kron
        products = 2.0 * len(case.lengths) * terms * m * w * (n + w)
        return products * 2 if backward else products
    forward = 4.0 * case.shape.width * case.shape.heads * pairs(case)
    return forward * 2.5 if backward else forward


def least_bytes(case: Case, *, backward: bool) -> float:
    """Each input read once and each output written once. Seeds count as one set per example, as a dense query would."""
    shape = case.shape
    if shape.op == "sum_kron":
        h, z, w = (x.numel() * ELEMENT_BYTES for x in case.leaves)
        out = case.grad.numel() * ELEMENT_BYTES
        return 2 * (h + z + w) + out if backward else h + z + w + out
    row = shape.heads * shape.width * ELEMENT_BYTES
    q_rows = shape.examples * shape.seeds if shape.seeds else sum(case.lengths)
    kv_rows = shape.examples * shape.keys if shape.keys else sum(case.lengths)
    return row * ((3 * q_rows + 4 * kv_rows) if backward else (2 * q_rows + 2 * kv_rows))
