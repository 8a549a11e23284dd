"""Launches past Triton's binder: the kernel that Triton would launch, and Triton's own way where that is needed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from kernels import launcher  # noqa: E402

DEVICE, STREAM = -1, 7  # CPU tensors' device index: nothing is run


class Metadata:
    global_scratch_size = 0
    profile_scratch_size = 0


class Compiled:
    """As Triton's, of a kernel of three arguments and a constant; notes what it is run with."""

    function = "function"
    packed_metadata = "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.metadata = Metadata()

    def run(self, gridX: int, gridY: int, gridZ: int, stream: int, function: str, *args: Any) -> None:
        self.runs.append((gridX, gridY, gridZ, stream, function, *args))


class Kernel:
    """Stands for a jit function: notes the launches that take Triton's own way."""

    arg_names = ("x", "n", "scale", "BLOCK")

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.launches = 0
        self.pre_run_hooks: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            self.launches += 1
            return self.compiled

        return run


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "JITFunction", Kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: DEVICE)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(launcher, "_bound", {})


def test_the_second_launch_calls_the_compiled_kernel_with_what_it_was_given() -> None:
    kernel, x = Kernel(Compiled()), torch.zeros(8)
    launcher.launch(kernel, (5,), x, 3, 0.5, BLOCK=16, num_warps=4)
    launcher.launch(kernel, (6, 2), x, 4, 0.25, BLOCK=16, num_warps=4)
    assert kernel.launches == 1
    assert kernel.compiled.runs == [
        (6, 2, 1, STREAM, "function", "metadata", None, None, None, x.data_ptr(), 4, 0.25, None)
    ]


def test_another_constant_option_type_or_alignment_is_another_kernel() -> None:
    kernel, x = Kernel(Compiled()), torch.zeros(8)
    for tensor, n, constants in [
        (x, 3, {"BLOCK": 16, "num_warps": 4}),
        (x, 3, {"BLOCK": 32, "num_warps": 4}),
        (x, 3, {"BLOCK": 16, "num_warps": 8}),
        (x[1:], 3, {"BLOCK": 16, "num_warps": 4}),
        (x.int(), 3, {"BLOCK": 16, "num_warps": 4}),
        (x, 16, {"BLOCK": 16, "num_warps": 4}),
        (x, 1, {"BLOCK": 16, "num_warps": 4}),
        (x, 2**31, {"BLOCK": 16, "num_warps": 4}),
    ]:
        before = kernel.launches
        launcher.launch(kernel, (1,), tensor, n, 0.5, **constants)
        assert kernel.launches == before + 1


def test_what_triton_compiles_another_kernel_for_is_told_apart() -> None:
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    backend = make_backend(GPUTarget("cuda", 90, 32))
    x = torch.zeros(64, 64)
    integers = [0, 1, -1, 2, 15, 16, -16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**31 + 16, 2**40]
    tensors = [x.to(d) for d in (torch.float32, torch.bfloat16, torch.int32, torch.int64)]
    tensors += [t.flatten()[1:] for t in tensors]
    described = [
        TensorDescriptor(t, [64, 64], [64, 1], block) for t in tensors[:2] for block in ([16, 64], [32, 64], [64, 16])
    ]
    for one, other in itertools.combinations([*integers, 0.5, *tensors, *described], 2):
        theirs = [specialize(type(backend), a, False, True, True) for a in (one, other)]
        ours = [launcher._specialize([a], DEVICE)[1] for a in (one, other)]
        assert theirs[0] == theirs[1] or ours[0] != ours[1], (one, other)


def test_a_descriptor_is_what_triton_would_have_made() -> None:
    x = torch.zeros(8, 32)
    assert launcher.descriptor(TensorDescriptor, x, ([8, 32], [32, 1]), [4, 32]) == TensorDescriptor(
        x, [8, 32], [32, 1], [4, 32]
    )


def test_a_version_that_launches_otherwise_is_left_to_triton() -> None:
    class Other(Compiled):
        def run(self, grid: tuple[int, ...], stream: int, function: str, *args: Any) -> None:  # type: ignore[override]
            raise AssertionError("called with another version's arguments")

    kernel, x = Kernel(Other()), torch.zeros(8)
    for _ in range(3):
        launcher.launch(kernel, (1,), x, 3, 0.5, BLOCK=16)
    assert kernel.launches == 3


def test_scratch_memory_is_left_to_triton() -> None:
    kernel, x = Kernel(Compiled()), torch.zeros(8)
    kernel.compiled.metadata.global_scratch_size = 128
    for _ in range(3):
        launcher.launch(kernel, (1,), x, 3, 0.5, BLOCK=16)
    assert kernel.launches == 3


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("chained", [True, False])
def test_a_profilers_hook_sees_every_launch(name: str, chained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(Compiled()), torch.zeros(8)

    def hook(metadata: Any) -> None: ...

    launcher.launch(kernel, (1,), x, 3, 0.5, BLOCK=16)
    with monkeypatch.context() as patch:
        chain: Any = knobs.HookChain()
        chain.add(hook)
        patch.setattr(knobs.runtime, name, chain if chained else hook)
        launcher.launch(kernel, (1,), x, 3, 0.5, BLOCK=16)
        patch.setattr(knobs.runtime, name, None)
        launcher.launch(kernel, (1,), x, 3, 0.5, BLOCK=16)
    launcher.launch(kernel, (1,), x, 3, 0.5, BLOCK=16)
    assert (kernel.launches, len(kernel.compiled.runs)) == (2, 2)


def test_a_tensor_elsewhere_is_refused_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(ValueError, match="device 3 got a tensor on cpu"):
        launcher.launch(Kernel(Compiled()), (1,), torch.zeros(8), 3, 0.5, BLOCK=16)


def test_autograd_is_asked_only_where_a_gradient_can_be_wanted() -> None:
    x, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert launcher.needs_gradient(x, leaf)
    assert not launcher.needs_gradient(x)
    with torch.no_grad():
        assert not launcher.needs_gradient(leaf)
        with torch.autograd.forward_ad.dual_level():
            assert launcher.needs_gradient(x)
