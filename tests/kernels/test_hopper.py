"""The Hopper paths of all ops: they compile to what their speed needs, and are left where they cannot run."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_cases import DEVICE

from kernels.attention.hopper import backward_tiles, forward_tiles
from kernels.gdpa.hopper import hopper_rings, hopper_tiles, key_parts
from kernels.gdpa.tiles import Problem
from kernels.gdpa_block.hopper import BACKWARD_PLACES, FewTiles, ManyTiles, backward_keys
from kernels.gdpa_block.hopper import forward_tiles as block_tiles
from kernels.hopper import ROWS, HopperTiles, engine_view, is_hopper, shared_out
from kernels.window.hopper import REGISTERS, window_slots

HERE = Path(__file__).parent
# Bytes that kernels may spill. Backward at D = 128 has all registers taken; it spills outside of its products' loop, or
# nearly so; at D = 64 one register at the start. The warp that has seeds' tiles copied has 24.
SPILLS = {
    "backward 64 None": 4,
    "backward 128": 320,
    "block backward": 192,
    "softmax backward 128": 128,
    "seeds backward 128": 256,
    "seeds backward 64": 16,
    "window backward 128": 128,
}


def has_gluon() -> bool:
    return importlib.util.find_spec("triton") is not None and (
        importlib.util.find_spec("triton.experimental.gluon") is not None
    )


@pytest.mark.timeout(300)
@pytest.mark.skipif(not has_gluon(), reason="this Triton has no Gluon")
def test_kernels_compile_without_spills_and_with_products_in_flight() -> None:
    path = os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(HERE.parents[1])])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path.strip(os.pathsep)}
    report = subprocess.run(
        [sys.executable, HERE / "compile_hopper.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert report.returncode == 0, report.stderr[-2000:]
    cases = report.stdout.split("case ")[1:]
    assert len(cases) == 6 + 7 + 6 + 6 + 11 + 5 + 5
    for case in cases:
        assert "serialized" not in case, case
        assert "reused barriers []" in case, case
        spilled = int(re.findall(r"(\d+) bytes spill stores", case)[0])
        allowed = [most for name, most in SPILLS.items() if case.startswith(name)]
        assert spilled <= max(allowed, default=0), case


@pytest.mark.skipif(not has_gluon(), reason="this Triton has no Gluon")
def test_hosts_know_what_device_code_counts_on() -> None:
    from kernels.attention import hopper_seeds, hopper_seeds_ring
    from kernels.gdpa_block import hopper, hopper_mailbox

    assert hopper_mailbox.TURNS.value == hopper._TURNS
    assert hopper_mailbox.GROUPS.value == hopper._GROUPS
    assert hopper_seeds_ring.N.value == hopper_seeds._KEYS


@pytest.mark.parametrize(
    ("examples", "heads", "width", "tiles", "expected"),
    [
        (1024, 4, 128, 4, (992 * 4 + 32 * 4 * 4, 992 * 4, 4)),  # the last 32 examples by query tiles
        (1024, 4, 64, 4, (4096, 4096, 1)),
        (200, 4, 128, 1, (800, 168 * 4, 1)),  # one tile an example
        (20, 64, 128, 2, (20 * 64 * 2, 0, 2)),  # fewer than 32
        (50, 4, 128, 5, (50 * 4 * 3, 0, 3)),  # all, to fill the card
    ],
)
def test_items_of_a_forward_are_pairs_or_their_parts(
    examples: int, heads: int, width: int, tiles: int, expected: tuple[int, int, int]
) -> None:
    items, whole, parts = shared_out(examples, heads, width, tiles)
    assert (items, whole, parts) == expected
    assert whole + (items - whole) // parts == examples * heads


@pytest.mark.skipif(not is_hopper(DEVICE), reason="runs on Hopper alone")
@pytest.mark.parametrize("number", [1, 5, 32, 33, 100])
def test_examples_are_taken_once_each_and_the_last_ones_longest_first(number: int) -> None:
    from hopper_turns import turns_kernel

    lengths = ([7, 0, 300, 7, 2**26 + 5, 64, 0, 2**26 + 9, 63] * 12)[:number]
    offsets = torch.tensor([0, *lengths], dtype=torch.int32, device=DEVICE).cumsum(0, dtype=torch.int32)
    found = torch.full((number,), -1, dtype=torch.int32, device=DEVICE)
    turns_kernel[(number,)](offsets, found, number, num_warps=1)
    tail = range(max(number - 32, 0), number)
    last = sorted(tail, key=lambda i: -min(lengths[i], 2**26 - 1))
    assert found.tolist() == [*range(tail.start), *last]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("keys", [None, 1, 129, 256, 5000])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_tiles_fit_shared_memory_and_registers(width: int, keys: int | None, window: int | None) -> None:
    seeds = None if window else 256
    for tiles in (
        hopper_tiles(Problem(torch.bfloat16, 7, 3, width, 900, keys, window)),
        forward_tiles(torch.bfloat16, width, False, seeds, window),
    ):
        if tiles is not None:
            _check_ring(tiles, width)
    backward = backward_tiles(torch.bfloat16, width, 4096, False, seeds, window)
    if backward is not None:
        assert backward.slots % 2 == 1
        assert 2 * (2 * width * backward.block * (2 + backward.slots) + 2048) <= 228 * 1024  # two programs


def _check_ring(tiles: HopperTiles, width: int) -> None:
    rows = 3 * ROWS * tiles.groups + 2 * tiles.slots * tiles.block_n
    assert 2 * width * rows + 1024 <= 227 * 1024
    assert 128 * (tiles.groups * tiles.registers + 24) <= 65536
    assert tiles.slots >= 3


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 64), (torch.bfloat16, 48), (torch.bfloat16, 256)])
def test_what_it_cannot_take_is_left_to_triton(dtype: torch.dtype, width: int) -> None:
    assert hopper_tiles(Problem(dtype, 7, 3, width, 900, None, None)) is None


@pytest.mark.parametrize("keys", [None, 1, 65, 128, 129, 256, 5000])
@pytest.mark.parametrize("width", [64, 128])
def test_backward_rings_fit_shared_memory_and_let_the_groups_be_apart(width: int, keys: int | None) -> None:
    rings = hopper_rings(Problem(torch.bfloat16, 700, 3, width, 700 * 256, keys, None))
    assert (rings is None) == (keys == 1)
    if rings is not None:
        rows = 64 * (2 * rings.slots + 4 * rings.places + rings.kept + (2 if rings.kept else 1)) * width
        scores = 64 * 64 * (2 * rings.swaps + (2 if width == 128 else 0))
        assert 2 * (rows + scores) + 2048 <= 227 * 1024
        assert rings.swaps == 2
        assert rings.slots >= 3  # the scores of the next tile start while the one before is still read
        assert width == 64 or rings.slots <= rings.swaps + 1  # as `produce` counts on


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("dtype", torch.float32),
        ("num_examples", 7),
        ("width", 32),
        ("window", 9),
        ("query_rows", 700 * 16),
        ("dense_keys", 64),
    ],
)
def test_backward_is_left_to_triton_where_that_is_faster(change: str, value: Any) -> None:
    taken = {"dtype": torch.bfloat16, "num_examples": 700, "num_heads": 3, "width": 64, "query_rows": 700 * 256}
    taken |= {"dense_keys": 128, "window": None}
    assert hopper_rings(Problem(**taken)) is not None
    assert hopper_rings(Problem(**taken | {change: value})) is None


def test_wide_heads_need_more_queries_an_example() -> None:
    def rings(width: int, queries: int) -> object:
        return hopper_rings(Problem(torch.bfloat16, 4096, 4, width, 4096 * queries, 256, None))

    assert rings(64, 64) is not None
    assert rings(128, 64) is None
    assert rings(128, 256) is not None


def test_two_key_tiles_of_wide_heads_are_side_by_side() -> None:
    def parts(width: int, keys: int) -> int:
        return key_parts(Problem(torch.bfloat16, 4096, 4, width, 4096 * 512, keys, None))

    assert parts(128, 256) == 2
    assert parts(128, 128) == parts(128, 257) == parts(64, 256) == 1


@pytest.mark.parametrize(
    ("dtype", "width", "programs", "short", "seeds", "window"),
    [
        (torch.float32, 64, 4096, False, None, 64),
        (torch.bfloat16, 32, 4096, False, None, 64),
        (torch.bfloat16, 64, 511, False, None, 64),
        (torch.bfloat16, 64, 4096, True, None, 64),
        (torch.bfloat16, 128, 4096, False, None, 129),
        (torch.bfloat16, 128, 4096, False, None, None),
    ],
    ids=["float32", "narrow", "few programs", "short examples", "wide window", "no window"],
)
def test_softmax_backward_is_left_to_triton_where_that_is_faster(
    dtype: torch.dtype, width: int, programs: int, short: bool, seeds: int | None, window: int | None
) -> None:
    assert backward_tiles(dtype, width, programs, short, seeds, window) is None


def block_inputs(rows: int, heads: int, width: int, keys: int) -> list[torch.Tensor]:
    """The sequence and keys of 512 examples, without storage."""
    shapes = (rows, heads, width), (512, keys, heads, width)
    return [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]


def test_block_tiles_of_few_keys_fit_shared_memory_and_registers() -> None:
    tiles = block_tiles(*block_inputs(300_000, 4, 128, 40), "silu")
    assert isinstance(tiles, FewTiles)
    ring = tiles.ring
    rows = ROWS * ring.groups * (tiles.queries + 1) + 2 * ring.slots * ring.block_n
    assert 2 * 128 * rows + 1024 <= 227 * 1024
    assert 128 * (ring.groups * ring.registers + 24) <= 65536
    assert ring.groups == 2
    assert tiles.queries >= 2


@pytest.mark.parametrize(("heads", "width", "keys"), [(4, 128, 128), (4, 128, 256), (8, 64, 64), (4, 64, 128)])
def test_block_tiles_of_many_keys_fit_shared_memory(heads: int, width: int, keys: int) -> None:
    tiles = block_tiles(*block_inputs(600_000, heads, width, keys), "silu")
    assert isinstance(tiles, ManyTiles)
    key_rows = tiles.block_n * tiles.parts
    assert keys <= key_rows
    scores = ROWS * key_rows * (128 // width)
    assert 2 * (128 * (ROWS * tiles.places + 2 * key_rows * tiles.kv_places) + scores) + 1024 <= 227 * 1024
    assert tiles.places >= 3  # a tile is opened while the one before last is on its way out


@pytest.mark.parametrize(
    ("rows", "heads", "width", "keys", "activation"),
    [
        (512 * 100, 8, 128, 128, "silu"),
        (512 * 200, 2, 128, 128, "silu"),
        (300_000, 1, 128, 128, "silu"),
        (300_000, 9, 128, 128, "silu"),
        (300_000, 8, 32, 128, "silu"),
        (300_000, 7, 64, 128, "silu"),
        (300_000, 8, 64, 200, "silu"),
        (300_000, 4, 128, 300, "silu"),
        (300_000, 4, 128, 32, "silu"),
        (300_000, 2, 128, 128, "silu,relu"),
    ],
    ids=[
        "short examples",
        "few elements",
        "one head",
        "many heads",
        "narrow",
        "odd heads",
        "many keys in pairs",
        "many keys",
        "few keys",
        "two activations",
    ],
)
def test_the_block_is_left_to_three_kernels_where_they_are_faster_or_needed(
    rows: int, heads: int, width: int, keys: int, activation: str
) -> None:
    assert block_tiles(*block_inputs(rows, heads, width, keys), activation) is None


@pytest.mark.parametrize(("keys", "block_n"), [(33, 64), (64, 64), (65, 128), (128, 128)])
def test_the_blocks_backward_in_one_kernel_has_all_keys_in_one_tile(keys: int, block_n: int) -> None:
    assert backward_keys(*block_inputs(300_000, 4, 128, keys), "silu") == block_n
    key_tiles = 2 * 128  # of keys and of values, rows
    query_tiles = 3 * BACKWARD_PLACES * ROWS
    scores = 2 * 64 * ROWS  # P and dS, or of 128 keys dS alone
    assert 2 * (128 * (query_tiles + key_tiles) + scores) + 2048 <= 227 * 1024


@pytest.mark.parametrize(
    ("rows", "heads", "width", "keys", "activation"),
    [
        (512 * 100, 8, 128, 128, "silu"),
        (300_000, 1, 128, 128, "silu"),
        (300_000, 4, 32, 128, "silu"),
        (300_000, 8, 64, 128, "silu"),
        (300_000, 4, 128, 32, "silu"),
        (300_000, 4, 128, 129, "silu"),
        (300_000, 4, 128, 128, "silu,relu"),
    ],
    ids=["short examples", "one head", "narrow", "half as wide", "few keys", "many keys", "two activations"],
)
def test_the_block_backward_is_left_to_three_kernels_where_they_are_faster_or_needed(
    rows: int, heads: int, width: int, keys: int, activation: str
) -> None:
    assert backward_keys(*block_inputs(rows, heads, width, keys), activation) is None


def test_the_block_in_one_kernel_needs_one_type_of_16_bits() -> None:
    sequence, k = block_inputs(300_000, 4, 128, 128)
    assert backward_keys(sequence.half(), k.half(), "silu") is None
    assert block_tiles(sequence, k, "silu,silu,silu,silu") is not None
    assert block_tiles(sequence.float(), k, "silu") is None
    assert block_tiles(sequence.float(), k.float(), "silu") is None


@pytest.mark.parametrize(("width", "widest"), [(64, 128), (128, 64)])
def test_the_tiles_that_a_window_meets_stay_on_chip(width: int, widest: int) -> None:
    for window in (0, 1, widest):
        slots = window_slots(torch.bfloat16, width, 4096, False, window)
        assert slots is not None
        assert slots >= 1 + 2 * -(-window // ROWS)
        assert 2 * width * ROWS * (4 * slots + 2) + 2 * 4 * ROWS * slots + 1024 <= 227 * 1024
    assert window_slots(torch.bfloat16, width, 4096, False, widest + 1) is None
    assert REGISTERS % 8 == 0
    assert REGISTERS + 24 + 232 <= 504


@pytest.mark.parametrize(
    ("dtype", "width", "programs", "short", "window"),
    [
        (torch.float32, 64, 4096, False, 64),
        (torch.bfloat16, 32, 4096, False, 64),
        (torch.bfloat16, 64, 511, False, 64),
        (torch.bfloat16, 64, 4096, True, 64),
        (torch.bfloat16, 64, 4096, False, None),
    ],
    ids=["float32", "narrow", "few programs", "short examples", "no window"],
)
def test_a_windows_backward_is_left_to_others(
    dtype: torch.dtype, width: int, programs: int, short: bool, window: int | None
) -> None:
    assert window_slots(dtype, width, programs, short, window) is None


def test_only_a_hopper_card_runs_it() -> None:
    assert not is_hopper(torch.device("cpu"))


def test_the_copy_engine_reads_columns_of_one_projection() -> None:
    qkv = torch.zeros(8, 3, 2, 64, dtype=torch.bfloat16)
    assert engine_view(qkv[:, 1]) == ([8, 128], [384, 1])


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(0, 2, 64, dtype=torch.bfloat16),
        torch.zeros(4, 2, 48, dtype=torch.bfloat16),
        torch.zeros(4 * 2 * 64 + 1, dtype=torch.bfloat16)[1:].view(4, 2, 64),
        torch.zeros(4, 129, dtype=torch.bfloat16)[:, :128].view(4, 2, 64),
        torch.zeros(1, 2, 64, dtype=torch.bfloat16).expand(4, 2, 64),
    ],
    ids=["no rows", "width 48", "unaligned", "unaligned rows", "one row for all"],
)
def test_the_copy_engine_is_not_asked_for_what_it_cannot_read(x: torch.Tensor) -> None:
    assert engine_view(x) is None
