"""The whole Kunlun: switches, independence of rows, gradients, learning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from das.errors import ConfigError
from das.zipper import heads
from foundation_model.batch import Batch, JaggedSequence
from foundation_model.features import InputSpec, SequenceSpec, TableLayout
from foundation_model.kunlun import Kunlun, KunlunConfig, merge_by_time
from foundation_model.layers.gdpa_pffn import GdpaPffn
from foundation_model.layers.hsp import HierarchicalSeedPooling
from foundation_model.layers.swa import SlidingWindowAttention

NUM_IDS = 50
TOWER = {"width": 8, "heads": 2, "n_tok": 2, "n_seed": 4, "kron_terms": 2, "n_kv": 4, "window": 2}
SMALL: dict[str, Any] = {
    "width": 8,
    "embedding_dim": 4,
    "embedding_init_std": 1.0,
    "num_layers": 2,
    "n_sum": 4,
    "num_numeric_tokens": 2,
    "tower": TOWER,
    "event_hidden": 8,
    "wukong_rank": 3,
    "wukong_hidden": 16,
    "head_hidden": (8,),
}
SPEC = InputSpec(
    tables=TableLayout(("item",), (NUM_IDS,), (0,)),
    categorical=("item", "tag", "user"),
    numeric=("rate", "age"),
    sequences=(SequenceSpec("clicks", "click", ("item", "tag"), 50), SequenceSpec("views", "view", ("item",), 50)),
    domains=("a", "b", "c"),
    objectives=("click", "view"),
    heads=heads((("click", 1), ("view", 1)), None),
)


def sequence(lengths: list[int], num_fields: int) -> JaggedSequence:
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ages = [torch.zeros(0), *(torch.rand(n).mul(1e5).sort(descending=True).values for n in lengths)]
    return JaggedSequence(torch.randint(0, NUM_IDS, (sum(lengths), num_fields)), offsets, torch.cat(ages))


def make_batch(clicks: list[int], views: list[int], seed: int = 0) -> Batch:
    torch.manual_seed(seed)
    rows = len(clicks)
    return Batch(
        cat_BC=torch.randint(0, NUM_IDS, (rows, 3)),
        num_BN=torch.randn(rows, 2),
        seqs={"clicks": sequence(clicks, 2), "views": sequence(views, 1)},
        labels_BK=torch.randint(0, 2, (rows, 2)).float(),
        label_mask_BK=torch.ones(rows, 2, dtype=torch.bool),
        domain_B=torch.arange(rows) % 3,
        event_time_ms_B=np.zeros(rows, np.int64),
        ingest_time_ms_B=np.zeros(rows, np.int64),
    )


def make_model(seed: int = 0, **changes: Any) -> Kunlun:
    torch.manual_seed(seed)
    return Kunlun(KunlunConfig.model_validate({**SMALL, **changes}), SPEC).eval()


SWITCHES: dict[str, dict[str, Any]] = {
    "as_is": {},
    "bilinear_pffn": {"pffn": "bilinear"},
    "pma": {"pooling": "pma"},
    "full_attention": {"windowed": False},
    "no_compute_skip": {"compute_skip": False},
    "one_shared_tower": {"personalized_towers": False},
    "one_expert": {"num_experts": 1},
    "no_time_encoding": {"time_encoding": False},
    "no_final_pool": {"final_pool": False, "num_layers": 3},
    "raw_numbers": {"normalize_numbers": False},
    "no_domain_token": {"domain_token": False},
    "no_domain_head": {"domain_head": "none"},
    "fewer_interaction_tokens": {"interaction_tokens": 5},
    "own_towers": {"towers": {"clicks": {**TOWER, "width": 16, "heads": 4, "n_tok": 3, "depth": 1}}},
    "no_tower_layers": {"tower": {**TOWER, "depth": 0}},
    "one_layer": {"num_layers": 1},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_runs_and_every_parameter_learns(switch: str) -> None:
    model, batch = make_model(**SWITCHES[switch]), make_batch([3, 0, 9, 1, 0], [0, 0, 2, 7, 1])
    logits = model(batch)
    assert logits.shape == (5, 2)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels_BK)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        grad = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
        assert torch.isfinite(grad).all(), name


@pytest.mark.parametrize("switch", [s for s in SWITCHES if s != "as_is"])
def test_every_switch_changes_the_model(switch: str) -> None:
    """Same seed, same input: a switch that is not wired would give the same parameters and logits."""
    batch = make_batch([3, 0, 9, 1, 12], [8, 0, 2, 7, 1])
    usual = {"final_pool": True, "num_layers": 3} if switch == "no_final_pool" else {}
    with_switch, without = make_model(**SWITCHES[switch]), make_model(**usual)
    names = {name for name, _ in with_switch.named_parameters()} ^ {name for name, _ in without.named_parameters()}
    for model in (with_switch, without):
        model.train()(batch)  # moves the running statistics off their start
        model.eval()
        if model.heads.bias_DK is not None:
            nn.init.ones_(model.heads.bias_DK)
    assert names or not torch.allclose(with_switch(batch), without(batch), atol=1e-4)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_row_does_not_depend_on_its_neighbours(switch: str) -> None:
    model, batch = make_model(**SWITCHES[switch]), make_batch([3, 0, 40, 1, 0], [0, 0, 2, 7, 1])
    with torch.no_grad():
        together = model(batch)
        for row in range(5):
            alone = model(batch.slice(row, row + 1))
            torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)


def test_the_order_of_rows_does_not_matter() -> None:
    model, batch = make_model(), make_batch([3, 0, 40, 1], [0, 5, 2, 7])
    order = [2, 0, 3, 1]
    shuffled = Batch.concat([batch.slice(i, i + 1) for i in order])
    with torch.no_grad():
        torch.testing.assert_close(model(shuffled), model(batch)[order], rtol=1e-5, atol=1e-5)


def test_rows_without_any_history_are_finite_in_value_and_gradient() -> None:
    model, batch = make_model(), make_batch([0, 0, 0], [0, 0, 0])
    logits = model(batch)
    logits.square().sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.heads.parameters() if p.grad is not None)


def test_no_rows_give_no_logits() -> None:
    assert make_model()(make_batch([], [])).shape == (0, 2)


def test_the_history_reaches_the_logits_and_so_does_its_age() -> None:
    model, batch = make_model(), make_batch([3, 4], [2, 2])
    before = model(batch)
    batch.seqs["views"].ids_TF[0] = (batch.seqs["views"].ids_TF[0] + 1) % NUM_IDS
    after = model(batch)
    assert not torch.allclose(before[0], after[0], atol=1e-6)
    torch.testing.assert_close(before[1], after[1])
    batch.seqs["clicks"].age_s[4] += 1e6
    assert not torch.allclose(after[1], model(batch)[1], atol=1e-6)


def test_without_time_encoding_ages_change_nothing() -> None:
    batch = make_batch([3, 4], [2, 2])
    aged = make_batch([3, 4], [2, 2])
    for sequence_ in aged.seqs.values():
        sequence_.age_s.mul_(3.0)
    model = make_model(time_encoding=False)
    assert torch.equal(model(batch), model(aged))
    assert not torch.allclose(make_model()(batch), make_model()(aged), atol=1e-6)


def test_context_reaches_the_sequence_through_gdpa() -> None:
    """With the interaction's path to the head cut, a number can still move the logits through GDPA's keys."""
    model, batch = make_model(num_layers=1), make_batch([3], [2])
    with torch.no_grad():
        for trunk in model.heads.trunks:
            trunk[0][0].weight[:, : 8 * 8] = 0.0
    before = model(batch)
    batch.num_BN[0] += 3.0
    assert not torch.allclose(before, model(batch), atol=1e-6)


class Calls:
    """Counts the forward passes of each kind of layer."""

    def __init__(self, model: nn.Module) -> None:
        self.counts = dict.fromkeys((GdpaPffn, SlidingWindowAttention, HierarchicalSeedPooling), 0)
        for module in model.modules():
            if type(module) in self.counts:
                module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.counts[type(module)] += 1  # type: ignore[index]


def test_compute_skip_halves_the_work_of_each_tower() -> None:
    batch = make_batch([3, 1], [2, 2])
    skipping, full = make_model(num_layers=4), make_model(num_layers=4, compute_skip=False)
    skipped, done = Calls(skipping), Calls(full)
    skipping(batch)
    full(batch)
    assert skipped.counts == {GdpaPffn: 4, SlidingWindowAttention: 4, HierarchicalSeedPooling: 6}
    assert done.counts == {GdpaPffn: 8, SlidingWindowAttention: 8, HierarchicalSeedPooling: 10}


def test_a_shallow_tower_keeps_its_last_pool() -> None:
    batch = make_batch([3, 1], [2, 2])
    model = make_model(num_layers=4, towers={"clicks": {**TOWER, "depth": 1}, "views": {**TOWER, "depth": 0}})
    calls = Calls(model)
    model(batch)
    assert calls.counts == {GdpaPffn: 1, SlidingWindowAttention: 0, HierarchicalSeedPooling: 2 + 1}


def test_domains_can_part_by_token_and_by_head() -> None:
    batch = make_batch([3, 3, 3], [2, 2, 2])
    same = Batch.concat([batch.slice(0, 1)] * 3)
    moved = Batch(
        same.cat_BC, same.num_BN, same.seqs, same.labels_BK, same.label_mask_BK, torch.arange(3),
        same.event_time_ms_B, same.ingest_time_ms_B,
    )  # fmt: skip
    tied = make_model(domain_token=False, domain_head="none")(moved)
    torch.testing.assert_close(tied[0], tied[1])
    by_token = make_model(domain_head="none")(moved)
    assert not torch.allclose(by_token[0], by_token[1], atol=1e-5)
    headed = make_model(domain_token=False, domain_head="bias")
    torch.testing.assert_close(headed(moved)[0], headed(moved)[1])
    with torch.no_grad():
        assert headed.heads.bias_DK is not None
        headed.heads.bias_DK[1] = torch.tensor([0.5, -2.0])
    difference = headed(moved)[1] - headed(moved)[0]
    torch.testing.assert_close(difference, torch.tensor([0.5, -2.0]))


def test_merge_by_time_interleaves_each_row_oldest_first() -> None:
    first = JaggedSequence(
        torch.zeros(3, 1, dtype=torch.int64), torch.tensor([0, 2, 3]).int(), torch.tensor([9.0, 1, 4])
    )
    second = JaggedSequence(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([0, 1, 2]).int(), torch.tensor([5.0, 4]))
    order, offsets = merge_by_time([first, second])
    assert order.tolist() == [0, 3, 1, 2, 4]
    assert offsets.tolist() == [0, 3, 5]
    assert offsets.dtype == torch.int32


def test_a_model_without_sequences_or_numbers_runs() -> None:
    spec = InputSpec(SPEC.tables, SPEC.categorical, (), (), SPEC.domains, SPEC.objectives, SPEC.heads)
    batch = make_batch([1, 2], [0, 1])
    bare = Batch(
        batch.cat_BC, batch.num_BN[:, :0], {}, batch.labels_BK, batch.label_mask_BK, batch.domain_B,
        batch.event_time_ms_B, batch.ingest_time_ms_B,
    )  # fmt: skip
    assert Kunlun(KunlunConfig.model_validate(SMALL), spec)(bare).shape == (2, 2)


def test_it_learns_a_rule_that_needs_the_history() -> None:
    """Click iff the last clicked item is even: nothing in the context tells."""
    model = make_model(embedding_init_std=0.1).train()
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "embeddings" not in n], lr=5e-3)
    tables = torch.optim.SparseAdam(list(model.embeddings.parameters()), lr=2e-2)
    losses = []
    for step in range(120):
        batch = make_batch([1 + i % 2 for i in range(64)], [0] * 64, seed=step)
        last = batch.seqs["clicks"].offsets[1:].long() - 1
        label = (batch.seqs["clicks"].ids_TF[last, 0] % 2 == 0).float()
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch)[:, 0], label)
        optimizer.zero_grad()
        tables.zero_grad()
        loss.backward()
        optimizer.step()
        tables.step()
        losses.append(loss.item())
    assert np.mean(losses[-20:]) < 0.4


def test_presets_expand_and_take_changes() -> None:
    assert KunlunConfig.model_validate("small") == KunlunConfig.small()
    assert KunlunConfig.model_validate({"preset": "small", "n_sum": 3}) == KunlunConfig.small(n_sum=3)
    assert KunlunConfig.model_validate("default") == KunlunConfig()
    assert KunlunConfig.small() != KunlunConfig()
    assert KunlunConfig.model_validate(KunlunConfig.small().model_dump()) == KunlunConfig.small()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("tiny", "unknown preset 'tiny'; known: default, small"),
        ({"activation": "softmax"}, "'softmax' is not one of"),
        ({"tower": {"width": 10, "heads": 4}}, "not a multiple of 2 \\* heads"),
        ({"n_sums": 3}, "did you mean 'n_sum'"),
        ({"preset": "small", "width": 0}, "width"),
    ],
)
def test_a_wrong_configuration_says_what_to_change(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KunlunConfig.parse(data)


def test_a_tower_of_an_unknown_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no sequence \['buys'\]; known: clicks, views"):
        make_model(towers={"buys": TOWER})
