"""A cache that has a place for everything that is asked for again and again, and drops what nobody asked for lately.

A cache with a fixed number of places always misses once there is one session more than places, because agents come in
turn. This one has as many as there are sessions: an agent is heard of every 30 s, so what was not asked for within ten
times that belongs to one that has ended.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

SECONDS: Final = 300.0
"""Ten heartbeats of an agent."""

MOST: Final = 250_000
"""Kept in any case: some 200 MB, and far above the sessions that one process can answer."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key. `clock` is monotonic, in seconds."""

    def __init__(
        self, *, seconds: float = SECONDS, most: int = MOST, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._kept: OrderedDict[Key, tuple[Value, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Value | None:
        """The value of a key, which is kept for longer by that."""
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept[key] = found[0], self._clock()
        self._kept.move_to_end(key)
        return found[0]

    def put(self, key: Key, value: Value) -> None:
        """Remember a value, and forget those that nobody asked for lately."""
        now = self._clock()
        self._kept[key] = value, now
        self._kept.move_to_end(key)
        while len(self._kept) > self._most or next(iter(self._kept.values()))[1] < now - self._seconds:
            self._kept.popitem(last=False)

    def pop(self, key: Key) -> None:
        """Forget one."""
        self._kept.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
