"""Has the ledger follow the disk a moment later, and again when it could not be written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.core.model import Tree
from agent.retry import Backoff
from agent.sync.workspace import Workspace
from agent.telemetry.errors import Errors

RECORD_WITHIN = 0.05
"""Seconds for which the ledger and the log may lag behind the disk: a kill in between costs a stat of those files and
their lines, and the person waiting for a save does not wait for its bookkeeping."""

AGAIN = Backoff(first=1.0, most=60.0, least=0.5)
"""Between two tries to write a ledger that cannot be written."""


class Recording:
    """Records `tree` soon after it is told to, once for all that happened since. `then` is called after each try."""

    def __init__(
        self, workspace: Workspace, tree: Callable[[], Tree], errors: Errors, then: Callable[[], None]
    ) -> None:
        self._workspace = workspace
        self._tree = tree
        self._errors = errors
        self._then = then
        self._timer: asyncio.TimerHandle | None = None
        self._failures = 0

    def soon(self) -> None:
        """Record within `RECORD_WITHIN`, or with the next try while the ledger cannot be written."""
        if self._timer is None:
            self._wait(RECORD_WITHIN)

    def cancel(self) -> None:
        """Record no more by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._record)

    def _record(self) -> None:
        self._timer = None
        recorded = False
        with self._errors.contained("record"):
            if self._workspace.ledger_lost:
                recorded = self._workspace.record_anew(self._tree())
            else:
                recorded = self._workspace.record(self._tree().cursor)
        self._failures = 0 if recorded else self._failures + 1
        if not recorded:
            self._wait(AGAIN.delay(self._failures))
        elif not self._workspace.swept:
            self.soon()
        self._then()
