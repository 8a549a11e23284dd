"""What a user says about one student."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator

from das.errors import ConfigError
from das.lookup import LookupConfig
from das.schema import FeatureSchema
from foundation_model.features import FeatureEncoder
from foundation_model.optimizers import OptimizerConfig
from foundation_model.training_config import TrainingConfig
from vertical_models.dcnv2 import DCNv2Config
from vertical_models.objective import DistillationConfig
from vertical_models.serving import InputConfig

StudentName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]


class StudentConfig(TrainingConfig):
    """One student: which rows and features it reads, how it learns, when it saves."""

    name: StudentName
    arm: str | None = None
    """How result tables name this student's side of a comparison; by default its distillation mode."""
    domains: tuple[str, ...] | None = Field(None, min_length=1)
    """The product surfaces whose rows it reads; null = all."""
    objectives: tuple[str, ...] = Field(min_length=1)
    features: tuple[str, ...] | None = Field(None, min_length=1)
    """The features it reads, names of the schema; null = all."""
    inputs: InputConfig = InputConfig()
    backbone: DCNv2Config = DCNv2Config()
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-3, table_lr=0.05)
    distillation: DistillationConfig = DistillationConfig()
    lookup: LookupConfig = LookupConfig()
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    batch_rows: int = Field(64, ge=1, le=65_536)
    """Rows per step; at an end of stream, the last step has what is left."""
    snapshot_every_steps: int = Field(500, ge=1)
    keep_snapshots: int = Field(2, ge=1, le=1000)
    poll_timeout_s: float = Field(600.0, gt=0)
    """How long to wait for a broker that is away before giving up."""

    @field_validator("domains", "objectives", "features")
    @classmethod
    def _no_repeats(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if names is not None and len(set(names)) != len(names):
            raise ValueError("a name is listed twice; remove one")
        return names

    @property
    def arm_name(self) -> str:
        """The arm in result tables."""
        return self.arm or self.distillation.mode

    @property
    def owner(self) -> str:
        """How errors name whose configuration this is."""
        return f"student '{self.name}'"

    def encoder(self, schema: FeatureSchema) -> FeatureEncoder:
        """The encoder of this student's features and objectives. Raises ConfigError; see `check`."""
        self.check(schema)
        return FeatureEncoder(schema, self.features, self.tables, self.objectives)

    def check(self, schema: FeatureSchema) -> Self:
        """Hold the config against the schema. Raises ConfigError naming what is unknown and what there is."""
        where = f"student '{self.name}'"
        known = {
            "domains": (self.domains or (), schema.domains),
            "objectives": (self.objectives, schema.objective_names),
            "features": (self.features or (), tuple(f.name for f in schema.features)),
        }
        for field, (asked, there) in known.items():
            unknown = [name for name in asked if name not in there]
            if unknown:
                raise ConfigError(
                    f"{where}: {field}: schema '{schema.name}' has no {unknown}; known: {', '.join(there)}"
                )
        domains = self.domains or schema.domains
        for objective in schema.objectives:
            if objective.name in self.objectives and objective.domains and not set(objective.domains) & set(domains):
                raise ConfigError(
                    f"{where}: objectives: '{objective.name}' applies to the domains {list(objective.domains)} only, "
                    f"and this student reads {list(domains)}; remove the objective or add a domain"
                )
        for name in ("weight", "beta", "alpha"):
            self.distillation.per_objective(name, self.objectives)
        return self
