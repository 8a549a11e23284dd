"""One optimizer for sparse tables (Adagrad) and one for everything else (AdamW), stepped and saved together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from das.config import Config
from das.errors import ConfigError

SLOTS = {"adam": ("step", "exp_avg", "exp_avg_sq"), "adagrad": ("step", "sum")}
"""What each optimizer keeps per parameter. A parameter that never had a gradient has no Adam state yet."""


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
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self.config = config
        sparse = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse}
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._tables = {name: p for name, p in named if id(p) in sparse}
        self._dense = {name: p for name, p in named if id(p) not in sparse}
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if self._dense:
            self._optimizers["adam"] = torch.optim.AdamW(
                self._dense.values(),
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                fused=True,
            )
        if self._tables:
            self._optimizers["adagrad"] = torch.optim.Adagrad(
                self._tables.values(),
                lr=config.table_lr,
                eps=config.table_eps,
                initial_accumulator_value=config.table_initial_accumulator,
            )
        self.steps = 0

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def step(self, loss: Tensor) -> bool:
        """Clip and apply the gradients of `loss`, unless the loss or their norm is not finite.

        Returns whether the step was taken; a refused one leaves parameters and state untouched. One device
        synchronization.
        """
        grads = self._gradients()
        norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]).norm() if grads else None
        finite = torch.isfinite(loss.detach()).all()
        if norm is not None:
            finite = finite & torch.isfinite(norm)
        if not bool(finite):
            return False
        if norm is not None:
            scale = torch.clamp(self.config.clip_norm / (norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(scale)
        if self.config.warmup_steps:
            for group in self._optimizers["adam"].param_groups if self._dense else ():
                group["lr"] = self.config.lr * min(1.0, (self.steps + 1) / self.config.warmup_steps)
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.steps += 1
        return True

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by stable names; views of the live tensors, so write or clone them before the next step."""
        out = {"steps": torch.tensor(self.steps, dtype=torch.int64)}
        for kind, parameters in self._groups():
            for name, parameter in parameters.items():
                for slot, value in self._optimizers[kind].state.get(parameter, {}).items():
                    out[f"{kind}.{name}.{slot}"] = value
        return out

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave. Raises ConfigError on a name or shape of another model."""
        left = dict(tensors)
        if "steps" not in left:
            raise ConfigError("optimizer state has no 'steps'; it is not a state of this project")
        self.steps = int(left.pop("steps"))
        for kind, parameters in self._groups():
            for name, parameter in parameters.items():
                keys = {slot: f"{kind}.{name}.{slot}" for slot in SLOTS[kind]}
                state = {slot: left.pop(key) for slot, key in keys.items() if key in left}
                for slot, value in state.items():
                    if value.ndim and value.shape != parameter.shape:
                        message = f"optimizer state '{keys[slot]}' is {tuple(value.shape)}, the parameter is "
                        raise ConfigError(f"{message}{tuple(parameter.shape)}: the snapshot is of another config")
                if state:
                    copies = {slot: value.to(parameter.device, copy=True) for slot, value in state.items()}
                    self._optimizers[kind].state[parameter] = copies
        if left:
            raise ConfigError(
                f"optimizer state of unknown parameters {sorted(left)[:3]}: the snapshot is of another model"
            )

    def _groups(self) -> tuple[tuple[str, dict[str, nn.Parameter]], ...]:
        return ("adam", self._dense), ("adagrad", self._tables)

    def _gradients(self) -> list[Tensor]:
        """The values of every gradient; those of tables coalesced first, so that each row appears once."""
        grads = [p.grad for p in self._dense.values() if p.grad is not None]
        for parameter in self._tables.values():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.coalesce()
                grads.append(parameter.grad._values())
        return grads
