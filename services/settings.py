"""The settings file: one YAML for all processes of a pipeline, with overrides from the environment.

`EXFM_KAFKA__BOOTSTRAP=host:9092` overrides `kafka.bootstrap`. Nothing here imports torch: `teacher` and `students`
stay plain mappings until the process that owns them validates them (`teacher_config`, `student_configs`);
`exfm check` validates everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import xxhash
import yaml
from pydantic import Field, model_validator

from das.broker import KafkaConfig
from das.config import Config, read_yaml
from das.errors import ConfigError
from das.joiner import JoinerConfig
from das.quarantine import QuarantineLimit
from das.redis_client import RedisConfig
from services.health import HealthConfig
from services.logs import LogConfig, redact
from services.replay.config import ReplayConfig
from services.serve.config import ServeConfig

if TYPE_CHECKING:
    from foundation_model.trainer import TeacherConfig
    from vertical_models.config import StudentConfig

PREFIX = "EXFM_"
NOT_SETTINGS = frozenset({"EXFM_COMMIT", "EXFM_FAULTS", "EXFM_SUPERVISED"})
NOT_SETTINGS_PREFIX = "EXFM_TEST_"


class EmbeddedConfig(Config):
    """Servers that `exfm up` starts itself on this machine, in place of `kafka.bootstrap` and `redis.url`.

    An address in the environment (`EXFM_KAFKA__BOOTSTRAP`, `EXFM_REDIS__URL`) turns the embedded one off.
    """

    kafka: bool = False
    redis: bool = False


class SupervisorConfig(Config):
    """How `exfm up` keeps its processes running."""

    backoff_initial_s: float = Field(0.5, gt=0, le=60)
    backoff_max_s: float = Field(30.0, gt=0, le=600)
    max_restarts: int = Field(6, ge=0, le=1000)
    """A process that crashes more often than this within `window_s` stops the whole pipeline."""
    window_s: float = Field(300.0, gt=0)
    drain_s: float = Field(30.0, gt=0, le=600)
    """How long each stage may take to drain after SIGTERM before it is killed."""
    live: bool = True
    live_port: int = Field(0, ge=0, le=65_535)


class Settings(Config):
    """Everything `exfm` reads. Sections other than a process's own are ignored by it."""

    run_dir: Path = Path("runs/exfm")
    """Snapshots, results, logs and port files; nothing is written elsewhere."""
    schema_file: Path
    """The feature schema; a relative path is relative to the settings file."""
    stop_at_end: bool = False
    """Stop when the stream ends (a replay with an end), rather than wait for more."""
    examples_idle_s: float | None = Field(10.0, gt=0, le=3600)
    """Readers of examples go on without a partition that was silent for so long; null = never, for exact replays."""
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    embedded: EmbeddedConfig = EmbeddedConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
    kafka: KafkaConfig = KafkaConfig()
    redis: RedisConfig = RedisConfig()
    replay: ReplayConfig | None = None
    joiner: JoinerConfig = JoinerConfig()
    quarantine: QuarantineLimit = QuarantineLimit()
    teacher: dict[str, Any] | None = None
    students: tuple[dict[str, Any], ...] = ()
    serve: ServeConfig | None = None

    @model_validator(mode="after")
    def _student_names(self) -> Self:
        names = [student.get("name") for student in self.students]
        if len(set(names)) != len(names) or None in names:
            raise ValueError("students: give each student a name of its own")
        return self

    @property
    def hash(self) -> str:
        """16 hex digits that change with any resolved value."""
        return xxhash.xxh64_hexdigest(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode())

    def redacted(self) -> dict[str, Any]:
        """The resolved settings without secrets, for logs and result files."""
        result: dict[str, Any] = redact(self.model_dump(mode="json"))
        return result


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Settings:
    """Read one settings file and apply `environ` (see `overrides`). Raises ConfigError naming field and fix."""
    path = Path(path)
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping; see the example in the README")
    changes = overrides(environ or {})
    for address in (("kafka", "bootstrap"), ("redis", "url")):
        if address in changes:
            _put(data, ("embedded", address[0]), False)
    for keys, value in changes.items():
        _put(data, keys, value)
    for key in ("schema_file", "replay.dataset", "replay.data"):
        _resolve(data, key.split("."), path.parent)
    return Settings.parse(data, source=str(path))


def overrides(environ: Mapping[str, str]) -> dict[tuple[str, ...], Any]:
    """Settings in `environ`: `EXFM_A__B=yaml` sets a.b. Raises ConfigError."""
    found: dict[tuple[str, ...], Any] = {}
    for name, text in sorted(environ.items()):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS or name.startswith(NOT_SETTINGS_PREFIX):
            continue
        keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if keys[0] not in Settings.model_fields:
            raise ConfigError(f"{name}: no such setting; the sections are {', '.join(Settings.model_fields)}")
        try:
            found[keys] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name}: not a YAML value: {error}") from None
    return found


def teacher_config(settings: Settings) -> TeacherConfig:
    """The validated teacher section. Raises ConfigError."""
    from foundation_model.trainer import TeacherConfig

    if settings.teacher is None:
        raise ConfigError("teacher: the settings have no such section; add one ({} takes the defaults)")
    return TeacherConfig.parse(settings.teacher, source="settings: teacher")


def student_configs(settings: Settings) -> dict[str, StudentConfig]:
    """The validated students by name. Raises ConfigError."""
    from vertical_models.config import StudentConfig

    parsed = [StudentConfig.parse(s, source=f"settings: student '{s['name']}'") for s in settings.students]
    return {student.name: student for student in parsed}


def _put(data: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        inner = data.get(key)
        data[key] = inner = dict(inner) if isinstance(inner, dict) else {}
        data = inner
    data[keys[-1]] = value


def _resolve(data: dict[str, Any], keys: list[str], base: Path) -> None:
    for key in keys[:-1]:
        data = data.get(key) or {}
    if isinstance(data, dict) and isinstance(data.get(keys[-1]), str):
        data[keys[-1]] = str(base / data[keys[-1]])
