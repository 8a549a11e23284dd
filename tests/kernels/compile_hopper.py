"""Compiles the Gluon kernels for sm_90a without a GPU; prints what the assembler says of each.

A process of its own: where tests run in Triton's interpreter, nothing can be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.attention.hopper import backward_tiles, forward_tiles
from kernels.attention.hopper_backward import _softmax_bwd_hopper_kernel
from kernels.attention.hopper_forward import _softmax_fwd_hopper_kernel
from kernels.attention.hopper_seeds import seeds_rings
from kernels.attention.hopper_seeds_backward import _seeds_bwd_hopper_kernel
from kernels.gdpa.hopper import hopper_rings, hopper_tiles, key_parts
from kernels.gdpa.hopper_backward import _gdpa_bwd_hopper_kernel
from kernels.gdpa.hopper_forward import _gdpa_fwd_hopper_kernel
from kernels.gdpa.tiles import Problem
from kernels.gdpa_block.hopper import BACKWARD_PLACES, FewTiles, backward_keys
from kernels.gdpa_block.hopper import forward_tiles as block_tiles
from kernels.gdpa_block.hopper_backward import _gdpa_block_bwd_hopper_kernel
from kernels.gdpa_block.hopper_forward import _gdpa_block_fwd_hopper_kernel
from kernels.gdpa_block.hopper_forward_many import _gdpa_block_fwd_many_hopper_kernel
from kernels.hopper import ROWS, HopperTiles
from kernels.window.hopper import REGISTERS, window_slots
from kernels.window.hopper_backward import _window_bwd_hopper_kernel

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ASSEMBLERS = ("ptxas", "ptxas-blackwell")  # the second is newer; which one a Hopper gets depends on Triton's version
CASES = [  # width, dense keys, window, activation
    (32, None, None, "silu"),
    (64, None, None, "gelu_tanh"),
    (128, None, None, "gelu"),
    (128, 100, None, "leaky_relu"),
    (128, 256, None, "gelu_tanh"),
    (128, None, 64, "identity"),
]
BACKWARD_CASES = [  # width, dense keys, activation
    (64, None, "gelu_tanh"),
    (64, 128, "silu"),
    (64, None, "gelu"),
    (64, 256, "identity"),
    (128, 256, "gelu_tanh"),
    (128, 128, "relu_square"),
    (128, None, "silu"),
]
BLOCK_CASES = [  # heads, width, dense keys, activation
    (4, 128, 128, "gelu_tanh"),
    (3, 128, 256, "silu"),
    (8, 128, 64, "identity"),
    (2, 128, 100, "gelu"),
    (8, 64, 128, "gelu_tanh"),
    (4, 64, 64, "silu"),
]
BLOCK_BACKWARD_CASES = [  # heads, keys, activation
    (4, 64, "gelu_tanh"),
    (2, 40, "identity"),
    (8, 33, "silu"),
    (4, 128, "gelu_tanh"),
    (8, 100, "gelu"),
    (3, 65, "silu"),
]
SOFTMAX_CASES = [  # width, seeds, window
    (64, None, 100),
    (64, None, None),
    (64, 256, None),
    (128, None, 64),
    (128, None, None),
    (128, 256, None),
]
SEEDS_CASES = [  # width, seeds, adds to what others left
    (128, 256, False),
    (128, 256, True),
    (128, 100, False),
    (64, 256, False),
    (64, 100, True),
]

WINDOW_CASES = [  # width, window, activation
    (64, 128, "softmax"),
    (64, 128, "gelu_tanh"),
    (128, 64, "softmax"),
    (128, 64, "gelu"),
    (128, 64, "identity"),
]


def descriptor(rows: int, width: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {width}],{layout!r}>"


def compile_forward(width: int, keys: int | None, window: int | None, activation: str) -> str:
    """PTX of the kernel as `kernels.gdpa.hopper` launches it for such a problem."""
    problem = Problem(torch.bfloat16, 512, 4, width, 100_000, keys, window)
    tiles = hopper_tiles(problem)
    assert tiles is not None
    constants = {
        **ring(width, tiles), "JAGGED": keys is None, "WINDOW": window is not None, "ACTIVATION": activation,
        "APPROX": True,
    }  # fmt: skip
    query, key = descriptor(ROWS, width), descriptor(tiles.block_n, width)
    return build(_gdpa_fwd_hopper_kernel, {"q": query, "out": query, "k": key, "v": key}, constants)


def compile_backward(width: int, keys: int | None, activation: str) -> str:
    """PTX of GDPA's backward kernel."""
    problem = Problem(torch.bfloat16, 512, 4, width, 2**17, keys, None)
    rings = hopper_rings(problem)
    assert rings is not None
    constants = {
        "D": width, "SLOTS": rings.slots, "SWAPS": rings.swaps, "PLACES": rings.places, "KEPT": rings.kept,
        "PARTS": key_parts(problem), "JAGGED": keys is None, "ACTIVATION": activation, "APPROX": True,
    }  # fmt: skip
    described = dict.fromkeys(("q", "k", "v", "do", "dk", "dv"), descriptor(ROWS, width))
    described["dq"] = descriptor(ROWS, rings.dq_columns(width))
    return build(_gdpa_bwd_hopper_kernel, described, constants)


def compile_block(heads: int, width: int, keys: int, activation: str) -> str:
    """PTX of the GDPA block's forward in one kernel."""
    sequence, k = block_tensors(heads, width, keys)
    tiles = block_tiles(sequence, k, activation)
    assert tiles is not None
    constants = {"D": 128, "H": heads * width // 128, "ACTIVATION": activation, "APPROX": True}
    if isinstance(tiles, FewTiles):
        kernel, block_n, warps = _gdpa_block_fwd_hopper_kernel, tiles.ring.block_n, 4
        own = {"SLOTS": tiles.ring.slots, "REGISTERS": tiles.ring.registers, "S_SLOTS": tiles.queries}
    else:
        kernel, block_n, warps = _gdpa_block_fwd_many_hopper_kernel, tiles.block_n, 8
        own = {"PAIR": width == 64, "PARTS": tiles.parts, "PLACES": tiles.places, "KV_PLACES": tiles.kv_places}
    described = dict.fromkeys(("s", "out"), descriptor(ROWS, 128)) | dict.fromkeys("kv", descriptor(block_n, 128))
    return build(kernel, described, constants | own | {"BLOCK_N": block_n}, warps=warps)


def block_tensors(heads: int, width: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S and keys."""
    sequence = torch.empty(300_000, heads, width, dtype=torch.bfloat16, device="meta")
    return sequence, torch.empty(512, keys, heads, width, dtype=torch.bfloat16, device="meta")


def compile_block_backward(heads: int, keys: int, activation: str) -> str:
    """PTX of the GDPA block's backward in one kernel."""
    block_n = backward_keys(*block_tensors(heads, 128, keys), activation)
    assert block_n is not None
    constants = {
        "D": 128, "H": heads, "N": block_n, "PLACES": BACKWARD_PLACES, "ACTIVATION": activation, "APPROX": True,
    }  # fmt: skip
    described = dict.fromkeys(("s", "out", "do", "ds"), descriptor(ROWS, 128))
    described |= dict.fromkeys(("k", "v", "dk", "dv"), descriptor(block_n, 128))
    return build(_gdpa_block_bwd_hopper_kernel, described, constants, warps=8)


def ring(width: int, tiles: HopperTiles) -> dict[str, Any]:
    """Constants of kernels that stream keys and values through a ring."""
    return {
        "D": width, "BLOCK_N": tiles.block_n, "SLOTS": tiles.slots, "GROUPS": tiles.groups,
        "REGISTERS": tiles.registers,
    }  # fmt: skip


def compile_softmax(width: int, seeds: int | None, window: int | None) -> dict[str, str]:
    """PTX of the kernels that `kernels.attention.hopper` launches for such a problem."""
    ptx = {}
    flags = {"D": width, "SHARED": seeds is not None, "WINDOW": window is not None}
    tiles = forward_tiles(torch.bfloat16, width, False, seeds, window)
    if tiles is not None:
        query, key = descriptor(ROWS, width), descriptor(tiles.block_n, width)
        described = {"q": query, "out": query, "k": key, "v": key}
        ptx["forward"] = build(_softmax_fwd_hopper_kernel, described, {**flags, **ring(width, tiles)})
    backward = backward_tiles(torch.bfloat16, width, 4096, False, seeds, window)
    if backward is not None:
        constants = {**flags, "BLOCK": backward.block, "PART": backward.part, "SLOTS": backward.slots}
        described = dict.fromkeys(("q", "k", "v", "do", "dq", "dk", "dv"), descriptor(backward.block, width))
        ptx["backward"] = build(_softmax_bwd_hopper_kernel, described, constants)
    return ptx


def compile_seeds(width: int, seeds: int, adds: bool) -> str:
    """PTX of the kernel as `kernels.attention.hopper_seeds` launches it."""
    rings = seeds_rings(width, seeds)
    constants = {"D": width, "PARTS": rings.parts, "PLACES": rings.places, "DO_PLACES": rings.do_places, "ADDS": adds}
    described = dict.fromkeys(("q", "k", "v", "o", "do", "dk", "dv"), descriptor(ROWS, width))
    return build(_seeds_bwd_hopper_kernel, described, constants)


def compile_window_backward(width: int, window: int, activation: str) -> str:
    """PTX of the kernel as `kernels.window.hopper` launches it for such a problem."""
    slots = window_slots(torch.bfloat16, width, 4096, False, window)
    assert slots is not None
    constants = {
        "D": width, "SLOTS": slots, "REGISTERS": REGISTERS, "ACTIVATION": activation, "APPROX": True,
    }  # fmt: skip
    described = dict.fromkeys(("q", "k", "v", "do", "dq", "dk", "dv"), descriptor(ROWS, width))
    return build(_window_bwd_hopper_kernel, described, constants)


def build(kernel: Any, described: dict[str, str], constants: dict[str, Any], *, warps: int = 4) -> str:
    """PTX; other arguments are what their names say, strides those of four heads."""
    names = kernel.arg_names
    width = constants["D"]
    constants |= {n: 4 * width if n.endswith("t") else width for n in names if n.startswith("stride_")}
    types = dict.fromkeys(("out_pointer", "dq_pointer", "dk_pointer", "dv_pointer", "ds_pointer"), "*bf16")
    types |= dict.fromkeys(("inner", "outer", "scale", "scale_log2"), "fp32")
    types |= dict.fromkeys(("q_offsets", "kv_offsets", "offsets", "before", "counter", "tickets"), "*i32")
    types |= dict.fromkeys(("lse", "delta", "norms", "shares"), "*fp32") | {"boxes": "*i64"}
    types |= described | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in names}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return str(compiled.asm["ptx"])


def reused_barriers(ptx: str) -> list[int]:
    """Where in shared memory a barrier is made that nobody uses, so that Triton has put something else there.

    The card may write such a barrier back later: items off a counter were lost that way.
    """
    start = re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx)
    places = dict.fromkeys(start, 0)
    places |= {r: int(n) for r, base, n in re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", ptx) if base in start}
    barriers = {places[r] for r in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx) if r in places}
    if not barriers:
        raise RuntimeError("no barriers found: this Triton writes their addresses in another way")
    plain = {int(n or 0) for n in re.findall(r"(?:st|ld)\.shared\S*[^;]*\[global_smem\+?(\d*)\]", ptx)}
    found = re.findall(r"(?:st|ld)\.shared\S*[^;\[]*\[ ?(%r\d+) ?(?:\+ ?0)? ?\]", ptx)
    plain |= {places[r] for r in found if r in places}
    return sorted(b for b in barriers for p in plain if b - 4 < p < b + 8)


def assemble(ptx: str) -> str:
    """What the first assembler says that knows this version of PTX."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in ASSEMBLERS:
            command = [BINARIES / assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return done.stderr
    raise RuntimeError(done.stderr)


KINDS = {
    "": (CASES, compile_forward),
    "backward": (BACKWARD_CASES, compile_backward),
    "block": (BLOCK_CASES, compile_block),
    "block backward": (BLOCK_BACKWARD_CASES, compile_block_backward),
    "softmax": (SOFTMAX_CASES, compile_softmax),
    "seeds backward": (SEEDS_CASES, compile_seeds),
    "window backward": (WINDOW_CASES, compile_window_backward),
}


def report(kind: str, case: tuple[Any, ...]) -> str:
    """Of the kernels of one case."""
    compiled: Callable[..., str | dict[str, str]] = KINDS[kind][1]
    ptx = compiled(*case)
    lines = []
    for name, text in ptx.items() if isinstance(ptx, dict) else [("", ptx)]:
        lines.append(" ".join(map(str, ("case", *f"{kind} {name}".split(), *case))))
        lines.append(f"reused barriers {reused_barriers(text)}")
        lines.append(assemble(text))
    return "\n".join(lines)


if __name__ == "__main__":
    todo = [(kind, case) for kind, (cases, _) in KINDS.items() for case in cases]
    with ProcessPoolExecutor() as pool:
        for text in pool.map(report, *zip(*todo, strict=True)):
            print(text, flush=True)
