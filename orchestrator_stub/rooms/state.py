"""Decides what a room does next: load, wait, save, read what somebody else saved, or end. Pure: time is passed in.

The rules that the tests hold it to: nothing is saved before the text was loaded, or after the room lost its lease or
its file · what was typed is saved within `MOST_SECONDS` while the database answers, and not forgotten while it does
not · a save whose answer was lost is sent again as it was, so that its correlation id finds the first answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

DEBOUNCE_SECONDS: Final = 0.3
"""After the last key: above the gap between the keys of one word."""
MOST_SECONDS: Final = 1.0
"""After the first key that is not saved."""
RETRY_SECONDS: Final = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Between attempts while the database does not answer; the last one repeats."""
CLOSE_SECONDS: Final = 10.0
"""For the last save of a room that closes; as long as the orchestrator's stop waits."""
MOST_LOADS: Final = 3
"""Attempts to load the text before whoever waits is told to come again."""

Why = Literal[
    "idle", "stopped", "unsaved", "lost", "gone", "unfit", "refused", "unreachable", "failed", "too_large"
]
"""Why a room ended. `idle` and `stopped`: all is saved · `unsaved`: it closed while the database was away, or nobody
may write any more · `lost`: another orchestrator has it · `gone`: the file was deleted or renamed · `unfit`: it is no
text that can be shared · `refused`: the database takes no such content · `unreachable`: it could not be loaded ·
`failed`: a bug · `too_large`: above a bound."""


@dataclass(frozen=True, slots=True)
class Load:
    """Read the text for the first time."""


@dataclass(frozen=True, slots=True)
class Read:
    """Read what the file is now: somebody else may have saved it."""


@dataclass(frozen=True, slots=True)
class Save:
    """Save the text, or send again what `RoomState.sending` says."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do for so many seconds (None: until something happens)."""

    seconds: float | None


@dataclass(frozen=True, slots=True)
class Over:
    """The room has ended."""

    why: Why


Job = Load | Read | Save | Wait | Over


@dataclass(frozen=True, slots=True)
class Sending:
    """A save on its way. `users`: who typed since the last one, the latest last."""

    text: str
    version: int
    users: tuple[str, ...]
    correlation_id: str


class RoomState:
    """One room's life. `generation` names it among all rooms that the file ever had."""

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self.version: int | None = None
        """Of the text that was last loaded, saved or merged; None: not loaded."""
        self.loaded_version: int | None = None
        self.sending: Sending | None = None
        self._typed: dict[str, None] = {}
        self._first: float | None = None
        self._last = 0.0
        self._stale = False
        self._failures = 0
        self._not_before = 0.0
        self._closing: tuple[Why, float] | None = None
        self._over: Why | None = None

    @property
    def dirty(self) -> bool:
        """Whether something is not known to be saved."""
        return self._first is not None or self.sending is not None

    def next(self, now: float) -> Job:
        """What to do now."""
        if self._over is not None:
            return Over(self._over)
        if self._closing is not None:
            why, until = self._closing
            if self.version is None or not self.dirty:
                return Over(why)
            if now >= until:
                return Over("unsaved")
        if now < self._not_before:
            return Wait(self._not_before - now)
        if self.version is None:
            return Load()
        if self.sending is not None:
            return Save()
        if self._stale:
            return Read()
        if self._first is None:
            return Wait(None)
        due = min(self._last + DEBOUNCE_SECONDS, self._first + MOST_SECONDS)
        return Save() if self._closing is not None or now >= due else Wait(due - now)

    # --- what has happened

    def loaded(self, version: int) -> None:
        """The text is there."""
        self.version = self.loaded_version = version
        self._answered()

    def edited(self, now: float, user: str | None) -> None:
        """The text changed; by nobody where it was merged."""
        self._first = now if self._first is None else self._first
        self._last = now
        if user is not None:
            self._typed.pop(user, None)
            self._typed[user] = None

    def outside(self) -> None:
        """Somebody else may have saved the file."""
        self._stale = True

    def begin_save(self, text: str) -> Sending:
        """Take what is typed as being sent; a save whose answer was lost stays as it was sent."""
        assert self.version is not None
        if self.sending is None:
            digest = hashlib.sha256(text.encode()).hexdigest()[:16]
            key = f"room-{self.generation}-{self.version}-{digest}"
            self.sending = Sending(text, self.version, tuple(self._typed), key)
            self._typed = {}
            self._first = None
        return self.sending

    def saved(self, version: int) -> None:
        """What was sent is the file's version."""
        self.sending = None
        self.version = version
        self._answered()

    def conflict(self, now: float) -> None:
        """Somebody else saved first: what was sent is not saved, and their text is read before it is sent anew."""
        sent, self.sending = self.sending, None
        assert sent is not None
        self._typed = dict.fromkeys(sent.users) | self._typed
        self._first = now if self._first is None else self._first
        self._stale = True
        self._answered()

    def nobody(self, now: float, instead: str | None) -> None:
        """None of those who typed may write any more: somebody else who sees the text saves it, or it stays unsaved."""
        self.sending = None
        self._typed = {}
        if instead is None:
            self.end("unsaved")
        else:
            self.edited(now, instead)

    def begin_read(self) -> None:
        """A word of another save that comes from here on asks for another reading."""
        self._stale = False

    def read(self, now: float, version: int, *, differs: bool) -> None:
        """The file's version was merged into the text, which `differs` from it now, or does not."""
        self.version = version
        self._answered()
        if not differs:
            self._first = None
        elif self._first is None:
            self._first = self._last = now

    def unreachable(self, now: float) -> None:
        """The database did not answer; whether it did what was asked is not known."""
        if self.version is None and self._failures + 1 >= MOST_LOADS:
            self.end("unreachable")
            return
        self._stale = self._stale or (self.sending is None and self.version is not None)
        self._not_before = now + RETRY_SECONDS[min(self._failures, len(RETRY_SECONDS) - 1)]
        self._failures += 1

    def close(self, now: float, why: Why) -> None:
        """End when everything is saved."""
        if self._closing is None:
            self._closing = (why, now + CLOSE_SECONDS)

    def reopened(self) -> None:
        """Somebody came while it was about to end for want of people."""
        if self._closing is not None and self._closing[0] == "idle":
            self._closing = None

    def end(self, why: Why) -> None:
        """End now, and save nothing more."""
        self._over = self._over or why

    def _answered(self) -> None:
        self._failures = 0
        self._not_before = 0.0
