"""What a joiner needs to go on after a crash; carried by every `examples` message in the header exfm-join (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from das.errors import Fatal
from das.examples import HEADER_JOIN
from das.stream import Record

IMPRESSIONS = 0
FEEDBACK = 1
NEVER_MS = -(2**62)
"""An event time before every event; the watermark of an input that has shown nothing."""


class ReleaseKey(NamedTuple):
    """The total order in which rows leave a partition."""

    release_ms: int
    impression_id: str


BEFORE_ALL = ReleaseKey(NEVER_MS, "")


class JoinState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State of one partition after one message. Pairs are (impressions, feedback); offsets are the next to read.

    Rebuilding reads the inputs again from `replay`, where their greatest event times were `replay_max_ms`; rows up to
    `key` that were read before `next` have left. `ends` are the offsets after the last end-of-stream handed on;
    `ended` says which input has ended since; `waits` is the schema's, empty in messages of older versions. Rows whose
    labels are all positive leave early, but not up to `early_after_ms`; None: none does.
    """

    seq: int
    key: ReleaseKey
    first_release_ms: int
    last_release_ms: int
    next: tuple[int, int]
    replay: tuple[int, int]
    replay_max_ms: tuple[int, int]
    ends: tuple[int, int]
    ended: tuple[bool, bool]
    waits: str = ""
    early_after_ms: int | None = None

    @property
    def at_end(self) -> bool:
        """Whether the message was the end of the stream itself."""
        return self.next == self.ends

    def resume(self, waits: str, *, early: bool) -> int | None:
        """`early_after_ms` of a join that goes on from here.

        Raises Fatal when rows that are read again would be given other release times than those that they left at.
        """
        if self.waits and self.waits != waits and not self.at_end:
            raise Fatal(
                f"the schema lets {waits}; it let {self.waits} when the last example was written, so rows would leave "
                "twice or never: restore that, end the stream first, or use new topics"
            )
        if early:
            return self.key.release_ms if self.early_after_ms is None else self.early_after_ms
        if self.early_after_ms is not None and not self.at_end:
            raise Fatal(
                "joiner.release_positives_early was on, and rows that left early would leave again without it: "
                "set it again, or end the stream first"
            )
        return None


def encode_state(state: JoinState) -> bytes:
    """Header value of a state."""
    return msgspec.json.encode(state)


def last_state(tail: Sequence[Record]) -> JoinState | None:
    """The newest state of the last messages of a partition; None if there is no message.

    The newest is the one with the greatest sequence number: a revived joiner that had lost its partitions may have
    appended older messages once more. Raises Fatal if a message is not a joiner's.
    """
    states = []
    for record in tail:
        try:
            states.append(msgspec.json.decode(record.headers[HEADER_JOIN], type=JoinState))
        except (KeyError, ValueError) as error:
            raise Fatal(
                f"{record.topic}[{record.partition}] offset {record.offset} has no usable {HEADER_JOIN} header "
                f"({error}); only joiners may write to this topic: set kafka.topics.examples to a topic of its own"
            ) from None
    return max(states, key=lambda state: state.seq, default=None)
