"""Typed, frozen configuration: unknown keys are refused with a suggestion, errors name the field."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from das.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every configuration section. Immutable; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def parse(cls, data: Any, *, source: str = "config") -> Self:
        """Validate `data`; raises ConfigError with one line per problem: field, problem, fix."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, source)) from None


def explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """One line per validation problem, with the nearest known key for a misspelt one."""
    lines = [f"{source}: {error.error_count()} problem(s)"]
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "(top level)"
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            fix = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
            text = f"unknown key; {fix}"
        lines.append(f"  {where}: {text}")
    return "\n".join(lines)


def read_yaml(path: str | Path) -> Any:
    """Parse one YAML file with the safe loader; raises ConfigError naming file and line."""
    path = Path(path)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; pass the path of an existing YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; pass the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


def load_config(cls: type[C], path: str | Path) -> C:
    """Read and validate one YAML file as `cls`."""
    return cls.parse(read_yaml(path), source=str(path))


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names at `location` below `model`, looking through optionals, lists and mappings."""
    current: Any = model
    for part in location:
        if isinstance(part, str) and _is_model(current) and part in current.model_fields:
            current = current.model_fields[part].annotation
        current = _inner_model(current)
    return list(current.model_fields) if _is_model(current) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _inner_model(annotation: Any) -> Any:
    """The first model inside `list[M]`, `dict[str, M]`, `M | None`; else `annotation` itself."""
    if _is_model(annotation):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = _inner_model(argument)
        if _is_model(inner):
            return inner
    return annotation
