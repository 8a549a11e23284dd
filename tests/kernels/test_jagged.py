"""Grouping by length changes the speed, never the result."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import LENGTHS, check_close, offsets_of
from torch import Tensor

from kernels.gdpa import gdpa
from kernels.gdpa import reference as gdpa_reference
from kernels.jagged import Blocks, group_by_length
from kernels.seed_attention import reference as seed_reference
from kernels.seed_attention import seed_attention
from kernels.window_attention import reference as window_reference
from kernels.window_attention import window_attention


def one_group(sizes_B: Tensor) -> list[Tensor]:
    """What a device does."""
    return [torch.arange(len(sizes_B))]


def results(lengths: list[int]) -> list[Tensor]:
    torch.manual_seed(0)
    offsets = offsets_of(lengths)
    x, k = torch.randn(sum(lengths), 2, 4, requires_grad=True), torch.randn(len(lengths), 5, 2, 4)
    out = [
        gdpa(x, offsets, k, k),
        gdpa(x, offsets, x, x, kv_offsets=offsets, window=1),
        window_attention(x, x, x, offsets, window=1),
        seed_attention(k[0], x, x, offsets),
    ]
    return [*out, *(torch.autograd.grad(o.square().sum(), x, retain_graph=True)[0] for o in out)]


@pytest.mark.parametrize("case", ["ragged", "all_empty", "one_row"])
def test_one_padded_group_gives_the_same_as_many(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    many = results(LENGTHS[case])
    for module in (gdpa_reference, window_reference, seed_reference):
        monkeypatch.setattr(module, "group_by_length", one_group)
    for i, (one, expected) in enumerate(zip(results(LENGTHS[case]), many, strict=True)):
        check_close(f"result {i}", one, expected, 1e-5)


def test_padding_at_most_doubles_the_rows() -> None:
    lengths = [*range(70), *range(70)]
    groups = group_by_length(torch.tensor(lengths))
    blocks = Blocks(offsets_of(lengths), groups)
    assert sorted(torch.cat(groups).tolist()) == list(range(140))
    assert sum(valid_GL.numel() for valid_GL in blocks.valid) < 2 * sum(lengths)
    assert sum(int(valid_GL.sum()) for valid_GL in blocks.valid) == sum(lengths)
    x = torch.randn(sum(lengths), 3)
    assert torch.equal(blocks.scatter(blocks.gather(x)), x)
