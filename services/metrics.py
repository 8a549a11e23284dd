"""The metrics catalogue: every name, type, unit, label and meaning; and its Prometheus implementation.

A name or label outside the catalogue is a programming error and raises at once, so that dashboards, alerts and
code cannot drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Kind = Literal["counter", "gauge", "histogram"]
MAX_SERIES = 512
OTHER = "other"
READY = "exfm_ready"

_WAIT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_AGE_S = (
    0.01,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    900.0,
    3600.0,
    14_400.0,
    86_400.0,
    604_800.0,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue. `labels` maps a label to its allowed words; None = any, capped by MAX_SERIES."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    labels: dict[str, frozenset[str] | None]
    buckets: tuple[float, ...] = ()


def _metric(
    name: str, kind: Kind, unit: str, meaning: str, buckets: tuple[float, ...] = (), **labels: str | None
) -> Metric:
    allowed = {label: frozenset(words.split()) if words else None for label, words in labels.items()}
    return Metric(name, kind, unit, meaning, allowed, buckets)


_ROWS = (
    _metric("exfm_build_info", "gauge", "1", "always 1; who runs what", version=None, process=None, config=None),
    _metric(READY, "gauge", "bool", "1 once the process can do its work"),
    _metric("exfm_records_total", "counter", "records", "records read or written", topic=None, outcome=None),
    _metric("exfm_replayed_total", "counter", "records", "records the replay has produced", topic=None),
    _metric("exfm_replay_rows", "gauge", "rows", "impressions the replay will produce in all"),
    _metric(
        "exfm_impressions_total", "counter", "impressions", "impressions joined", outcome="accepted duplicate late"
    ),
    _metric(
        "exfm_feedback_total",
        "counter",
        "feedback",
        "feedback by what became of it",
        outcome="joined early late orphan duplicate contradicting unknown",
    ),
    _metric("exfm_examples_rows_total", "counter", "rows", "rows of examples produced"),
    _metric("exfm_quarantined_total", "counter", "records", "poison sent to quarantine", topic=None, reason=None),
    _metric("exfm_joiner_pending", "gauge", "impressions", "impressions whose window is still open"),
    _metric("exfm_lag_records", "gauge", "records", "records known but not processed", topic=None, partition=None),
    _metric(
        "exfm_lag_seconds", "gauge", "s", "age of the oldest record known but not processed", topic=None, partition=None
    ),
    _metric("exfm_watermark_lag_seconds", "gauge", "s", "event time behind the newest seen", partition=None),
    _metric("exfm_rows_trained_total", "counter", "rows", "rows trained"),
    _metric("exfm_train_steps_total", "counter", "steps", "optimizer steps", outcome="ok nonfinite"),
    _metric("exfm_messages_skipped_total", "counter", "messages", "stream irregularities", reason="duplicate gap"),
    _metric(
        "exfm_logit_blocks_total", "counter", "blocks", "logit blocks put", outcome="written identical refused withheld"
    ),
    _metric("exfm_logit_rows_total", "counter", "rows", "rows by whether they had logits", outcome="hit miss"),
    _metric(
        "exfm_logit_misses_total",
        "counter",
        "rows",
        "why logits were missing or refused",
        reason="absent timeout corrupt rows schema message format peek store",
    ),
    _metric("exfm_lookup_wait_seconds", "histogram", "s", "wait for logits of one poll", buckets=_WAIT_S),
    _metric("exfm_lookup_degraded", "gauge", "bool", "1 while training label-only"),
    _metric("exfm_freshness_gap_seconds", "histogram", "s", "event time minus trained-through", buckets=_AGE_S),
    _metric("exfm_event_to_trained_seconds", "histogram", "s", "ingest to trained", buckets=_AGE_S),
    _metric("exfm_ne", "gauge", "1", "progressive normalized entropy, recent blocks", portfolio=None),
    _metric("exfm_auc", "gauge", "1", "progressive AUC", portfolio=None),
    _metric("exfm_calibration", "gauge", "1", "sum of predictions over sum of labels", portfolio=None),
    _metric("exfm_step_seconds", "histogram", "s", "one optimizer step, all of it", buckets=_WAIT_S),
    _metric("exfm_snapshot_version", "gauge", "1", "newest snapshot written or served"),
    _metric("exfm_snapshot_seconds", "histogram", "s", "time to write one snapshot", buckets=_WAIT_S),
    _metric("exfm_invariant_violations_total", "counter", "violations", "an invariant did not hold", invariant=None),
    _metric("exfm_http_requests_total", "counter", "requests", "HTTP requests", path=None, code=None),
    _metric("exfm_http_seconds", "histogram", "s", "HTTP request time", buckets=_WAIT_S, path=None),
    _metric("exfm_model_reloads_total", "counter", "reloads", "snapshot loads by the server", outcome=None),
    _metric("exfm_process_up", "gauge", "bool", "supervisor: 1 while the process runs", process=None),
    _metric("exfm_process_restarts_total", "counter", "restarts", "supervisor: restarts after a crash", process=None),
)

CATALOGUE: dict[str, Metric] = {row.name: row for row in _ROWS}


class PrometheusTelemetry:
    """`das.telemetry.Telemetry` over prometheus_client. Raises ValueError for anything outside the catalogue."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._collectors: dict[str, Counter | Gauge | Histogram] = {}
        self._series: dict[str, set[tuple[str, ...]]] = {}
        self._ready = False

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add `amount` to the counter `name`."""
        collector = self._child(name, "counter", labels)
        assert isinstance(collector, Counter)
        collector.inc(amount)

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set the gauge `name`."""
        collector = self._child(name, "gauge", labels)
        assert isinstance(collector, Gauge)
        collector.set(value)
        if name == READY:
            self._ready = bool(value)

    def is_ready(self) -> bool:
        """The level of `exfm_ready`, for the readiness page."""
        return self._ready

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to the histogram `name`."""
        collector = self._child(name, "histogram", labels)
        assert isinstance(collector, Histogram)
        collector.observe(value)

    def _child(self, name: str, kind: Kind, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        metric = CATALOGUE.get(name)
        if metric is None or metric.kind != kind:
            raise ValueError(f"'{name}' is not a {kind} of the metrics catalogue; add it to services/metrics.py")
        if labels.keys() != metric.labels.keys():
            raise ValueError(f"{name} takes the labels {sorted(metric.labels)}, not {sorted(labels)}")
        for label, value in labels.items():
            allowed = metric.labels[label]
            if allowed is not None and value not in allowed:
                raise ValueError(f"{name}: {label}='{value}' is not one of {sorted(allowed)}")
        collector = self._collectors.get(name) or self._create(metric)
        if not labels:
            return collector
        values = tuple(str(labels[label]) for label in metric.labels)
        return collector.labels(*self._bounded(name, values))

    def _bounded(self, name: str, values: tuple[str, ...]) -> tuple[str, ...]:
        """Fold label sets past MAX_SERIES into one, so that hostile input cannot grow memory."""
        series = self._series.setdefault(name, set())
        if values in series:
            return values
        if len(series) >= MAX_SERIES:
            return (OTHER,) * len(values)
        series.add(values)
        return values

    def _create(self, metric: Metric) -> Counter | Gauge | Histogram:
        text = f"{metric.meaning} [{metric.unit}]"
        names = tuple(metric.labels)
        collector: Counter | Gauge | Histogram
        if metric.kind == "counter":
            collector = Counter(metric.name, text, names, registry=self.registry)
        elif metric.kind == "gauge":
            collector = Gauge(metric.name, text, names, registry=self.registry)
        else:
            collector = Histogram(metric.name, text, names, registry=self.registry, buckets=metric.buckets)
        return self._collectors.setdefault(metric.name, collector)
