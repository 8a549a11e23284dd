"""Messages that were decoded together are encoded together: most of the cost of a small message is per column."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, repeat

import numpy as np

from das.example_poll import PollRows
from foundation_model.batch import Batch
from foundation_model.features import FeatureEncoder


def encode_messages(
    encoder: FeatureEncoder, messages: Sequence[PollRows], picks: Sequence[np.ndarray] | None = None
) -> list[Batch]:
    """The rows of each message as a batch, a view of what was encoded in one pass.

    `picks`: per message, the indices of the rows to encode, rising and not none; None = all rows of all.
    """
    batches: list[Batch] = []
    pairs = zip(messages, picks or repeat(None), strict=picks is not None)
    for _, group in groupby(pairs, key=lambda pair: id(pair[0].poll)):
        members = list(group)
        whole = encoder.encode(members[0][0].poll, _rows(members))
        batches += whole.split([message.num_rows if own is None else len(own) for message, own in members])
    return batches


def _rows(members: Sequence[tuple[PollRows, np.ndarray | None]]) -> np.ndarray | slice:
    """Where the rows of messages of one poll are in it; a slice, which costs nothing, if they follow one another."""
    stops = [message.first + message.num_rows for message, _ in members]
    if all(own is None or len(own) == message.num_rows for message, own in members) and stops[:-1] == [
        message.first for message, _ in members[1:]
    ]:
        return slice(members[0][0].first, stops[-1])
    rows = np.concatenate([m.first + (np.arange(m.num_rows) if own is None else own) for m, own in members])
    start, stop = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (0, 0)
    return slice(start, stop) if stop - start == len(rows) else rows
