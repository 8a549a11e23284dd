"""`exfm bench zipper` on the first bookings and short windows: what it promises about every prediction."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from das.schema import FeatureSchema
from foundation_model.batch import Batch
from services import check
from services.bench import zipper, zipper_learners
from services.bench.zipper import ALL, Arm, Experiment, Plan, arms, run_models
from services.bench.zipper_judge import Judged
from services.bench.zipper_report import Result, change, label_rows, rows_of
from services.bench.zipper_stream import FOLDER, Day, Recording, read
from services.replay.dataset import DatasetConfig

DAY_MS = 86_400_000
PLAN = Plan(tune=("2015-07-12", "2015-07-16"), evaluate=("2015-07-18", "2015-07-27"))
RATES = dict.fromkeys(("student", "teacher", "distilled"), 1.0)


@pytest.fixture(scope="module")
def schema() -> FeatureSchema:
    """The bundled schema with windows of 1, 3 and 8 days."""
    bundled = FeatureSchema.load(FOLDER / "schema.yaml").model_dump()
    for window, days in zip(bundled["zipper"]["windows"], (1, 3, 8), strict=True):
        window["window_s"] = days * 86_400
    bundled["objectives"][0]["window_s"] = 8 * 86_400
    return FeatureSchema.model_validate(bundled)


@pytest.fixture(scope="module")
def recording(schema: FeatureSchema) -> Recording:
    """The first 4,500 bookings: four weeks."""
    return read(schema, 4500)


@pytest.fixture(scope="module")
def streams(schema: FeatureSchema, recording: Recording) -> dict[str, tuple[Arm, list[Day]]]:
    """Every arm's days."""
    return {arm.name: (arm, arm.days(recording)) for arm in arms(schema, 1)}


def first_feedback_ms(recording: Recording) -> dict[str, int]:
    """Booking to the day its cancellation became known."""
    return {f.impression_id: f.event_time for day in reversed(recording.days) for f in reversed(day.feedback)}


@pytest.mark.parametrize("name", ["fresh_only", "middle_only", "long_only", "zipper", "zipper_unweighted", "no_delay"])
def test_every_booking_is_scored_once_and_before_it_is_learned_from(
    name: str, streams: dict[str, tuple[Arm, list[Day]]], recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm, days = streams[name]
    names = {id(day.impressions): day.ids for day in days} | {id(m.batch): m.ids for d in days for m in d.released}
    same_day = {id(m.batch): day.ids for day in days for m in day.released}
    scored: list[str] = []
    learned: set[str] = set()

    class Spy(zipper_learners.Student):
        def score(self, batch: Batch) -> np.ndarray:
            ids = names[id(batch)]
            assert learned.isdisjoint(ids)
            scored.extend(ids)
            return super().score(batch)

        def learn(self, batch: Batch) -> None:
            ids = names[id(batch)]
            assert learned.isdisjoint(ids)
            assert set(same_day[id(batch)]) <= set(scored[-len(same_day[id(batch)]) :])
            learned.update(ids)
            super().learn(batch)

    monkeypatch.setattr(zipper_learners, "Student", Spy)
    run_models(days, arm, ("student",), 1, RATES, ("2015-07-01", "2015-08-01"))
    assert scored == [i.impression_id for day in recording.days for i in day.impressions]
    assert len(learned) > 2000
    assert learned < set(scored)


def test_an_arm_learns_what_was_known_when_the_window_of_each_booking_had_passed(
    streams: dict[str, tuple[Arm, list[Day]]], recording: Recording
) -> None:
    known_ms = first_feedback_ms(recording)
    booked_ms = {i.impression_id: i.event_time for day in recording.days for i in day.impressions}
    for name in ("fresh_only", "middle_only", "long_only", "zipper"):
        arm, days = streams[name]
        windows_ms = [head.window_ms for head in arm.schema.heads]
        seen = np.zeros(len(windows_ms))
        for day in days:
            for message in day.released:
                labels_BK, mask_BK = message.batch.labels_BK.numpy(), message.batch.label_mask_BK.numpy()
                assert (mask_BK.sum(axis=1) == 1).all()
                for row, booking in enumerate(message.ids):
                    head = int(mask_BK[row].argmax())
                    until_ms = booked_ms[booking] + windows_ms[head]
                    assert until_ms < day.time_ms
                    assert labels_BK[row, head] == (known_ms.get(booking, math.inf) <= until_ms), (name, booking)
                    seen[head] += 1
        assert (seen > 300).all()


def test_labels_in_hindsight_are_those_that_the_full_window_releases(
    streams: dict[str, tuple[Arm, list[Day]]], recording: Recording
) -> None:
    messages = [m for name in ("long_only", "no_delay") for day in streams[name][1] for m in day.released]
    for message in messages:
        assert message.batch.labels_BK[:, 0].tolist() == [recording.labels[booking] for booking in message.ids]
    days = streams["fresh_only"][1]
    assert all(day.labels.tolist() == [recording.labels[booking] for booking in day.ids] for day in days)


def test_all_arms_are_judged_on_the_same_bookings_and_labels(streams: dict[str, tuple[Arm, list[Day]]]) -> None:
    first, *others = streams.values()
    for _, days in others:
        assert [day.ids for day in days] == [day.ids for day in first[1]]
        for day, same in zip(days, first[1], strict=True):
            assert np.array_equal(day.labels, same.labels)
            assert np.array_equal(day.impressions.cat_BC, same.impressions.cat_BC)
            assert np.array_equal(day.impressions.num_BN, same.impressions.num_BN)
            assert not day.impressions.labels_BK.any()


def test_a_seed_decides_everything(streams: dict[str, tuple[Arm, list[Day]]]) -> None:
    arm, days = streams["zipper"]
    once, again, other = (run_models(days, arm, ("teacher", "distilled"), s, RATES, PLAN.evaluate) for s in (3, 3, 4))
    assert once == again
    assert all(once[model].ne != other[model].ne for model in once)


def test_outcomes_dealt_out_at_random_cannot_be_predicted(schema: FeatureSchema, recording: Recording) -> None:
    dealt = recording.shuffled(seed=1)
    assert sorted(dealt.labels.values()) == sorted(recording.labels.values())
    arm = next(a for a in arms(schema, 1) if a.name == "no_delay")
    span = ("2015-07-11", "2015-08-01")
    true, random = (run_models(arm.days(r), arm, ("student",), 1, RATES, span)["student"] for r in (recording, dealt))
    assert random.ne > 0.99
    assert random.auc < 0.55 < 0.65 < true.auc


def test_the_experiment_has_a_row_for_every_model_and_arm(schema: FeatureSchema, recording: Recording) -> None:
    results = Experiment(schema, recording, PLAN).run(2, ALL, rate=1.0)
    rows = {row.name: row.fields() for row in rows_of(results)}
    names = [arm.name for arm in arms(schema, 1)]
    assert set(rows) == {f"{model}.{arm}.ne" for model in ("student", "teacher", "distilled") for arm in names}
    assert len({(row["bookings"], row["canceled"]) for row in rows.values()}) == 1
    for row in rows.values():
        assert 0.5 < row["ne_shifted"] <= row["value"] < 2
        assert len(row["ne_by_seed"]) == 2
    zipper_row, base = rows["teacher.zipper.ne"], rows["teacher.long_only.ne"]
    assert zipper_row["baseline_value"] == base["value"]
    assert zipper_row["ratio"] == pytest.approx(base["value"] / zipper_row["value"])
    assert set(zipper_row["ne_change_against"]) == set(names) - {"zipper"}


def test_learning_rates_are_chosen_on_the_tuning_span(
    schema: FeatureSchema, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    spans = []

    def judged(days: list[Day], arm: Arm, names: tuple[str, ...], seed: int, rates: dict[str, float], span: object):  # type: ignore[no-untyped-def]
        spans.append(span)
        return {"student": Judged(1, 1, abs(rates["student"] - 2.0), 0.0, 0.0, 0.0, [])}

    monkeypatch.setattr(zipper, "run_models", judged)
    results = Experiment(schema, recording, PLAN).run(1, (("student",),))
    assert {result.rate for result in results} == {2.0}
    assert {span for span in spans[:-1] if span != PLAN.tune} == {PLAN.evaluate}
    assert spans[:6] == [PLAN.tune] * 6


def test_every_tuning_label_has_matured_when_the_evaluation_starts() -> None:
    longest_ms = FeatureSchema.load(FOLDER / "schema.yaml").max_window_ms
    plan = Plan()
    assert Plan.span_ms(plan.tune)[1] - DAY_MS + longest_ms < Plan.span_ms(plan.evaluate)[0]


def test_the_share_of_cancellations_that_a_window_misses(schema: FeatureSchema, recording: Recording) -> None:
    span = Plan.span_ms(("2015-07-01", "2015-08-01"))
    known_ms = first_feedback_ms(recording)
    booked_ms = {i.impression_id: i.event_time for day in recording.days for i in day.impressions}
    delays = [known_ms[name] - booked_ms[name] for name, label in recording.labels.items() if label]
    rows = label_rows(recording, schema, span)
    assert [row.name for row in rows] == ["labels.1d.missed", "labels.3d.missed"]
    for row, days in zip(rows, (1, 3), strict=True):
        assert row.value == pytest.approx(np.mean(np.array(delays) > days * DAY_MS))
        assert row.extra["matured_positive"] == pytest.approx(np.mean(list(recording.labels.values())))


def test_changes_are_paired_by_seed() -> None:
    def results(nes: tuple[float, ...]) -> list[Result]:
        blocks = [[1000.0, 300.0 + 10 * n, 500.0 + n] for n in range(4)]
        return [
            Result("student", "a", s, 1.0, Judged(4000, 1260, ne, ne, 0.7, 1.0, blocks)) for s, ne in enumerate(nes)
        ]

    found = change(results((0.8, 1.0, 1.25)), results((0.792, 0.98, 1.2125)))
    assert found["percent"] == pytest.approx(-2.0)
    half = 4.302653 * 1 / math.sqrt(3)  # t of 2 degrees of freedom; changes of -1, -2 and -3 %
    assert found["interval_seeds"] == pytest.approx([-2 - half, -2 + half], rel=1e-5)
    assert found["significant"] is False
    assert change(results((1.0,)), results((0.9,)))["interval_seeds"] is None


def test_the_bundled_settings_pass_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    check.run(FOLDER / "hotel.yaml")
    assert "ok: teacher, 2 students, events.parquet with 101,297 rows" in capsys.readouterr().out


def test_every_column_of_the_table_has_a_use_or_is_refused_as_a_feature() -> None:
    bundled = FeatureSchema.load(FOLDER / "schema.yaml")
    dataset = DatasetConfig.load(FOLDER / "dataset.yaml", bundled)
    columns = set(pq.ParquetFile(Path(FOLDER) / "events.parquet").schema_arrow.names)
    assert columns == set(dataset.columns(bundled)) | dataset.forbidden_columns
