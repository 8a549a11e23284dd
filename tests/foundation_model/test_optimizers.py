"""Optimizers: sparse tables and dense parameters step together, refuse bad gradients and resume to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from das.errors import ConfigError
from foundation_model.embeddings import EmbeddingTables
from foundation_model.features import TableLayout
from foundation_model.optimizers import OptimizerConfig, Optimizers

LAYOUT = TableLayout(("a", "b"), (10, 5), (0, 10))


class Tower(nn.Module):
    """Sum of a linear map of the looked-up rows."""

    def __init__(self, width: int = 4, *, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tables = EmbeddingTables(LAYOUT, width, init_std=0.1, sparse=sparse)
        self.linear = nn.Linear(width, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.tables(ids)).square().mean()


def _train(model: Tower, optimizers: Optimizers, steps: range) -> None:
    for i in steps:
        generator = torch.Generator().manual_seed(i)
        loss = model(torch.randint(0, 15, (6, 2), generator=generator))
        optimizers.zero_grad()
        loss.backward()
        assert optimizers.step(loss)


def test_resumed_training_is_bit_identical() -> None:
    config = OptimizerConfig(warmup_steps=7)
    straight = Tower()
    _train(straight, Optimizers(straight, config), range(20))

    first = Tower()
    optimizers = Optimizers(first, config)
    _train(first, optimizers, range(9))
    state = {name: t.clone() for name, t in optimizers.state_tensors().items()}
    weights = {name: t.clone() for name, t in first.state_dict().items()}
    second = Tower()
    second.load_state_dict(weights)
    resumed = Optimizers(second, config)
    resumed.load_state_tensors(state)
    _train(second, resumed, range(9, 20))

    for name, expected in straight.state_dict().items():
        assert torch.equal(second.state_dict()[name], expected), name


def test_rows_outside_the_batch_do_not_move() -> None:
    model = Tower()
    optimizers = Optimizers(model, OptimizerConfig())
    before = model.tables.embedding.weight.detach().clone()
    model(torch.tensor([[1, 12], [1, 3]])).backward()
    optimizers.step(torch.tensor(0.0))
    moved = (model.tables.embedding.weight != before).any(dim=1).nonzero().flatten()
    assert moved.tolist() == [1, 3, 12]


def test_sparse_step_equals_dense_adagrad() -> None:
    sparse, dense = Tower(), Tower(sparse=False)
    optimizers = Optimizers(sparse, OptimizerConfig(clip_norm=0.01))
    reference = torch.optim.Adagrad([dense.tables.embedding.weight], lr=0.02, eps=1e-8)
    ids = torch.tensor([[1, 12], [1, 3], [1, 1]])
    for _ in range(3):
        loss = sparse(ids)
        optimizers.zero_grad()
        loss.backward()
        optimizers.step(loss)
        dense.zero_grad()
        dense(ids).backward()
        torch.nn.utils.clip_grad_norm_(dense.parameters(), 0.01)
        reference.step()
        dense.linear.load_state_dict(sparse.linear.state_dict())
    torch.testing.assert_close(sparse.tables.embedding.weight, dense.tables.embedding.weight)


@pytest.mark.parametrize("where", ["loss", "dense", "table"])
def test_a_non_finite_step_changes_nothing(where: str) -> None:
    model = Tower()
    optimizers = Optimizers(model, OptimizerConfig())
    _train(model, optimizers, range(2))
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t.clone() for name, t in optimizers.state_tensors().items()}
    loss = model(torch.tensor([[1, 12]]))
    optimizers.zero_grad()
    loss.backward()
    if where == "dense":
        model.linear.weight.grad[0, 0] = float("nan")
    if where == "table":
        model.tables.embedding.weight.grad._values()[0, 0] = float("inf")
    assert not optimizers.step(loss * float("nan") if where == "loss" else loss)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    after = optimizers.state_tensors()
    assert after.keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in after.items())


def test_gradients_are_clipped_by_their_global_norm() -> None:
    model = Tower()
    optimizers = Optimizers(model, OptimizerConfig(clip_norm=1e-3))
    loss = 1e6 * model(torch.tensor([[1, 12], [1, 3]]))
    loss.backward()
    optimizers.step(loss)
    parts = [model.linear.weight.grad, model.linear.bias.grad, model.tables.embedding.weight.grad.coalesce().values()]
    assert torch.stack([p.norm() for p in parts]).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_state_of_another_model_is_refused() -> None:
    model = Tower()
    optimizers = Optimizers(model, OptimizerConfig())
    _train(model, optimizers, range(1))
    state = optimizers.state_tensors()
    wide = Tower(width=8)
    with pytest.raises(ConfigError, match="another config"):
        Optimizers(wide, OptimizerConfig()).load_state_tensors(state)
    with pytest.raises(ConfigError, match=r"adam\.ghost"):
        optimizers.load_state_tensors({**state, "adam.ghost.exp_avg": torch.zeros(1)})
    with pytest.raises(ConfigError, match="steps"):
        optimizers.load_state_tensors({})
