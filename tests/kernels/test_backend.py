"""Backends are asked for, never guessed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging

import pytest
import torch

from kernels.backend import BackendUnavailable, choose_backend
from kernels.gdpa import gdpa

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def reference() -> torch.Tensor:
    return torch.zeros(1)


def fast() -> torch.Tensor:
    return torch.ones(1)


BOTH = {"reference": reference, "triton": fast}


def test_triton_is_refused_where_the_op_has_none() -> None:
    with pytest.raises(BackendUnavailable, match=r"gdpa: .* no Triton kernels; use 'auto' or 'reference'"):
        choose_backend("triton", op="gdpa", device=CUDA, implementations={"reference": reference})


def test_triton_is_refused_on_cpu() -> None:
    with pytest.raises(BackendUnavailable, match="on cpu"):
        choose_backend("triton", op="gdpa", device=CPU, implementations=BOTH)


def test_public_call_refuses_triton_on_cpu() -> None:
    q, k = torch.zeros(1, 1, 2), torch.zeros(1, 1, 1, 2)
    with pytest.raises(BackendUnavailable):
        gdpa(q, torch.tensor([0, 1], dtype=torch.int32), k, k, backend="triton")


def test_auto_prefers_triton_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    assert choose_backend("auto", op="here", device=CUDA, implementations=BOTH) is fast
    assert choose_backend("auto", op="here", device=CPU, implementations=BOTH) is reference
    assert choose_backend("reference", op="here", device=CUDA, implementations=BOTH) is reference


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="kernels.backend")
    for _ in range(3):
        choose_backend("auto", op="said_once", device=CPU, implementations=BOTH)
    choose_backend("reference", op="not_said", device=CPU, implementations=BOTH)
    assert [r.getMessage() for r in caplog.records] == [
        "said_once on cpu: backend 'reference' (the tensors are on cpu)"
    ]


def test_the_choice_survives_torch_compile() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        run = choose_backend("auto", op="compiled", device=x.device, implementations={"reference": torch.neg})
        return run(x)

    assert torch.equal(torch.compile(choose, fullgraph=True, backend="eager")(torch.ones(1)), -torch.ones(1))
