"""The docs say what the code does: commands, settings, metrics, feedback policy, named tests and links."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from das.errors import Poison
from das.messages import MessageCodec
from das.schema import FeatureSchema
from services.cli import app
from services.metrics import CATALOGUE, Metric
from services.replay.dataset import DatasetConfig
from services.serve.rows import RowParser
from services.settings import Settings, load, student_configs, teacher_config

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
OPERATIONS, DATA, README, ARCHITECTURE, JOIN = (
    PAGES[name] for name in ("operations.md", "data.md", "README.md", "architecture.md", "join.md")
)
PACKAGES = ("das", "kernels", "foundation_model", "vertical_models", "services")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def metric_row(metric: Metric) -> str:
    """One row of the metrics table."""
    labels = [
        label if words is None else f"{label} ({', '.join(sorted(words))})" for label, words in metric.labels.items()
    ]
    return f"| `{metric.name}` | {metric.kind} | {metric.unit} | {'; '.join(labels) or '-'} | {metric.meaning} |"


def test_the_metrics_table_is_the_catalogue() -> None:
    documented = [line for line in OPERATIONS.splitlines() if re.match(r"\| `exfm_\w+` \| (counter|gauge|hist)", line)]
    assert documented == [metric_row(metric) for metric in CATALOGUE.values()]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"exfm_\w+(?=[`{])", "".join(PAGES.values())))))
def test_every_metric_that_the_docs_mention_exists(name: str) -> None:
    assert name in CATALOGUE


def test_the_policy_of_the_join_names_every_outcome_and_a_test_of_each() -> None:
    section = JOIN.partition("## What becomes of each record")[2].partition("\n## ")[0]
    cases = re.findall(r"^\|(.*)\|$", section, re.M)
    named = {outcome for case in cases for outcome in re.findall(r"\| `(\w+)` \|", case)}
    outcomes = [
        CATALOGUE[f"exfm_{what}_total"].labels["outcome"] or frozenset() for what in ("feedback", "impressions")
    ]
    assert named == outcomes[0] | outcomes[1] | {"future"}
    for case in cases:
        file, test = re.fullmatch(r".*\| `(test_\w+\.py)::(test_\w+)` ", case).groups() if "::" in case else ("", "")
        header = case.rstrip().endswith("| test") or set(case) <= {"-", "|"}
        assert header or f"def {test}(" in (ROOT / "tests" / "das" / file).read_text(), case


def commands(page: str) -> Iterator[list[str]]:
    """Every `exfm ...` of the shell blocks and of inline code."""
    text = "\n".join(blocks(page, "sh")) + "\n" + "\n".join(re.findall(r"`(exfm [^`]+)`", page))
    for line in text.splitlines():
        for part in line.partition("#")[0].split("&&"):
            if part.strip().startswith("exfm "):
                yield part.split()[1:]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_docs_exists_with_its_flags(page: str) -> None:
    for words in commands(PAGES[page]):
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands") and words:
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("page", ["README.md", "data.md"])
def test_the_settings_of_the_docs_are_valid_as_they_stand(page: str, tmp_path: Path) -> None:
    for block in blocks(PAGES[page], "yaml"):
        name = re.match(r"# (\w+\.yaml)", block)
        assert name
        (tmp_path / name[1]).write_text(block)
    settings = load(tmp_path / "exfm.yaml", {})
    schema = FeatureSchema.load(settings.schema_file)
    assert settings.replay
    assert settings.serve
    DatasetConfig.load(settings.replay.dataset, schema)
    teacher_config(settings)
    for student in student_configs(settings).values():
        student.check(schema)


def schema_of(page: str) -> FeatureSchema:
    """The feature schema that a page shows."""
    (block,) = (block for block in blocks(page, "yaml") if block.startswith("# schema.yaml"))
    return FeatureSchema.parse(yaml.safe_load(block))


def test_the_heads_of_the_zipper_page_are_those_of_its_schema() -> None:
    page = PAGES["zipper.md"]
    documented = re.findall(r"^\| `(\S+)` \| ([\d.]+) s \| ([\d.]+) \| (yes|no) \|$", page, re.M)
    heads = schema_of(page).heads
    assert documented == [
        (h.name, f"{h.window_ms / 1000:g}", f"{h.share:g}", "yes" if h.served else "no") for h in heads
    ]
    assert len(heads) == 4


def test_the_messages_of_the_docs_decode() -> None:
    codec = MessageCodec(schema_of(DATA))
    impression, feedback = blocks(DATA, "json")
    assert codec.decode_impression(impression.encode()).domain == "search"
    assert codec.decode_feedback(feedback.encode()).positive
    with pytest.raises(Poison):
        codec.decode_impression(impression.replace('"acme"', "7", 1).encode())


def test_the_http_example_is_a_valid_request() -> None:
    (body,) = re.findall(r"-d '(.*?)'", "".join(blocks(README, "sh")), re.S)
    schema = schema_of(README)
    assert len(RowParser(MessageCodec(schema), 10).parse(body.encode())) == 1
    answer = json.loads(blocks(README, "json")[0])
    assert set(answer) == {"teacher_version", "trained_through", "results"}
    assert set(answer["results"][0]["logits"]) == set(schema.objective_names)


def test_every_settings_section_and_variable_is_documented() -> None:
    section = OPERATIONS.partition("## Settings")[2].partition("\n## ")[0]
    assert {name for name in Settings.model_fields if f"`{name}`" not in section} == set()
    for path in re.findall(r"`([\w/]+\.py)`", section):
        assert (ROOT / path).exists()
    read = {name for path in SOURCES for name in re.findall(r'"(EXFM_[A-Z]+(?!_)\b)"', path.read_text())}
    assert {name for name in read if f"`{name}`" not in section} == set()


def test_the_settings_keys_that_the_docs_mention_exist() -> None:
    from foundation_model.trainer import TeacherConfig
    from vertical_models.config import StudentConfig

    sections: dict[str, Any] = {name: field.annotation for name, field in Settings.model_fields.items()}
    sections |= {"teacher": TeacherConfig, "lookup": StudentConfig.model_fields["lookup"].annotation}
    for page in (text for name, text in PAGES.items() if name != "benchmarks.md"):  # its names are of rows
        for section, key in re.findall(r"`(\w+)\.(\w+)`", page):
            model = sections.get(section)
            model = next((m for m in getattr(model, "__args__", ()) if hasattr(m, "model_fields")), model)
            if hasattr(model, "model_fields"):
                assert key in model.model_fields, f"{section}.{key}"


def test_every_test_that_the_docs_name_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", "".join(PAGES.values()))
    assert len(named) >= 10
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
    assert re.findall(r"^\| (\d+) \|", ARCHITECTURE, re.M) == [str(n) for n in range(1, 11)]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (folder / link).exists(), link
    for path in re.findall(rf"`((?:{'|'.join(PACKAGES)}|docker|tests)/[\w./-]+)", PAGES[page]):
        assert (ROOT / path).exists() or path == "docker/secrets/", path
