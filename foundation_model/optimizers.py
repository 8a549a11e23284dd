"""One optimizer for sparse tables (Adagrad) and one for everything else (AdamW), stepped and saved together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adagrad import adagrad
from torch.optim.adamw import adamw

from das.config import Config
from das.errors import ConfigError

SLOTS = {"adam": ("step", "exp_avg", "exp_avg_sq"), "adagrad": ("step", "sum")}
"""What each optimizer keeps per parameter. A parameter that never had a gradient has none yet."""


class OptimizerConfig(Config):
    """Learning rates and limits of one model's training.

    `clip_norm` bounds the global gradient norm of all parameters, tables included. `warmup_steps` raises the dense
    learning rate linearly from 0 over the first steps.
    """

    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    table_lr: float = Field(0.02, gt=0)
    table_eps: float = Field(1e-8, gt=0)
    table_initial_accumulator: float = Field(0.0, ge=0)
    clip_norm: float = Field(10.0, gt=0)
    warmup_steps: int = Field(0, ge=0)


class Optimizers:
    """AdamW over the dense parameters, Adagrad over parameters of embeddings with sparse gradients.

    The state is a flat dict of tensors named `<optimizer>.<parameter>.<slot>`; loading it restores every bit.
    Steps are torch's functional ones: the classes of `torch.optim` import its compiler, 140 MB in every process.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        sparse = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._tables = {name: p for name, p in named if id(p) in sparse}
        self._dense = {name: p for name, p in named if id(p) not in sparse}
        self._state: dict[str, dict[str, dict[str, Tensor]]] = {"adam": {}, "adagrad": {}}
        self.steps = 0
        if self._tables:
            torch.sparse.check_sparse_tensor_invariants.disable()  # the default, said aloud: else torch warns

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in (*self._dense.values(), *self._tables.values()):
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        """The gradients of `loss` alone, computed in this thread: one of autograd's for a GPU only costs waiting."""
        self.zero_grad()
        with torch.autograd.set_multithreading_enabled(False):
            loss.backward()

    @torch.no_grad()
    def step(self, loss: Tensor) -> bool:
        """Clip and apply the gradients of `loss`, unless the loss or their norm is not finite.

        Returns whether the step was taken; a refused one leaves parameters and state untouched. One device
        synchronization.
        """
        dense = {name: p.grad for name, p in self._dense.items() if p.grad is not None}
        tables = {}
        for name, p in self._tables.items():
            if p.grad is not None:
                p.grad = tables[name] = p.grad.coalesce()
        values = [*dense.values(), *(grad._values() for grad in tables.values())]
        finite = torch.isfinite(loss).all()
        if values:
            norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in values]).norm()
            finite = finite & torch.isfinite(norm)
        if not bool(finite):
            return False
        if values:
            scale = torch.clamp(self.config.clip_norm / (norm + 1e-6), max=1.0)
            for grad in values:
                grad.mul_(scale)
        self._step_dense(dense)
        self._step_tables(tables)
        self.steps += 1
        return True

    def _step_dense(self, grads: dict[str, Tensor]) -> None:
        if not grads:
            return
        config, states = self.config, self._state["adam"]
        for name in grads:
            if name not in states:
                like = self._dense[name]
                step = torch.zeros((), dtype=torch.float32, device=like.device)
                states[name] = {"step": step, "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
        warm = min(1.0, (self.steps + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        adamw(
            [self._dense[name] for name in grads],
            list(grads.values()),
            [states[name]["exp_avg"] for name in grads],
            [states[name]["exp_avg_sq"] for name in grads],
            [],
            [states[name]["step"] for name in grads],
            fused=True,
            amsgrad=False,
            beta1=config.betas[0],
            beta2=config.betas[1],
            lr=config.lr * warm,
            weight_decay=config.weight_decay,
            eps=config.eps,
            maximize=False,
        )

    def _step_tables(self, grads: dict[str, Tensor]) -> None:
        config, states = self.config, self._state["adagrad"]
        for name in grads:
            if name not in states:
                start = torch.full_like(self._tables[name], config.table_initial_accumulator)
                states[name] = {"step": torch.zeros((), dtype=torch.float32), "sum": start}
        adagrad(
            [self._tables[name] for name in grads],
            list(grads.values()),
            [states[name]["sum"] for name in grads],
            [states[name]["step"] for name in grads],
            has_sparse_grad=True,
            foreach=False,
            lr=config.table_lr,
            weight_decay=0.0,
            lr_decay=0.0,
            eps=config.table_eps,
            maximize=False,
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by stable names; live tensors, so write or clone them before the next step."""
        out = {"steps": torch.tensor(self.steps, dtype=torch.int64)}
        for kind, states in self._state.items():
            for name, slots in states.items():
                out |= {f"{kind}.{name}.{slot}": value for slot, value in slots.items()}
        return out

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave. Raises ConfigError on a name or shape of another model."""
        left = dict(tensors)
        if "steps" not in left:
            raise ConfigError("optimizer state has no 'steps'; it is not a state of this project")
        self.steps = int(left.pop("steps"))
        for kind, parameters in (("adam", self._dense), ("adagrad", self._tables)):
            self._state[kind] = {}
            for name, parameter in parameters.items():
                keys = {slot: f"{kind}.{name}.{slot}" for slot in SLOTS[kind]}
                if keys["step"] not in left:
                    continue
                state = {slot: left.pop(key, torch.empty(0)) for slot, key in keys.items()}
                if wrong := [slot for slot in SLOTS[kind][1:] if state[slot].shape != parameter.shape]:
                    found, wanted = tuple(state[wrong[0]].shape), tuple(parameter.shape)
                    message = f"optimizer state '{keys[wrong[0]]}' is {found}, the parameter is {wanted}"
                    raise ConfigError(f"{message}: the snapshot is of another config")
                on_host = kind == "adagrad"  # its step count stays on the host
                device = parameter.device
                self._state[kind][name] = {
                    slot: value.to("cpu" if on_host and slot == "step" else device, copy=True)
                    for slot, value in state.items()
                }
        if left:
            raise ConfigError(
                f"optimizer state of unknown parameters {sorted(left)[:3]}: the snapshot is of another model"
            )
