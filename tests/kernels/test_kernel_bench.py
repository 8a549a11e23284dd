"""The kernel benchmark's arithmetic, and that its baselines compute what our ops compute."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from das.errors import ConfigError
from services.bench.kernel_baselines import baselines
from services.bench.kernel_plot import draw_file
from services.bench.kernel_shapes import SHAPES, Case, Shape, flops, least_bytes, make_case, pairs
from services.bench.kernels import _add_baselines, _finished, _measure_shape, run

CPU = torch.device("cpu")


def small(shape: Shape) -> Case:
    """The shape's kind, at a size for the CPU."""
    sizes = {"keys": shape.keys and 8, "window": shape.window and 3, "seeds": shape.seeds and 5}
    return make_case(dataclasses.replace(shape, examples=3, heads=2, width=16, queries=20, **sizes), CPU, seed=3)


PADDED = [s for s in SHAPES if s.op != "sum_kron"]


@pytest.mark.parametrize("shape", PADDED, ids=lambda s: s.name)
def test_padded_baseline_computes_what_ours_does(shape: Shape) -> None:
    case = small(shape)
    ours = case.call()(*case.leaves, backend="reference")
    _, function, leaves, grad = next(b for b in baselines(case, compiled=False) if b[0] == "eager")
    theirs = function(*leaves).transpose(1, 2)
    assert theirs.shape == grad.transpose(1, 2).shape
    if shape.seeds is None:
        theirs = torch.cat([theirs[b, :n] for b, n in enumerate(case.lengths)])
    error = (theirs.float() - ours.float()).norm() / ours.float().norm()
    assert error < 1e-2  # the baseline computes in bfloat16


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_pairs_are_those_that_count(shape: Shape) -> None:
    case = small(shape)
    w, keys = case.shape.window, case.shape.seeds or case.shape.keys
    counted = sum(
        1 for n in case.lengths for i in range(n) for j in range(keys or n) if keys or w is None or abs(i - j) <= w
    )
    assert pairs(case) == counted


@pytest.mark.parametrize(("op", "names"), [("sum_kron", {"batched", "w_first"}), ("gdpa_block", {"unfused"})])
def test_unpadded_baselines_compute_what_ours_does(op: str, names: set[str]) -> None:
    case = small(next(s for s in SHAPES if s.op == op))
    ours = case.call()(*case.leaves, backend="reference").float()
    theirs = [b for b in baselines(case, compiled=False) if b[0] in names]
    assert len(theirs) == len(names)
    for _, function, leaves, _ in theirs:
        assert (function(*leaves).float() - ours).norm() / ours.norm() < 1e-2


def test_of_two_times_the_lower_counts_for_ours_and_for_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Case.call
    monkeypatch.setattr(Case, "call", lambda case: functools.partial(call(case), backend="reference"))
    shape = dataclasses.replace(SHAPES[0], examples=3, heads=2, width=16, queries=20, keys=8)
    medians = iter([9.0, 8.0, 4.0, 16.0, 7.0, 5.0, 10.0, 12.0])  # ours; ours again; eager's two of each pass

    def timer(function: Callable[[], object], repeats: int = 20) -> tuple[float, float]:
        function()
        median = next(medians)
        return median, median + 0.5

    rows = _measure_shape(shape, timer, {"ceiling_flops": 1e9, "ceiling_bytes": 1e9}, CPU)
    before = _finished(rows[0])
    _add_baselines(shape, rows, timer, CPU, compiled=False)
    forward, both = map(_finished, rows)
    assert (forward["value"], forward["p90"], forward["baseline_value"], forward["ratio"]) == (4.0, 4.5, 5.0, 1.25)
    assert (both["value"], both["p90"], both["baseline_value"], both["ratio"]) == (8.0, 8.5, 10.0, 1.25)
    for name in ("tflops", "roofline_share", "public_ratio"):
        assert forward[name] == pytest.approx(before[name] * 9 / 4)


def test_a_result_file_becomes_a_picture(tmp_path: Path) -> None:
    row = {"name": "gdpa.some_shape.fwd", "roofline_share": 0.5}
    result = {"rows": [row], "commit": "0123456789", "machine": {"gpu": "a card"}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    draw_file(tmp_path / "result.json", tmp_path / "result.png")
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"no result of 'exfm bench kernels'"):
        draw_file(tmp_path / "other.json", tmp_path / "other.png")


def test_floor_of_a_known_shape() -> None:
    shape = next(s for s in SHAPES if s.name == "b1024_h4_d128_q512_k256")
    case = Case(shape, [], torch.empty(0), torch.empty(0), [512] * 1024)
    assert flops(case, backward=False) == 4 * 128 * 4 * 1024 * 512 * 256
    assert flops(case, backward=True) == 2.5 * flops(case, backward=False)
    assert least_bytes(case, backward=False) == 2 * (2 * 1024 * 512 + 2 * 1024 * 256) * 4 * 128


def test_names_are_unique() -> None:
    assert len({(s.op, s.name) for s in SHAPES}) == len(SHAPES)


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="known: "):
        run(shape="nope")


def test_a_result_without_a_folder_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder: make it first"):
        run(json_path=tmp_path / "missing" / "result.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        run()
