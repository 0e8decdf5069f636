"""Measures from a save to the file on the other side against programs that mirror directories: one edit, and 500.

Ours twice. *Event*: an editor's socket to a server to the agent's link, loop, ledger and disk, two hops over loopback:
what a mirroring program does. 500 are as many events of the server on the wire, as the mirrors' are 500 writes. *Save*:
the whole product, from the call of the database's function to a real agent's rename, with PostgreSQL's durability, row
lock, version, revision and broadcast on the way; 500 files are one transaction. The mirrors watch a directory that a
file is saved into. inotify on the other side's directory says when a file is there, for all of them; they take turns
round by round.

Terms are equal: this process saves and watches, another one brings the files over, on a file system of its own
(`bench.harness.scratch_fs`), and no turn begins before the processes of the last one have come to rest.

A mirror that loses files, or ends, has no ratio from then on: its rows say what it did, and the others go on. A mirror
that takes a second for one edit makes four a round, spread evenly over its second; the slowest of the four then stands
for its p99, which is in its favour.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import orjson
import psycopg
from anyio.from_thread import BlockingPortal, start_blocking_portal
from websockets.asyncio.client import ClientConnection, connect

from bench.harness.following import Channel, running_apart
from bench.harness.inotify import Landing
from bench.harness.machine import at_rest
from bench.harness.peers import DEADLINE, FILES, MIRRORS, SLOW_EDITS, Mirror, content_of, name_of, pauses
from bench.harness.results import PeerFailed, Row, in_turn, ratio_of
from bench.harness.scratch_fs import Ground
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.migrations import bootstrap, migrate
from tests.system.plane import Project, eventually, running_plane

EVENT, SAVE = "event", "save"
EDITS = 100
PAUSE = 0.01
"""Seconds between two of our edits at the longest."""

BURSTS = 41
"""Rounds. lsyncd takes them in one rsync or in two, at random: of a few rounds the middle is either."""

GROUND = 512 << 20
"""Bytes of each contestant's file system. They write half a megabyte a burst, again and again over the same names."""

BURST_AT_MOST = {"lsyncd": 0.25}
"""Of a mirror's time for a burst of events; 1 of the others': none may be faster."""


Saving = Callable[[], Coroutine[None, None, None]]
"""A save that is ready to be made, so that making it ready is in nobody's time."""


class Event:
    """One save is a frame on an editor's own socket; many are events that the server has on the wire at once."""

    def __init__(self, channel: Channel, socket: ClientConnection) -> None:
        self._channel, self._socket = channel, socket

    def prepare(self, files: dict[str, str]) -> Saving:
        if len(files) > 1:
            burst = self._channel.burst(files)

            async def say() -> None:
                burst()

            return say
        ((path, content),) = files.items()
        return partial(self._socket.send, orjson.dumps({"path": path, "content": content}).decode())


class Save:
    """Saves by the database's own functions: one file by itself, many in one transaction."""

    def __init__(self, project: Project) -> None:
        self._project = project

    def prepare(self, files: dict[str, str]) -> Saving:
        if len(files) > 1:
            return partial(self._project.bulk, dict(files))
        return partial(self._project.save, *next(iter(files.items())))


class Ours:
    """One of our two ways, on the portal's event loop."""

    def __init__(self, editor: Event | Save, target: Path) -> None:
        self._editor = editor
        self._landing = Landing(target)
        self._number = 0
        self._chance = random.Random(2)

    async def edit_all(self) -> list[float]:
        taken = []
        for pause in pauses(EDITS, PAUSE, self._chance):
            await asyncio.sleep(pause)
            taken.append(await self._save(1))
        return taken

    async def burst(self) -> float:
        return await self._save(FILES)

    async def _save(self, count: int) -> float:
        files = {name_of(n): content_of(n) for n in range(self._number, self._number + count)}
        self._number += count
        sizes = {name: len(content) for name, content in files.items()}
        save = self._editor.prepare({f"src/{name}": content for name, content in files.items()})
        self._landing.forget()
        began = time.perf_counter()
        saving = asyncio.create_task(save())
        landed = await self._landing.arrival(sizes, DEADLINE)
        await saving
        return landed - began


@contextlib.asynccontextmanager
async def event(place: Path) -> AsyncIterator[Ours]:
    """The agent's loop in a process of its own; an editor's socket to its server."""
    (place / "project" / "src").mkdir(parents=True)
    async with running_apart(place) as (channel, url), connect(url, compression=None) as socket:
        yield Ours(Event(channel, socket), place / "project" / "src")


@contextlib.asynccontextmanager
async def save(place: Path) -> AsyncIterator[Ours]:
    """Database, stand-in and control plane in this process; a real agent beside it, alone on the file system."""
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as elsewhere:
        async with _product(Path(elsewhere), place) as ours:
            yield ours


@contextlib.asynccontextmanager
async def _product(elsewhere: Path, place: Path) -> AsyncIterator[Ours]:
    async with EmbeddedPostgres(elsewhere / "pg") as dsn:
        await bootstrap(dsn)
        await migrate(dsn)
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as db:
            await db.execute("update preview.settings set writes_per_minute = 1000000000")
        async with running_plane(dsn, elsewhere / "plane") as plane:
            project = await plane.project({f"src/{name_of(n)}": "// new\n" for n in range(FILES)})
            agent = await project.session(place / "machine", HEARTBEAT_SECONDS="30")
            agent.start()
            try:

                async def live() -> bool:
                    report = await agent.status()
                    return (
                        report is not None and report["link"]["state"] == "live" and report["files"] == FILES
                    )

                await eventually("the agent is live", live, 60)
                yield Ours(Save(project), agent.tree / "src")
            finally:
                await agent.stop()


class Contest:
    """All contestants by name, ours first; each starts at its first turn, in a place of its own that `fresh` gives."""

    def __init__(
        self,
        portal: BlockingPortal,
        fresh: Callable[[], contextlib.AbstractContextManager[Path]],
        stack: contextlib.ExitStack,
    ) -> None:
        self._portal, self._fresh, self._stack = portal, fresh, stack
        self._ours: dict[str, Ours] = {}
        self.mirrors: dict[str, Mirror] = {}
        self.failed: dict[str, str] = {}
        """The mirrors that have dropped out, and why."""
        for kind in MIRRORS:
            if not kind.missing():
                mirror = kind(stack.enter_context(fresh()))
                stack.callback(mirror.stop)
                self.mirrors[mirror.name] = mirror

    def edits(self, name: str) -> list[float]:
        at_rest()
        if name in self.mirrors:
            with self._dropping_out(name) as mirror:
                return mirror.edit_all()
        return self._portal.call(self._our(name).edit_all)

    def burst(self, name: str) -> float:
        at_rest()
        if name in self.mirrors:
            with self._dropping_out(name) as mirror:
                return mirror.burst()
        return self._portal.call(self._our(name).burst)

    def names(self) -> list[str]:
        """Those who are still in it."""
        return [EVENT, SAVE, *(name for name in self.mirrors if name not in self.failed)]

    @contextlib.contextmanager
    def _dropping_out(self, name: str) -> Iterator[Mirror]:
        """A mirror's turn. One that fails is stopped: each further turn could cost all of `DEADLINE`."""
        mirror = self.mirrors[name]
        try:
            yield mirror
        except PeerFailed as failure:
            self.failed[name] = str(failure)
            mirror.stop()
            raise

    def _our(self, name: str) -> Ours:
        if name not in self._ours:
            place = self._stack.enter_context(self._fresh())
            context = (event if name == EVENT else save)(place)
            self._ours[name] = self._stack.enter_context(self._portal.wrap_async_context_manager(context))
        return self._ours[name]


def slowest(taken: Sequence[float]) -> float:
    """p99 where there are a hundred, else the slowest of the few."""
    return quantiles(taken, n=100, method="inclusive")[98] if len(taken) >= EDITS else max(taken)


def _rows(
    label: str,
    samples: dict[str, list[float]],
    ours: str,
    bounds: Callable[[str], float | None],
    failed: Mapping[str, str],
) -> list[Row]:
    middle = median(samples[ours]) * 1e3
    compared = [
        Row(
            label, middle, "ms", name, median(samples[name]) * 1e3, ratio_of(samples[ours], samples[name]),
            at_most=bounds(name), samples=len(samples[ours]),
        )
        for name in samples
        if name not in (EVENT, SAVE)
    ]  # fmt: skip
    return compared + [
        Row(label, middle, "ms", name, at_most=bounds(name), samples=len(samples[ours]), failure=why)
        for name, why in failed.items()
    ]


def latency(contest: Contest, rounds: int) -> list[Row]:
    """p50 and p99 of one edit."""
    p99: dict[str, list[float]] = {name: [] for name in contest.names()}

    def turn(name: str) -> float:
        taken = contest.edits(name)
        p99[name].append(slowest(taken))
        return median(taken)

    p50 = in_turn({name: partial(turn, name) for name in contest.names()}, rounds)
    p99 = {name: p99[name][-rounds:] for name in p50}
    few = [mirror.name for mirror in contest.mirrors.values() if mirror.edits < EDITS]
    rows: list[Row] = []
    for ours, label, bound in ((EVENT, "event to file", 1.0), (SAVE, "save in PostgreSQL to file", None)):
        for share, samples in (("p50", p50), ("p99", p99)):
            rows += _rows(
                f"{label}, {share}",
                samples,
                ours,
                lambda peer, bound=bound: bound,  # type: ignore[misc]
                contest.failed,
            )
    note = f"the slowest of its {SLOW_EDITS} edits a round"
    return [replace(row, note=note) if row.name.endswith("p99") and row.peer in few else row for row in rows]


def burst(contest: Contest, rounds: int) -> list[Row]:
    """From the first of five hundred to the last rename."""
    samples = in_turn({name: partial(contest.burst, name) for name in contest.names()}, rounds)
    return [
        *_rows(
            f"burst of {FILES} files, events",
            samples,
            EVENT,
            lambda peer: BURST_AT_MOST.get(peer, 1.0),
            contest.failed,
        ),
        *_rows(f"{FILES} files saved in one transaction", samples, SAVE, lambda peer: None, contest.failed),
    ]


def run(quick: bool = False) -> Sequence[Row]:
    """Both of ours against every mirror that is installed; one that is missing is named in its row."""
    for kind in MIRRORS:
        if kind.missing():
            print(
                f"  {kind.name}: not measured, {', '.join(kind.missing())} not installed; see `make bench-peers`"
            )
    ground = Ground(GROUND)
    print(f"  everybody {ground.note}")
    with start_blocking_portal() as portal, contextlib.ExitStack() as stack:
        contest = Contest(portal, ground.fresh, stack)
        return [*latency(contest, 3 if quick else 9), *burst(contest, 3 if quick else BURSTS)]
