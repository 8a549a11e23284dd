"""The catalogue refuses what it does not know, and is what dashboards can rely on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from services.metrics import CATALOGUE, MAX_SERIES, OTHER, PrometheusTelemetry

ROOT = Path(__file__).parents[2]
CALL = re.compile(r"\.(count|gauge|observe)\(\s*f?\"(exfm_[a-z_]+)\"((?:[^()]|\([^()]*\))*)\)")
KINDS = {"count": "counter", "gauge": "gauge", "observe": "histogram"}


@pytest.fixture
def telemetry() -> PrometheusTelemetry:
    return PrometheusTelemetry(CollectorRegistry())


def exposed(telemetry: PrometheusTelemetry) -> str:
    return generate_latest(telemetry.registry).decode()


def test_unknown_name_is_refused(telemetry: PrometheusTelemetry) -> None:
    with pytest.raises(ValueError, match="exfm_recrods_total"):
        telemetry.count("exfm_recrods_total")


def test_wrong_kind_is_refused(telemetry: PrometheusTelemetry) -> None:
    with pytest.raises(ValueError, match="not a gauge"):
        telemetry.gauge("exfm_rows_trained_total", 1)


def test_missing_and_unknown_labels_are_refused(telemetry: PrometheusTelemetry) -> None:
    with pytest.raises(ValueError, match="outcome"):
        telemetry.count("exfm_feedback_total")
    with pytest.raises(ValueError, match="lost"):
        telemetry.count("exfm_feedback_total", outcome="lost")


def test_values_are_exposed_with_unit_and_labels(telemetry: PrometheusTelemetry) -> None:
    telemetry.count("exfm_feedback_total", 3, outcome="joined")
    telemetry.gauge("exfm_ne", 0.87, portfolio="1/click")
    telemetry.observe("exfm_step_seconds", 0.02)
    text = exposed(telemetry)
    assert 'exfm_feedback_total{outcome="joined"} 3.0' in text
    assert 'exfm_ne{portfolio="1/click"} 0.87' in text
    assert "exfm_step_seconds_count 1.0" in text
    assert "[s]" in text


def test_label_sets_are_bounded(telemetry: PrometheusTelemetry) -> None:
    for number in range(MAX_SERIES + 50):
        telemetry.count("exfm_http_requests_total", path=f"/{number}", code="404")
    lines = [line for line in exposed(telemetry).splitlines() if line.startswith("exfm_http_requests_total{")]
    assert len(lines) == MAX_SERIES + 1
    assert f'exfm_http_requests_total{{code="{OTHER}",path="{OTHER}"}} 50.0' in lines


def test_every_emitted_name_is_in_the_catalogue_with_its_kind_and_labels() -> None:
    """Also the other way: a name that no code emits has no place in the catalogue."""
    emitted: dict[str, set[str]] = {}
    for path in (
        p for top in ("das", "foundation_model", "vertical_models", "services") for p in (ROOT / top).rglob("*.py")
    ):
        for method, name, rest in CALL.findall(path.read_text(encoding="utf-8")):
            assert name in CATALOGUE or name.endswith("_"), f"{path}: {name} is not in the catalogue"
            if name in CATALOGUE:
                assert CATALOGUE[name].kind == KINDS[method], f"{path}: {name}"
                labels = set(re.findall(r"\b(\w+)=", rest))
                assert labels == set(CATALOGUE[name].labels) or "**" in rest, f"{path}: {name} with labels {labels}"
                emitted.setdefault(name, set()).add(path.name)
    assert len(emitted) > 15
