"""Backends are asked for, never guessed: only "auto" may choose, and it says once what it chose."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar, get_args

import torch

Backend = Literal["triton", "reference", "auto"]
_BACKENDS = get_args(Backend)
F = TypeVar("F", bound=Callable[..., torch.Tensor])
_logger = logging.getLogger(__name__)


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run this op on this device; the message says what to ask for instead."""


def choose_backend(backend: Backend, *, op: str, device: torch.device, implementations: Mapping[str, F]) -> F:
    """The implementation of `op` that runs on `device`.

    Args:
        backend: "reference" and "triton" give exactly that; "auto" prefers Triton where it runs.
        op: name for messages.
        device: where the op's tensors are.
        implementations: by backend; "reference" is always there, "triton" once the op has Triton kernels.

    Raises:
        BackendUnavailable: "triton" was asked for and the op has no Triton kernels or the device cannot run them.
        ValueError: `backend` is none of the three words.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"{op}: unknown backend '{backend}'; use one of {', '.join(_BACKENDS)}")
    problem = _triton_problem(device, implementations)
    if backend == "triton" and problem:
        raise BackendUnavailable(f"{op}: backend 'triton' is not available: {problem}; use 'auto' or 'reference'")
    chosen = backend if backend != "auto" else "reference" if problem else "triton"
    if backend == "auto":
        _log_choice(op, device.type, chosen, problem)
    return implementations[chosen]


def _triton_problem(device: torch.device, implementations: Mapping[str, F]) -> str:
    """Why Triton cannot run here; empty if it can."""
    if "triton" not in implementations:
        return "the op has no Triton kernels"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if not _triton_installed():
        return "triton is not installed"
    return ""


@torch.compiler.assume_constant_result  # torch.compile cannot trace the import machinery
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result  # nor logging: a compiled graph logs when it is traced
def _log_choice(op: str, device_type: str, chosen: str, problem: str) -> None:
    _log_once(op, device_type, chosen, problem)


@functools.cache
def _log_once(op: str, device_type: str, chosen: str, problem: str) -> None:
    """Log one choice; the cache makes it once per op and device type."""
    _logger.info("%s on %s: backend '%s'%s", op, device_type, chosen, f" ({problem})" if problem else "")
