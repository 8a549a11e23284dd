"""Launches of Triton and Gluon kernels that cost the host little: Triton binds and compiles, the rest goes past it.

`kernel[grid](...)` binds, specializes and looks its arguments up at every call, in Python. Here the first launch of a
kernel with arguments of one kind takes that way, and its compiled kernel is kept; later ones call that at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from triton import knobs

_ALIGNMENT = 16  # bytes of a pointer, or a factor of an integer, that Triton compiles for
_BEFORE_FUNCTION = ("gridX", "gridY", "gridZ", "stream", "function")
_AFTER_FUNCTION = (  # in Triton 3.6 and 3.7, which mean the same
    ("args",),
    ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"),
)
_bound: dict[tuple[Any, ...], Bound] = {}


class _Compiled:
    """A compiled kernel: `run` launches it, given the grid, the stream, and `head` and `tail` around the arguments."""

    __slots__ = ("head", "run", "tail")

    def __init__(self, kernel: Any, compiled: Any, num_args: int) -> None:
        self.run: Callable[..., None] = compiled.run
        self.head = (compiled.function, compiled.packed_metadata, None, None, None)
        self.tail = (None,) * (len(kernel.arg_names) - num_args)  # constants, which the machine code has in it


class Bound:
    """A kernel with its constants: a call launches it. For launches that come again, made once and kept."""

    __slots__ = ("_by_kind", "_compiles", "_constants", "_kernel")

    def __init__(self, kernel: Any, **constants: Any) -> None:
        """See `launch`."""
        self._kernel = kernel
        self._constants = constants
        self._compiles = isinstance(kernel, triton.JITFunction)  # else Triton's interpreter
        self._by_kind: dict[tuple[Any, ...], _Compiled | None] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any) -> None:
        """See `launch`."""
        if not self._compiles:
            self._kernel[grid](*args, **self._constants)
            return
        device = torch.cuda.current_device()
        values, kinds = _specialize(args, device)
        key = (device, *kinds)
        found = self._by_kind.get(key)
        if found is None or _hooked():
            compiled = self._kernel[grid](*args, **self._constants)
            if key not in self._by_kind:
                self._by_kind[key] = _keep(self._kernel, compiled, len(args), self._constants)
            return
        stream = torch._C._cuda_getCurrentRawStream(device)
        found.run(grid[0], grid[1] if len(grid) > 1 else 1, 1, stream, *found.head, *values, *found.tail)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)`.

    Args:
        kernel: a jit function of Triton or Gluon; its parameters are those of `args` first, then constexprs.
        grid: one or two numbers of programs.
        args: tensors, integers, floats and tensor descriptors (`descriptor`).
        constants: the constexprs by name, hashable, and Triton's options.

    Raises ValueError for a tensor that is not on the current device.
    """
    key = (id(kernel), *constants, *constants.values())
    bound = _bound.get(key)
    if bound is None:
        bound = _bound[key] = Bound(kernel, **constants)
    bound(grid, *args)


def descriptor(kind: type, x: Tensor, view: tuple[list[int], list[int]], block: list[int], *layout: Any) -> Any:
    """`kind(x, *view, block, *layout)`, a TensorDescriptor of Triton or Gluon, without the checks `view` has passed."""
    new: Any = object.__new__(kind)
    new.base, (new.shape, new.strides), new.block_shape, new.padding = x, view, block, "zero"
    if layout:
        new.layout = layout[0]
    return new


def needs_gradient(*tensors: Tensor) -> bool:
    """Autograd has to see an op of these tensors; else `autograd.Function` would only cost time."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return wanted or forward_ad._current_level >= 0


def _hooked() -> bool:
    """A profiler wants to see launches: a chain of hooks has some, or one was set in the chain's place."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _specialize(args: Sequence[Any], device: int) -> tuple[list[Any], list[Any]]:
    """What the compiled kernel takes for each argument, and all that Triton would compile another kernel for."""
    values: list[Any] = []
    kinds: list[Any] = []
    pointers = 0
    for x in args:
        if isinstance(x, Tensor):
            if x.get_device() != device:
                raise ValueError(f"a kernel on the current device {device} got a tensor on {x.device}")
            pointer = x.data_ptr()
            values.append(pointer)
            kinds.append(x.dtype)
            pointers |= pointer
        elif isinstance(x, int):
            values.append(x)
            low = x % _ALIGNMENT == 0
            kinds.append((2 if x == 1 else low) if -(2**31) <= x < 2**31 else (low,))
        elif isinstance(x, float):
            values.append(x)
            kinds.append(float)
        else:
            if x.base.get_device() != device:
                raise ValueError(f"a kernel on the current device {device} got a tensor on {x.base.device}")
            values.append(x)
            kinds.append((x.base.dtype, *x.block_shape, getattr(x, "layout", None)))
    if pointers % _ALIGNMENT:  # rare
        kinds += [isinstance(x, Tensor) and x.data_ptr() % _ALIGNMENT == 0 for x in args]
    return values, kinds


def _keep(kernel: Any, compiled: Any, num_args: int, constants: dict[str, Any]) -> _Compiled | None:
    """None where Triton has to launch: a version that is made otherwise, hooks, scratch memory."""
    if not set(kernel.arg_names[num_args:]) <= constants.keys():
        return None
    try:
        names = tuple(inspect.signature(compiled.run).parameters)
        direct = _Compiled(kernel, compiled, num_args)
        scratch = compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size
    except (AttributeError, TypeError, ValueError):
        return None
    known = names[:5] == _BEFORE_FUNCTION and names[5:] in _AFTER_FUNCTION
    return direct if known and not scratch and not kernel.pre_run_hooks else None
