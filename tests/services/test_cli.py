"""The command line is pinned: a command or flag that appears or goes changes this file."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import typer

from services.cli import app

COMMANDS = {
    "replay": {"--settings", "-s", "--speed", "--rows", "--data"},
    "das": {"--settings", "-s"},
    "teacher": {"--settings", "-s"},
    "student": {"name", "--settings", "-s"},
    "serve": {"--settings", "-s"},
    "up": {"--settings", "-s"},
    "demo": {"--out", "--device", "--speed", "--seed", "--rows"},
    "export": {"name", "--settings", "-s", "--to"},
    "check": {"--settings", "-s"},
    "status": {"--settings", "-s", "--once", "--json"},
    "doctor": {"--settings", "-s"},
    "topics create": {"--settings", "-s"},
    "topics describe": {"--settings", "-s"},
    "bench kernels": {"--json", "--op", "--shape", "--compiled", "--seconds", "--compile-seconds", "--plot"},
    "quarantine list": {"--settings", "-s", "--limit", "--reason", "--json"},
    "quarantine replay": {"--settings", "-s", "--reason", "--dry-run"},
    "bench das": {"--json", "--events", "--kafka", "--redis", "--repeats"},
    "bench zipper": {"--json", "--seeds", "--teacher", "--rate", "--plot"},
    "bench demo": {"--json", "--out", "--device", "--rows", "--pace", "--paced-rows"},
}


def commands(group: click.Group, prefix: str = "") -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
        else:
            found[prefix + name] = {option for parameter in command.params for option in parameter.opts} - {"--help"}
    return found


def exfm(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)  # type: ignore[call-overload,no-any-return]


def test_commands_and_flags_are_pinned() -> None:
    assert commands(typer.main.get_command(app)) == COMMANDS


def test_every_command_says_what_it_does() -> None:
    text = exfm("--help").stdout
    assert all(name.partition(" ")[0] in text for name in COMMANDS)


def test_help_loads_nothing_heavy() -> None:
    heavy = ("torch", "pyarrow", "kafka", "pydantic", "matplotlib")
    code = f"import sys, services.cli; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    began_s = time.monotonic()
    assert exfm("--help").returncode == 0
    assert time.monotonic() - began_s < 3


@pytest.mark.parametrize("command", [["das"], ["topics", "describe"], ["check"], ["up"], ["student", "x"], ["status"]])
def test_a_missing_settings_file_is_a_message_and_exit_2(command: list[str], tmp_path: Path) -> None:
    run = exfm(*command, "--settings", str(tmp_path / "absent.yaml"))
    assert run.returncode == 2
    assert "absent.yaml: no such file" in run.stderr
    assert "Traceback" not in run.stderr


def test_check_reads_the_mapping_and_the_table(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "services" / "demo" / "kuairand"
    mapping = (folder / "dataset.yaml").read_text(encoding="utf-8")
    (tmp_path / "dataset.yaml").write_text(
        mapping.replace("events.parquet", str(folder / "events.parquet")).replace("column: ts", "column: absent_column")
    )
    settings = (folder / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "demo.yaml").write_text(settings.replace("schema.yaml", str(folder / "schema.yaml")))
    refused = exfm("check", "--settings", str(tmp_path / "demo.yaml"))
    assert refused.returncode == 2
    assert "absent_column" in refused.stderr


def test_check_accepts_the_demo_and_names_a_misspelt_student_key(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "services" / "demo" / "kuairand" / "demo.yaml"
    good = exfm("check", "--settings", str(demo))
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-1] == "ok: teacher, 6 students, events.parquet with 222,444 rows"
    bad = tmp_path / "bad.yaml"
    text = demo.read_text(encoding="utf-8").replace("objectives: [click, long_view]", "objective: [click]", 1)
    bad.write_text(
        text.replace("schema_file: schema.yaml", f"schema_file: {demo.parent / 'schema.yaml'}"), encoding="utf-8"
    )
    refused = exfm("check", "--settings", str(bad))
    assert refused.returncode == 2
    assert "student 'tab1-none'" in refused.stderr
    assert "did you mean 'objectives'" in refused.stderr


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    run = exfm("demo", "--out", str(tmp_path))
    assert run.returncode == 2
    assert "not empty" in run.stderr
    assert (tmp_path / "thesis.txt").exists()
