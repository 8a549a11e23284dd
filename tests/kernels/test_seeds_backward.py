"""What surrounds seed attention's backward on Hopper: its rule, how tiles are counted and shared out, sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import BOUNDS, DEVICE, LOW, poisoned

from kernels.attention import launch
from kernels.attention.hopper_seeds import seeds_rings, takes_seeds
from kernels.attention.triton_seeds_kernels import _add_shares_kernel, _count_tiles_kernel
from kernels.launcher import launch as run

poison = pytest.fixture(autouse=True)(poisoned)

TAKEN: dict[str, Any] = {"dtype": torch.bfloat16, "width": 128, "programs": 4096, "seeds": 256}


@pytest.mark.parametrize("seeds", [65, 128, 129, 256])
@pytest.mark.parametrize("width", [64, 128])
def test_all_seeds_of_a_head_fit_on_chip(width: int, seeds: int) -> None:
    rings = seeds_rings(width, seeds)
    parts, lends = 2 * rings.parts, rings.parts * width == 256
    assert parts * 64 >= seeds
    tiles = parts * (1 + rings.do_places) + 2 * rings.places  # Q, dO, K and V
    tiles += 0 if lends else parts + 2  # O and dX
    scores = 2 * parts * 64 * 64
    assert 2 * (64 * width * tiles + scores) + 4 * parts * 128 + 1024 <= 227 * 1024


@pytest.mark.parametrize(
    ("change", "value"),
    [("dtype", torch.float32), ("width", 32), ("programs", 511), ("seeds", 64), ("seeds", 513)],
    ids=["float32", "narrow", "few programs", "one tile of seeds", "many"],
)
def test_other_seeds_are_left_to_other_kernels(change: str, value: Any) -> None:
    assert all(takes_seeds(**TAKEN | {"seeds": n}) for n in (65, 256, 512))
    assert takes_seeds(**TAKEN | {"programs": 512})
    assert not takes_seeds(**TAKEN | {change: value})


@pytest.mark.parametrize(
    "lengths", [[], [0], [0, 1, 64, 65, 0, 200, 0], [3] * 37], ids=["none", "empty", "odd", "many"]
)
def test_tiles_before_each_example_are_counted(lengths: list[int]) -> None:
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    before = torch.empty_like(offsets)
    run(_count_tiles_kernel, (1,), offsets, before, len(lengths), KEYS=64, BLOCK=16, num_warps=4)
    tiles = [-(-n // 64) for n in lengths]
    assert before.tolist() == [sum(tiles[:b]) for b in range(len(lengths) + 1)]


@pytest.mark.parametrize("programs", [1, 2, 7, 21])
@pytest.mark.parametrize("heads", [1, 3])
def test_each_heads_shares_are_added_and_no_others(heads: int, programs: int) -> None:
    seeds, query_rows, width, tiles = 5, 128, 16, 7
    programs = min(programs, heads * tiles)
    torch.manual_seed(0)
    shares = torch.randn(programs + heads - 1, query_rows, width, device=DEVICE)
    expected = torch.zeros(seeds, heads, width, device=DEVICE)
    total = heads * tiles
    for p in range(programs):
        of_program = range(total * p // programs, total * (p + 1) // programs)
        for h in {tile // tiles for tile in of_program}:
            expected[:, h] += shares[p + h, :seeds]
    dq = torch.empty_like(expected)
    before = torch.tensor([0, 3, tiles], dtype=torch.int32, device=DEVICE)
    run(
        _add_shares_kernel, (-(-seeds * width // 32), heads), shares, before, dq, 2, heads, seeds, query_rows, programs,
        D=width, BLOCK=32, SHARES=4, num_warps=4,
    )  # fmt: skip
    torch.testing.assert_close(dq, expected)


def test_without_any_key_the_seeds_gradient_is_zero() -> None:
    dq, before = torch.empty(5, 2, 16, device=DEVICE), torch.zeros(3, dtype=torch.int32, device=DEVICE)
    shares = torch.full((3, 64, 16), float("nan"), device=DEVICE)
    run(
        _add_shares_kernel, (3, 2), shares, before, dq, 2, 2, 5, 64, 2, D=16, BLOCK=32, SHARES=4, num_warps=4
    )  # fmt: skip
    assert not dq.any()


@pytest.mark.parametrize("dtype", [LOW, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("examples", "seeds"), [(1, 3), (200, 1), (130, 11), (5, 0)])
def test_partial_gradients_of_seeds_are_summed(examples: int, seeds: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = torch.randn(examples * seeds, 3, 8, dtype=dtype, device=DEVICE)
    total = launch._sum_examples(parts, torch.empty(seeds, 3, 8, dtype=dtype, device=DEVICE), examples)
    expected = parts.double().view(examples, seeds, 3, 8).sum(0).to(dtype)
    torch.testing.assert_close(total, expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
