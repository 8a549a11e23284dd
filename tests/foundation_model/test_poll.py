"""Encoding a poll at once changes no bit of any message's batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from teacher_case import SCHEMA, rows

from das.example_poll import PollRows, decode_poll
from das.examples import ExampleDecoder, encode_examples
from foundation_model.batch import Batch
from foundation_model.features import FeatureEncoder
from foundation_model.poll import encode_messages

ENCODER = FeatureEncoder(SCHEMA)
DECODER = ExampleDecoder(SCHEMA, ENCODER.columns)
ROWS = rows(1200)
CUTS = [(0, 300), (300, 301), (301, 301), (301, 900), (900, 1200)]
VALUES: list[bytes | None] = [encode_examples(ROWS[a:b], SCHEMA) for a, b in CUTS]


def _messages(values: list[bytes | None]) -> list[PollRows]:
    return [rows for rows in decode_poll(values, DECODER) if isinstance(rows, PollRows)]


def _equal(one: Batch, other: Batch) -> bool:
    pairs = [(one.cat_BC, other.cat_BC), (one.num_BN, other.num_BN), (one.labels_BK, other.labels_BK)]
    pairs += [(one.label_mask_BK, other.label_mask_BK), (one.domain_B, other.domain_B)]
    for name, own in one.seqs.items():
        pairs += [(getattr(own, part), getattr(other.seqs[name], part)) for part in ("ids_TF", "offsets", "age_s")]
    times = np.array_equal(one.event_time_ms_B, other.event_time_ms_B)
    return times and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("spoiled", [False, True], ids=["whole poll", "one message bad"])
def test_messages_encoded_together_equal_each_alone(spoiled: bool) -> None:
    poll = _messages(VALUES[:2] + [b"bad"] * spoiled + VALUES[2:])
    alone = [ENCODER.encode(message.batch) for value in VALUES for message in _messages([value])]
    together = encode_messages(ENCODER, poll)
    assert [b.num_rows for b in together] == [300, 1, 0, 599, 300]
    assert all(_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_students_rows_of_a_poll_equal_those_of_each_message() -> None:
    picks = [np.flatnonzero(np.arange(b - a) % 3 == 1) for a, b in CUTS]
    alone = [ENCODER.encode(m.batch, own) for v, own in zip(VALUES, picks, strict=True) for m in _messages([v])]
    together = encode_messages(ENCODER, _messages(VALUES), picks)
    assert all(_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_messages_around_a_gap_in_the_poll_are_not_mixed_up() -> None:
    poll = _messages(VALUES)
    for kept in ([0, 3], [1, 4], [3]):
        together = encode_messages(ENCODER, [poll[i] for i in kept])
        assert all(_equal(b, ENCODER.encode(poll[i].batch)) for b, i in zip(together, kept, strict=True))
    assert encode_messages(ENCODER, []) == []
