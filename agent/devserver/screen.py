"""Knows what the preview shows: the other end of the plugin in the dev server (`agent/preview`).

The plugin connects to a socket on loopback, says the secret of this start, and reports what the pages in people's
browsers have painted and which errors are open. It runs among the project's code, so what it says is a claim: held
against a form, cut, counted, and never a reason to change the tree. The other way the agent tells it of each batch:
`begin` before the first rename, `commit` after the last. Both are written to the socket and not waited for: the
kernel gives the dev server `begin` before the changes that follow it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import stat
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct, structs

from agent.core.model import Problem, RelPath
from agent.devserver.sandbox import User
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Applied

PREVIEW: Final = Path(__file__).parent.parent / "preview"
"""Where the JavaScript is."""
LONGEST: Final = 512 * 1024
"""Bytes of one report; fifty errors with their stacks are 350 KB."""
HELLO_WITHIN: Final = 5.0
"""Seconds for whoever connects to say the secret."""
REPORT_EVERY: Final = 0.025
"""Seconds between two reports that are read; the plugin sends twenty a second, and whoever sends more waits."""
UNSENT: Final = 2**20
"""Bytes that a plugin which does not read may leave unsent before it is dropped."""
OBSERVED_WITHIN: Final = 10.0
"""Seconds for which a dev server may be ready without its plugin; Astro takes two."""

REVISIONS: Final = 100
"""How many are remembered with their times; what is shown later than that is not measured."""

What = Literal["add", "change", "unlink"]
"""What a watcher calls a change of a path."""
Text = Annotated[str, Meta(max_length=4000)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Kind = Literal["build", "runtime", "rejection", "module", "resource", "console"]
COUNTED: Final[tuple[Kind, ...]] = ("build", "runtime", "rejection", "module", "resource", "console")


News = tuple[int, object, object, object]
"""What is told at once when it changes; the first is the revision on the disk."""


class PreviewError(Struct, frozen=True, omit_defaults=False):
    """An open error. `file` is relative to the project; `line` and `column` count from 1; `frame` is source around it.

    `revision`: the one that was shown when it was first seen. `first_at`: Unix seconds. `pages`: how many have it.
    """

    kind: Kind
    message: Text
    file: Text | None = None
    line: Count | None = None
    column: Count | None = None
    frame: Text | None = None
    stack: Text | None = None
    revision: Count = 0
    first_at: float = 0.0
    count: Count = 1
    pages: Count = 0
    level: Literal["error", "warn"] | None = None


class Pages(Struct, frozen=True):
    """Open pages. `behind`: visible ones that do not show the newest revision."""

    visible: Count
    hidden: Count
    behind: Count


class Shown(Struct, frozen=True):
    """What the newest visible page shows. `at`: Unix seconds; `how` it came there."""

    revision: Count
    at: float
    how: Literal["update", "reload", "load"]
    pages: Pages
    blank: bool


class _Reported(Struct, frozen=True):
    """The state that the plugin reports. `checked`: the revision whose modules were transformed without a page."""

    checked: Count
    shown: Shown | None
    errors: Annotated[list[PreviewError], Meta(max_length=50)]


class _Gate(Struct, frozen=True):
    seconds: Annotated[float, Meta(ge=0, le=3600)]


class _Message(Struct, frozen=True):
    hello: Text | None = None
    state: _Reported | None = None
    gate: _Gate | None = None


NOTHING: Final = _Reported(0, None, [])


class Screen:
    """What is shown of one project. `open` before the dev server starts; everything else may be called at any time."""

    def __init__(
        self,
        root: Path,
        *,
        metrics: Metrics,
        last_applied: Callable[[], Applied | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a screen of the project in `root`.

        Args:
            root: The project directory.
            metrics: Where the time to the screen and the errors are counted.
            last_applied: The event that reached the disk last, and how long that took.
            clock: Monotonic, seconds.
        """
        self._root = root
        self._metrics = metrics
        self._last_applied = last_applied
        self._clock = clock
        self._secret = secrets.token_urlsafe(24)
        self._server: asyncio.Server | None = None
        self._plugin: asyncio.StreamWriter | None = None

        # What was committed, and what the plugin said of it.
        self._revision = 0
        self._applied_at: dict[int, float] = {}
        """When each of the newest revisions was on the disk, Unix seconds."""
        self._said = NOTHING
        self._ready_since: float | None = None
        self.changed = asyncio.Event()
        """Set when something is new; whoever waits for it clears it."""

    # --- the dev server's start

    async def open(self, user: User | None) -> Mapping[str, str]:
        """Listen; return what the dev server's environment needs, `NODE_OPTIONS` to be appended to its own.

        Args:
            user: Whom the dev server runs as; None: the agent's own user. One who cannot read the hook gets none, since
                Node does not start without a file that it is told to import.
        """
        self._ready_since = None
        hook = PREVIEW / "hook.mjs"
        if not _readable(hook, user):
            return {}
        if self._server is None:
            try:
                self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=LONGEST)
            except OSError:
                return {}
        port = self._server.sockets[0].getsockname()[1]
        return {
            "NODE_OPTIONS": f"--import={hook.as_uri()}",
            "PREVIEW_SYNC_AGENT": f"127.0.0.1 {port}",
            "PREVIEW_SYNC_SECRET": self._secret,
        }

    def close(self) -> None:
        """Stop listening, and forget what was said."""
        if self._server is not None:
            self._server.close()
        self._drop()

    # --- what the agent does

    def begin(self, paths: Collection[RelPath]) -> None:
        """A batch is about to be renamed into place."""
        if paths:
            self._send({"begin": list(paths)})

    def undo(self) -> None:
        """What was begun did not happen: the disk is as it was."""
        self._send({"undo": True})

    def commit(self, revision: int, changes: Mapping[RelPath, What]) -> None:
        """The disk is at `revision`, and `changes` are new there."""
        if revision == self._revision and not changes:
            return
        self._revision = revision
        self._applied_at[revision] = time.time()
        while len(self._applied_at) > REVISIONS:
            del self._applied_at[next(iter(self._applied_at))]
        self._send({"commit": revision, "changes": changes})
        self.changed.set()

    # --- what others read

    @property
    def observed(self) -> bool:
        """Whether a plugin reports."""
        return self._plugin is not None

    @property
    def shown(self) -> Shown | None:
        """What is on the screen; None: nobody looks, or nothing observes."""
        return self._said.shown

    @property
    def errors(self) -> tuple[PreviewError, ...]:
        """The open errors, the newest first, what the console said last."""
        return tuple(self._said.errors)

    @property
    def news(self) -> News:
        """What is told at once when it changes: the revision on the disk, and what is known of the screen.

        What was checked is the answer where nobody looks, or where something cannot be built.
        """
        shown = self.shown
        errors = frozenset((each.kind, each.message, each.file, each.line) for each in self.errors)
        asked = shown is None or any(each.kind == "build" for each in self.errors)
        return self._revision, asked and self._said.checked, shown and (shown.revision, shown.blank), errors

    def report(self) -> dict[str, object]:
        """Return `observed`, `checked`, `shown` and `errors` as they travel; not redacted."""
        return {
            "observed": self.observed,
            "checked": self._said.checked,
            "shown": msgspec.to_builtins(self.shown),
            "errors": msgspec.to_builtins(self.errors),
        }

    def problems(self, *, ready: bool) -> tuple[Problem, ...]:
        """Return what is wrong: a dev server that is ready and that nothing observes."""
        if not ready:
            self._ready_since = None
            return ()
        if self._ready_since is None:
            self._ready_since = self._clock()
        if self.observed or self._clock() - self._ready_since < OBSERVED_WITHIN:
            return ()
        return (Problem("preview_unobserved", "the dev server is not Vite, or its start drops NODE_OPTIONS"),)

    # --- the socket

    def _send(self, message: object) -> None:
        plugin = self._plugin
        if plugin is None:
            return
        if plugin.transport.get_write_buffer_size() > UNSENT:
            self._drop()
            return
        plugin.write(msgspec.json.encode(message) + b"\n")

    def _drop(self) -> None:
        if self._plugin is not None:
            self._plugin.transport.abort()
        self._plugin, self._said = None, NOTHING
        self._metrics.preview_observed.set(0)
        self._show_errors()
        self.changed.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hear one plugin out. The first that says the secret is heard until it ends; a second server's waits."""
        try:
            # What is too long, no JSON, or not of the form is no plugin of ours. Nobody awaits this task.
            refused = (OSError, ValueError, TimeoutError, msgspec.MsgspecError, asyncio.CancelledError)
            with contextlib.suppress(*refused):
                async with asyncio.timeout(HELLO_WITHIN):
                    hello = msgspec.json.decode(await reader.readline(), type=_Message).hello or ""
                if self._plugin is None and hmac.compare_digest(hello.encode(), self._secret.encode()):
                    self._plugin = writer
                    self._metrics.preview_observed.set(1)
                    self._send({"root": str(self._root), "commit": self._revision})
                    self.changed.set()
                    await self._hear(reader)
        finally:
            if self._plugin is writer:
                self._drop()
            writer.transport.abort()

    async def _hear(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            said = msgspec.json.decode(line, type=_Message)
            if said.gate is not None:
                self._metrics.gate.observe(said.gate.seconds)
            if said.state is not None:
                self._take(said.state)
                await asyncio.sleep(REPORT_EVERY)

    def _take(self, said: _Reported) -> None:
        """Take a report for what it can be: nothing is shown that was not committed."""
        most = self._revision
        shown = said.shown and structs.replace(said.shown, revision=min(said.shown.revision, most))
        errors = [structs.replace(each, revision=min(each.revision, most)) for each in said.errors]
        before, self._said = self._said, _Reported(min(said.checked, most), shown, errors)
        if shown is not None and (before.shown is None or shown.revision > before.shown.revision):
            self._metrics.start.mark("shown")
            self._measure(shown)
        self._show_errors()
        self.changed.set()

    def _measure(self, shown: Shown) -> None:
        """Count how long the revision took from its commit to the screen; both clocks are this machine's."""
        last, applied = self._last_applied(), self._applied_at.get(shown.revision)
        if last is not None and last.revision == shown.revision and applied is not None:
            self._metrics.shown.observe(max(0.0, shown.at - applied) + last.lag)

    def _show_errors(self) -> None:
        for kind in COUNTED:
            self._metrics.preview_errors.labels(kind).set(
                sum(each.kind == kind for each in self._said.errors)
            )


def with_plugin(env: Mapping[str, str], plugin: Mapping[str, str]) -> dict[str, str]:
    """Return the dev server's environment with what the plugin needs; the project's own `NODE_OPTIONS` come first."""
    both = {**env, **plugin}
    if options := [each["NODE_OPTIONS"] for each in (env, plugin) if each.get("NODE_OPTIONS")]:
        both["NODE_OPTIONS"] = " ".join(options)
    return both


def _readable(file: Path, user: User | None) -> bool:
    """Whether `user` can read `file`, by the permissions of it and of every directory above."""
    try:
        if user is None:
            return os.access(file, os.R_OK)
        return _allows(file, user, 4) and all(_allows(each, user, 1) for each in file.resolve().parents)
    except OSError:
        return False


def _allows(path: Path, user: User, bit: int) -> bool:
    info = path.stat()
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid == user.uid:
        mode >>= 6
    elif info.st_gid == user.gid:
        mode >>= 3
    return bool(mode & bit)
