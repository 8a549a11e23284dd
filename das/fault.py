"""Named fault points: places where a test may kill, stop or delay the process.

A point does nothing unless `arm` was called with a plan such as `teacher.after_put:3:kill`
(point, nth pass, action), several separated by commas. Mains arm it from EXFM_FAULTS.
"""

from __future__ import annotations

import os
import signal
import time

from das.errors import ConfigError, Retryable

ACTIONS = ("kill", "stop", "delay", "raise")
DELAY_S = 2.0

POINTS: dict[str, str] = {
    "joiner.after_poll": "input read, nothing joined yet",
    "joiner.before_produce": "rows released, message not sent",
    "joiner.after_produce": "message acknowledged, input not committed",
    "joiner.after_commit": "input committed",
    "teacher.after_poll": "messages read, nothing scored",
    "teacher.before_put": "scored, block not written",
    "teacher.after_put": "block and watermark written, not trained",
    "teacher.after_train": "trained, no snapshot yet",
    "teacher.after_snapshot": "snapshot renamed into place, offsets not committed",
    "teacher.after_commit": "offsets committed",
    "student.after_poll": "messages read, no lookup yet",
    "student.after_lookup": "logits attached, not trained",
    "student.after_step": "trained, no snapshot yet",
    "student.after_snapshot": "snapshot renamed into place, offsets not committed",
    "student.after_commit": "offsets committed",
    "quarantine.after_replay": "records sent back and acknowledged, not remembered",
    "snapshot.before_rename": "snapshot files written and fsynced under a temporary name",
}


class _Plan:
    def __init__(self) -> None:
        self.actions: dict[str, tuple[int, str]] = {}
        self.passes: dict[str, int] = {}


_plan = _Plan()


def arm(text: str | None) -> None:
    """Replace the fault plan; `None` or an empty text disarms. Raises ConfigError on an unknown point or action."""
    _plan.actions.clear()
    _plan.passes.clear()
    for item in filter(None, (text or "").split(",")):
        name, nth, action = [*item.split(":"), "", ""][:3]
        if name not in POINTS or action not in ACTIONS or not nth.isdigit():
            raise ConfigError(
                f"EXFM_FAULTS: '{item}' is not point:nth:action; "
                f"points: {', '.join(POINTS)}; actions: {', '.join(ACTIONS)}"
            )
        _plan.actions[name] = (int(nth), action)


def point(name: str) -> None:
    """Pass the fault point `name`."""
    if not _plan.actions:
        return
    assert name in POINTS, f"unregistered fault point {name}"
    passes = _plan.passes[name] = _plan.passes.get(name, 0) + 1
    nth, action = _plan.actions.get(name, (0, ""))
    if passes != nth:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "delay":
        time.sleep(DELAY_S)
    else:
        raise Retryable(f"fault point {name}")
