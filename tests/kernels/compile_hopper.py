"""Compiles the Gluon kernels for sm_90a without a GPU; prints what the assembler says of each.

A process of its own: where tests run in Triton's interpreter, nothing can be compiled.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.gdpa.hopper import hopper_rings, hopper_tiles
from kernels.gdpa.hopper_backward import _gdpa_bwd_hopper_kernel
from kernels.gdpa.hopper_forward import _gdpa_fwd_hopper_kernel
from kernels.gdpa.tiles import Problem

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ASSEMBLERS = ("ptxas", "ptxas-blackwell")  # the second is newer; which one a Hopper gets depends on Triton's version
CASES = [  # width, dense keys, window, activation
    (32, None, None, "silu"),
    (64, None, None, "gelu_tanh"),
    (128, None, None, "gelu"),
    (128, 256, None, "gelu_tanh"),
    (128, None, 64, "identity"),
]
BACKWARD_CASES = [  # width, dense keys, activation
    (64, None, "gelu_tanh"),
    (64, 128, "silu"),
    (128, 256, "gelu_tanh"),
]


def descriptor(rows: int, width: int) -> str:
    layout = gl.NVMMASharedLayout.get_default_for([rows, width], gl.bfloat16)
    return f"tensordesc<bf16[{rows}, {width}],{layout!r}>"


def compile_forward(width: int, keys: int | None, window: int | None, activation: str) -> str:
    """PTX of the kernel as `kernels.gdpa.hopper` launches it for such a problem."""
    problem = Problem(torch.bfloat16, 512, 4, width, 100_000, keys, window)
    tiles = hopper_tiles(problem)
    assert tiles is not None
    constants: dict[str, Any] = {
        "D": width, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "SLOTS": tiles.slots, "EARLY": tiles.early,
        "JAGGED": keys is None, "WINDOW": window is not None, "ACTIVATION": activation, "APPROX": True,
        "stride_ot": 4 * width, **dict.fromkeys(("stride_qh", "stride_kh", "stride_vh", "stride_oh"), width),
    }  # fmt: skip
    query, key = descriptor(tiles.block_m, width), descriptor(tiles.block_n, width)
    types = {"q": query, "out": query, "k": key, "v": key, "out_pointer": "*bf16", "inner": "fp32", "outer": "fp32"}
    types |= dict.fromkeys(("q_offsets", "kv_offsets"), "*i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in _gdpa_fwd_hopper_kernel.arg_names}
    return compile_kernel(_gdpa_fwd_hopper_kernel, signature, constants, tiles.num_warps)


def compile_backward(width: int, keys: int | None, activation: str) -> str:
    rings = hopper_rings(Problem(torch.bfloat16, 512, 4, width, 300_000, keys, None))
    assert rings is not None
    constants: dict[str, Any] = {
        "D": width, "SLOTS": rings.slots, "SWAPS": rings.swaps, "PLACES": rings.places,
        "PARTS": 2 if keys == 256 else 1, "JAGGED": keys is None, "ACTIVATION": activation, "APPROX": True,
        "stride_gt": 4 * width,
        **dict.fromkeys(("stride_qh", "stride_kh", "stride_vh", "stride_doh", "stride_gh"), width),
    }  # fmt: skip
    types = dict.fromkeys(("q", "k", "v", "do", "dk", "dv"), descriptor(64, width)) | {"dq": descriptor(64, width // 2)}
    types |= dict.fromkeys(("dq_pointer", "dk_pointer", "dv_pointer"), "*bf16") | {"inner": "fp32", "outer": "fp32"}
    types |= dict.fromkeys(("counter", "q_offsets", "kv_offsets"), "*i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in _gdpa_bwd_hopper_kernel.arg_names}
    return compile_kernel(_gdpa_bwd_hopper_kernel, signature, constants, 4)


def compile_kernel(kernel: Any, signature: dict[str, str], constants: dict[str, Any], num_warps: int) -> str:
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    return str(compiled.asm["ptx"])


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


if __name__ == "__main__":
    for case in CASES:
        print("case", *case)
        print(assemble(compile_forward(*case)), flush=True)
    for backward_case in BACKWARD_CASES:
        print("case backward", *backward_case)
        print(assemble(compile_backward(*backward_case)), flush=True)
