"""A dict that forgets: at most `capacity` keys, the least recently used half goes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

V = TypeVar("V")


class BoundedTable(Generic[V]):
    """Two generations: using a key moves it to the young one; a full young one becomes the old one.

    A key survives while it is used at least once every `capacity // 2` other keys. Costs one dict lookup for a hot key.
    """

    def __init__(self, capacity: int, make: Callable[[], V]) -> None:
        self._half = max(1, capacity // 2)
        self._make = make
        self._young: dict[Any, V] = {}
        self._old: dict[Any, V] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, key: Any) -> V:
        """The value of a key; a new one if the key is unknown or forgotten."""
        found = self._young.get(key)
        if found is not None:
            return found
        found = self._old.pop(key, None)
        if found is None:
            found = self._make()
        if len(self._young) >= self._half:
            self._young, self._old = {}, self._young
        self._young[key] = found
        return found
