"""Event time of a join: how far both inputs are known to be complete."""

from __future__ import annotations

from das.join_state import FEEDBACK, IMPRESSIONS, NEVER_MS

SIDES = (IMPRESSIONS, FEEDBACK)
ENDLESS_MS = 2**62


class JoinWatermark:
    """The minimum of two inputs' watermarks; never goes back.

    An input's watermark is its greatest event time - allowed lateness - 1 ms: nothing up to it is expected any more.
    An input that showed nothing for `idle_timeout_s` while the other moved is left out; when both are silent the
    watermark moves with the clock. `idle_timeout_s=None` turns both off: the result then depends on the records
    alone. Time is passed in, as monotonic seconds.
    """

    def __init__(self, allowed_lateness_ms: int, idle_timeout_s: float | None) -> None:
        self._lateness_ms = allowed_lateness_ms + 1
        self._idle_timeout_s = idle_timeout_s
        self.max_event_ms = [NEVER_MS, NEVER_MS]
        self.ended = [False, False]
        self.value_ms = NEVER_MS
        self._silent_since_s: list[float | None] = [None, None]
        self._silent: tuple[float, int] | None = None

    @property
    def lag_ms(self) -> int:
        """Event time from the watermark to the newest record; 0 before there is a watermark."""
        return max(0, max(self.max_event_ms) - self.value_ms) if self.value_ms > NEVER_MS // 2 else 0

    def input_ms(self, side: int) -> int:
        """The watermark of one input, from its records alone."""
        return self.max_event_ms[side] - self._lateness_ms

    def saw(self, side: int, event_ms: int) -> None:
        """Note the event time of one record."""
        if event_ms > self.max_event_ms[side]:
            self.max_event_ms[side] = event_ms

    def active(self, side: int, now_s: float) -> None:
        """Note that an input has records, or may have some that could not be read."""
        if self.idle(side, now_s):  # it wakes up: the other one now gets as long to show something
            self._silent_since_s = [now_s, now_s]
        self._silent_since_s[side] = now_s

    def idle(self, side: int, now_s: float) -> bool:
        """Whether an input is left out."""
        if self._idle_timeout_s is None:
            return False
        since_s = self._silent_since_s[side]
        return since_s is None or now_s - since_s > self._idle_timeout_s

    def advance(self, now_s: float) -> int:
        """The join watermark now."""
        waiting = [side for side in SIDES if not self.ended[side] and not self.idle(side, now_s)]
        if all(self.ended):
            return ENDLESS_MS
        if waiting:
            self._silent = None
            reached = min(self.input_ms(side) for side in waiting)
        else:
            reached = self._with_the_clock(now_s)
        self.value_ms = max(self.value_ms, reached)
        return self.value_ms

    def _with_the_clock(self, now_s: float) -> int:
        known = [self.input_ms(side) for side in SIDES if self.max_event_ms[side] != NEVER_MS]
        if self._silent is None:
            self._silent = (now_s, max(self.value_ms, min(known, default=NEVER_MS)))
        since_s, base_ms = self._silent
        return base_ms + int((now_s - since_s) * 1000) if known else NEVER_MS

    def restart(self) -> None:
        """Both ends were handed on; what comes next is a new stretch of the stream."""
        self.ended = [False, False]
        self.value_ms = NEVER_MS
        self._silent = None
