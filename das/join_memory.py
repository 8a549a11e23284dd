"""What a join remembers beside the rows that wait, and which records a rebuilt join must therefore read again.

It is kept by window of Zipper, so that what belongs to a row that waits for days does not stay there for as long as
that of rows that wait for minutes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Container
from heapq import heappop, heappush
from typing import NamedTuple

import msgspec

from das.join_state import FEEDBACK, IMPRESSIONS, ReleaseKey


class Seen(msgspec.Struct, gc=False):
    """An accepted id: where it was read, the greatest event time before it, the last release time under this id."""

    offset: int
    before_ms: int
    release_ms: int


class _Kept(NamedTuple):
    """Feedback that is read again; `before_ms` is the greatest event time before it."""

    offset: int
    before_ms: int
    impression_id: str


class JoinMemory:
    """Accepted ids, each window's in the order read, and feedback whose rows could be built anew.

    `dedup_ms`: how long after its release time an id is told to be a duplicate; of ids whose rows have left, at most
    `dedup_max` are kept.
    """

    def __init__(self, num_windows: int, dedup_ms: int, dedup_max: int) -> None:
        self._dedup_ms = dedup_ms
        self._dedup_max = dedup_max
        self.seen: list[OrderedDict[str, Seen]] = [OrderedDict() for _ in range(num_windows)]
        self.kept: list[deque[_Kept]] = [deque() for _ in range(num_windows)]
        self.early: set[str] = set()
        """Ids of rows that left before their windows passed: read again without its feedback, such a row would wait."""
        self._early: list[ReleaseKey] = []

    def keep(self, window: int, offset: int, before_ms: int, impression_id: str) -> None:
        """Remember feedback that labels a row, or may."""
        self.kept[window].append(_Kept(offset, before_ms, impression_id))

    def left_early(self, full: ReleaseKey) -> None:
        """Remember a row that left before the key that its window gives it."""
        self.early.add(full.impression_id)
        heappush(self._early, full)

    def is_repeated(self, impression_id: str, seen: Seen, passed_ms: int) -> bool:
        """Whether another impression of this id, read when its log's watermark is `passed_ms`, is a duplicate."""
        return seen.release_ms + self._dedup_ms > passed_ms or impression_id in self.early

    def forget(
        self, left: ReleaseKey, passed_ms: int, pending: Container[str], num_pending: int, orphans: Container[str]
    ) -> None:
        """Drop what no later record can need. `left`: the last row that left; `passed_ms`: of the impressions' log."""
        early = self.early
        while self._early and self._early[0] <= left:
            early.discard(heappop(self._early).impression_id)
        for kept in self.kept:
            while kept and (name := kept[0].impression_id) not in pending and name not in orphans and name not in early:
                kept.popleft()
        for seen in self.seen:
            while seen:
                name, entry = next(iter(seen.items()))
                if self.is_repeated(name, entry, passed_ms) or entry.release_ms >= left.release_ms or name in pending:
                    break
                seen.popitem(last=False)
        for _ in range(sum(map(len, self.seen)) - self._dedup_max - num_pending - len(early)):
            first = [(next(iter(seen.items())), seen) for seen in self.seen if seen]
            free = [(entry.offset, seen) for (name, entry), seen in first if name not in pending and name not in early]
            if not free:
                break
            min(free, key=lambda pair: pair[0])[1].popitem(last=False)

    def replay(self, next_offsets: list[int], max_event_ms: list[int]) -> tuple[list[int], list[int]]:
        """(impressions, feedback): the offsets to read again from, and the greatest event times before those."""
        offsets, before_ms = list(next_offsets), list(max_event_ms)
        seen = [next(iter(seen.values())) for seen in self.seen if seen]
        if seen:
            oldest = min(seen, key=lambda entry: entry.offset)
            offsets[IMPRESSIONS], before_ms[IMPRESSIONS] = oldest.offset, oldest.before_ms
        kept = [kept[0] for kept in self.kept if kept]
        if kept:
            offsets[FEEDBACK], before_ms[FEEDBACK], _ = min(kept)
        return offsets, before_ms
