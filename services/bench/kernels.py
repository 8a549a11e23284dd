"""`exfm bench kernels`: every registered shape, forward and forward + backward, beside baselines of the same run."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.bench.document import heading
from services.bench.kernel_baselines import baselines
from services.bench.kernel_shapes import SHAPES, Case, Shape, flops, least_bytes, make_case

_REPEATS = 20
_FLUSH_BYTES = 256 << 20  # several times any L2
_DATASHEET = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12)}  # dense bf16 FLOP/s, bytes/s
_ERROR_BOUND = 5e-3


def run(
    op: str | None = None,
    shape: str | None = None,
    json_path: Path | None = None,
    *,
    compiled: bool = True,
    seconds: float = 1800.0,
    compile_seconds: float = 600.0,
) -> dict[str, Any]:
    """Measure the registered shapes, print a line each, and return (and write) the result.

    Rows of small shapes hold host time, which varies: everything is timed twice, our passes the second time beside
    their baselines, and the lower median counts.

    Args:
        op: only this op's shapes.
        shape: only the shape of this name.
        json_path: where to write the result.
        compiled: with torch.compile among the baselines.
        seconds: baselines of shapes that would begin later than this are left out, and said to be.
        compile_seconds: the same for torch.compile, whose graphs take up to a minute each.

    Raises:
        ValueError: no such op or shape, or no folder for the result.
        RuntimeError: there is no CUDA device, or an output is wrong.
    """
    chosen = [s for s in SHAPES if op in (None, s.op) and shape in (None, s.name)]
    if not chosen:
        raise ValueError(f"no shape {shape or ''} of op {op or 'any'}; known: {', '.join(s.name for s in SHAPES)}")
    if json_path is not None and not json_path.parent.is_dir():
        raise ValueError(f"{json_path.parent} is no folder: make it first, or name another file for the result")
    if not torch.cuda.is_available():
        raise RuntimeError("exfm bench kernels times CUDA kernels and found no CUDA device; run it on a GPU machine")
    with torch.autograd.set_multithreading_enabled(False):  # as the trainers have it
        result = _measure(chosen, compiled, seconds, compile_seconds)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def _measure(chosen: list[Shape], compiled: bool, seconds: float, compile_seconds: float) -> dict[str, Any]:
    started = time.monotonic()
    device = torch.device("cuda")
    timer = _Timer(device)
    rates = _card_rates(timer, device)
    rows = [row for s in chosen for row in _measure_shape(s, timer, rates, device)]
    for s in chosen:
        spent = time.monotonic() - started
        if spent > seconds:
            print(f"{s.op}.{s.name}: baselines left out, {seconds:.0f} s are over", flush=True)
            continue
        if compiled and spent > compile_seconds:
            print(f"{s.op}.{s.name}: torch.compile left out, {compile_seconds:.0f} s are over", flush=True)
        _add_baselines(s, rows, timer, device, compiled and spent <= compile_seconds)
    rows = [_finished(row) for row in rows]
    for row in rows:
        print(_line(row), flush=True)
    return _document(rows, rates)


class _Timer:
    """Median of device-side times, with the L2 cache overwritten before each."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Callable[[], Any], repeats: int = _REPEATS) -> tuple[float, float]:
        """Milliseconds: median, 90th percentile."""
        for _ in range(3):
            function()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for begin, end in events:
            self._flush.zero_()
            begin.record()
            function()
            end.record()
        torch.cuda.synchronize()
        times = sorted(begin.elapsed_time(end) for begin, end in events)
        return statistics.median(times), times[int(0.9 * len(times))]


def _card_rates(timer: _Timer, device: torch.device) -> dict[str, float]:
    """The card's own rates in this run, and the ceilings that roofline shares are of."""
    square = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    large = torch.randn(1 << 29, device=device, dtype=torch.bfloat16)
    copy = torch.empty_like(large)
    matmul = 2 * 8192**3 / timer(lambda: square @ square)[0] * 1e3
    moved = 2 * large.numel() * large.element_size() / timer(lambda: copy.copy_(large))[0] * 1e3
    name = torch.cuda.get_device_name(device)
    ceiling = next((rates for key, rates in _DATASHEET.items() if key in name), (matmul, moved))
    return {
        "matmul_flops": matmul, "copy_bytes": moved, "ceiling_flops": ceiling[0], "ceiling_bytes": ceiling[1],
    }  # fmt: skip


def _passes(function: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> dict[str, Callable[[], object]]:
    plain = [x.detach() for x in leaves]
    return {
        "fwd": lambda: function(*plain),
        "fwd_bwd": lambda: torch.autograd.grad(function(*leaves), leaves, grad),
    }


def _measure_shape(shape: Shape, timer: _Timer, rates: dict[str, float], device: torch.device) -> list[dict[str, Any]]:
    """What `_finished` makes a row of, one for each pass."""
    # Examples enough that the launch rules choose as they do for the whole shape.
    error = _error(make_case(shape, device, examples=-(-512 // shape.heads), seed=1))
    if not error <= _ERROR_BOUND:
        raise RuntimeError(f"{shape.op}.{shape.name}: relative error {error:.1e} > {_ERROR_BOUND}")
    case = make_case(shape, device)
    rows = []
    for name, function in _passes(case.call(), case.leaves, case.grad).items():
        median, p90 = timer(function)
        backward = [False] if name == "fwd" else [False, True]
        roofline = sum(
            max(
                flops(case, backward=b) / rates["ceiling_flops"],
                least_bytes(case, backward=b) / rates["ceiling_bytes"],
            )
            for b in backward
        )
        rows.append({
            "name": f"{shape.op}.{shape.name}.{name}", "value": median, "p90": p90, "roofline_ms": roofline * 1e3,
            "flops": sum(flops(case, backward=b) for b in backward),
            "public_ms": shape.public_ms[len(backward) - 1] if shape.public_ms else None,
            "error": error, "baselines": {},
        })  # fmt: skip
    return rows


def _error(case: Case) -> float:
    """Largest relative L2 error of out, dQ, dK, dV against the reference in float64; NaN if any is not finite."""
    call = case.call()
    out = call(*case.leaves)
    actual = [out, *torch.autograd.grad(out, case.leaves, case.grad)]
    doubles = [x.detach().double().requires_grad_() for x in case.leaves]
    exact = call(*doubles, backend="reference")
    expected = [exact, *torch.autograd.grad(exact, doubles, case.grad.double())]
    errors = [
        float((a.detach().double() - e.detach()).norm() / e.detach().norm())
        for a, e in zip(actual, expected, strict=True)
    ]
    return max(errors) if all(error == error for error in errors) else float("nan")


def _add_baselines(
    shape: Shape, rows: list[dict[str, Any]], timer: _Timer, device: torch.device, compiled: bool
) -> None:
    """Time a shape's passes again, beside their baselines."""
    case = make_case(shape, device)
    ours = _passes(case.call(), case.leaves, case.grad)
    of_part = {part: next(r for r in rows if r["name"] == f"{shape.op}.{shape.name}.{part}") for part in ours}
    for part, run_pass in ours.items():
        row = of_part[part]
        row["value"], row["p90"] = min((row["value"], row["p90"]), timer(run_pass))
    for name, function, leaves, grad in baselines(case, compiled=compiled):
        for part, run_pass in _passes(function, leaves, grad).items():
            try:
                median = min(timer(run_pass, repeats=7)[0] for _ in range(2))
            except torch.OutOfMemoryError:
                median = None
                torch.cuda.empty_cache()
            of_part[part]["baselines"][name] = median


def _finished(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the result. The fastest baseline becomes its `baseline`; all are kept beside it."""
    value, public = row["value"], row["public_ms"]
    measured = {name: ms for name, ms in row["baselines"].items() if ms is not None}
    fastest = min(measured, key=measured.__getitem__, default=None)
    fastest_ms = measured[fastest] if fastest else None
    return {
        "name": row["name"], "value": value, "unit": "ms",
        "baseline": fastest, "baseline_value": fastest_ms, "ratio": fastest_ms / value if fastest_ms else None,
        "p90": row["p90"], "roofline_ms": row["roofline_ms"], "roofline_share": row["roofline_ms"] / value,
        "tflops": row["flops"] / value / 1e9,
        "public_ms": public, "public_ratio": public / value if public else None,
        "error": row["error"], "baselines": row["baselines"],
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    against = f"{row['ratio']:.2f}x {row['baseline']}" if row["ratio"] else "no baseline"
    public = f"{row['public_ratio']:.2f}x best public, " if row["public_ratio"] else ""
    return (
        f"{row['name']:52s} {row['value']:8.4f} ms {row['tflops']:6.0f} TFLOP/s "
        f"{row['roofline_share']:6.1%} of roofline, {public}{against}"
    )


def _document(rows: list[dict[str, Any]], rates: dict[str, float]) -> dict[str, Any]:
    return heading("kernels") | {"rates": rates, "rows": rows}
