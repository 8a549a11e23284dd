"""Settings: overrides from the environment, secrets from files, and errors that a person can act on."""

from __future__ import annotations

from pathlib import Path

import pytest

from das.errors import ConfigError
from services.settings import load

MINIMAL = "schema_file: schema.yaml\nkafka: {bootstrap: 'a:1'}\n"


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_paths_are_relative_to_the_file_and_run_dir_to_the_caller(settings_file: Path) -> None:
    settings = load(settings_file)
    assert settings.schema_file == settings_file.parent / "schema.yaml"
    assert not settings.run_dir.is_absolute()


def test_environment_overrides_nested_keys_with_yaml_values(settings_file: Path) -> None:
    environ = {
        "EXFM_KAFKA__BOOTSTRAP": "b:2",
        "EXFM_KAFKA__PARTITIONS": "7",
        "EXFM_STOP_AT_END": "true",
        "PATH": "/bin",
    }
    settings = load(settings_file, environ)
    assert (settings.kafka.bootstrap, settings.kafka.partitions, settings.stop_at_end) == ("b:2", 7, True)


def test_an_address_in_the_environment_takes_the_place_of_the_embedded_server(settings_file: Path) -> None:
    settings_file.write_text(MINIMAL + "embedded: {kafka: true, redis: true}\n", encoding="utf-8")
    assert load(settings_file).embedded.kafka
    outside = load(settings_file, {"EXFM_KAFKA__BOOTSTRAP": "b:2"})
    assert (outside.embedded.kafka, outside.embedded.redis) == (False, True)
    outside = load(settings_file, {"EXFM_REDIS__URL": "redis://b:2"})
    assert (outside.embedded.kafka, outside.embedded.redis) == (True, False)


def test_keys_that_end_in_file_still_work(settings_file: Path) -> None:
    settings = load(settings_file, {"EXFM_SCHEMA_FILE": "/x/s.yaml", "EXFM_REDIS__PASSWORD_FILE": "/run/p"})
    assert settings.schema_file == Path("/x/s.yaml")
    assert settings.redis.password_file == Path("/run/p")


def test_variables_of_faults_and_tests_are_not_settings(settings_file: Path) -> None:
    load(settings_file, {"EXFM_FAULTS": "", "EXFM_TEST_KAFKA": "x", "EXFM_SUPERVISED": "1"})


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("schema_file: s\nkafka: {bootstrp: x}", {}, r"kafka.bootstrp: unknown key; did you mean 'bootstrap'"),
        ("schema_file: s\nkafak: {}", {}, r"did you mean 'kafka'"),
        ("kafka: {}", {}, r"schema_file: Field required"),
        ("schema_file: s\nstudents: [{name: a}, {name: a}]", {}, r"give each student a name of its own"),
        ("- a", {}, r"not a mapping"),
        ("schema_file: s", {"EXFM_KAFAK__BOOTSTRAP": "x"}, r"EXFM_KAFAK__BOOTSTRAP: no such setting"),
        ("schema_file: s", {"EXFM_KAFKA__PARTITIONS": "many"}, r"kafka.partitions"),
        ("schema_file: s", {"EXFM_KAFKA__PARTITIONS": "[1"}, r"EXFM_KAFKA__PARTITIONS: not a YAML value"),
    ],
)
def test_errors_name_the_field_and_the_fix(tmp_path: Path, text: str, environ: dict[str, str], message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load(path, environ)


def test_hash_changes_with_any_value_and_secrets_are_masked(settings_file: Path) -> None:
    plain = load(settings_file)
    other = load(settings_file, {"EXFM_KAFKA__PARTITIONS": "3"})
    assert plain.hash == load(settings_file).hash != other.hash
    secret = load(settings_file, {"EXFM_KAFKA__OPTIONS": "{sasl_plain_password: hunter2hunter2}"})
    assert "hunter2" not in str(secret.redacted())
