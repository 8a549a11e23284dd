"""A kernel that tells which example each turn is for; on Hopper, where Gluon compiles."""

# mypy: disable-error-code="no-untyped-def"
# Device code: Gluon gives the arguments their types at launch.
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.hopper_ring import example


@gluon.jit
def turns_kernel(offsets, found, num_examples):
    turn = gl.program_id(0)
    gl.store(found + turn, example(turn, num_examples, offsets))
