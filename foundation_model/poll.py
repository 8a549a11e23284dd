"""Messages that were decoded together are encoded together: most of the cost of a small message is per column."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

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
    chosen = [np.arange(m.num_rows) for m in messages] if picks is None else picks
    pairs = zip(messages, chosen, strict=True)
    for _, group in groupby(pairs, key=lambda pair: id(pair[0].poll)):
        members = list(group)
        rows = np.concatenate([message.first + own for message, own in members])
        start, stop = int(rows[0]) if len(rows) else 0, int(rows[-1]) + 1 if len(rows) else 0
        whole = encoder.encode(members[0][0].poll, slice(start, stop) if stop - start == len(rows) else rows)
        batches += whole.split([len(own) for _, own in members])
    return batches
