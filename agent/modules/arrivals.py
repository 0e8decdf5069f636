"""Brings a layer into a staging directory while the install goes on beside it, and packs one to be sent.

A program that runs as the project's user does the unpacking and packing (`archive`).

An *arrival* is a layer on its way into a staging directory. Whoever began it waits for it as long as that is worth it,
then runs the install beside it; whichever is there first is used. Nothing here fails for its caller: an arrival that
did not work out is one line of the log and one count of `modules_total`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from agent.modules.layers import FETCH_SECONDS, Layer, LayerFailed, LayerStore, Missing, command
from agent.modules.stages import Ended, Run
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics

FIND_SECONDS: Final = 3.0
"""For the orchestrator to say whether there is a layer: a query and a signature. The install waits meanwhile."""
PACK_SECONDS: Final = 600.0
"""Two seconds of processor time, at a priority at which a busy machine may give none for long."""

log = get_logger("modules")

T = TypeVar("T")


NewStage = Callable[[], Awaitable[Path | None]]


@dataclass(slots=True, eq=False)
class Arrival:
    """A layer on its way into `stage/tree`."""

    key: str
    stage: Path
    task: asyncio.Task[str | None]
    """Returns what went wrong; None: it is whole and there."""
    began: float = field(default_factory=time.monotonic)

    @property
    def is_there(self) -> bool:
        """Whether it is unpacked, and every hash was right."""
        return self.task.done() and not self.task.cancelled() and self.task.result() is None

    async def cancel(self) -> None:
        """End it, and the program that unpacks it."""
        self.task.cancel()
        await asyncio.wait({self.task})


async def first(arrival: Arrival, install: Callable[[], Coroutine[None, None, T]]) -> T | None:
    """Run an install beside a layer that is late. Returns what the install returned; None: the layer was there first.

    An install that fails, and raises, does so only when the layer has failed, too.
    """
    managed = asyncio.create_task(install(), name="install-beside")
    try:
        if not arrival.task.done():
            await asyncio.wait({managed, arrival.task}, return_when=asyncio.FIRST_COMPLETED)
        if managed.done() and managed.exception() is not None:
            await asyncio.wait({arrival.task})
        return None if arrival.is_there else await managed
    finally:
        for task in (managed, arrival.task):
            task.cancel()
        await asyncio.wait({managed, arrival.task})


class Layers:
    """The layers of one session: what arrives, and what may be sent."""

    def __init__(
        self, store: LayerStore, run: Run[Ended], stage: NewStage, metrics: Metrics, spool: Path
    ) -> None:
        """Make it.

        Args:
            store: Where layers are.
            run: Runs a program as the project's user.
            stage: Makes a staging directory that has an empty `tree`; None: the disk has no place for it.
            metrics: Where outcomes are counted.
            spool: A directory of the agent's own, for an archive that is to be sent.
        """
        self._store = store
        self._run = run
        self._stage = stage
        self._metrics = metrics
        self._spool = spool
        self._early: Arrival | None = None
        """The layer that was named when the machine was made, while nobody has taken it."""
        self._asked = False
        """Whether an install has asked for a layer: one that is fetched ahead of it would come too late."""
        self._wanted: str | None = None
        """The key that an install has asked for last."""
        self.missing: Missing | None = None
        """The layer that was asked for last and is not there."""

    @property
    def given(self) -> Layer | None:
        """The layer that was named when the machine was made."""
        return self._store.given

    async def prefetch(self) -> None:
        """Fetch the layer that was named when the machine was made, and stay until it is there."""
        if self._asked or self.given is None or (arrival := await self.begin(self.given)) is None:
            return
        self._early = arrival
        try:
            await asyncio.wait({arrival.task})
        finally:
            if not arrival.task.done():
                await arrival.cancel()

    def take_early(self) -> Arrival | None:
        """Return the layer that is fetched ahead, which is the caller's now."""
        self._asked = True
        early, self._early = self._early, None
        return early

    async def arrival(self, key: str | None, *, near: bool) -> Arrival | None:
        """Return the layer of that key.

        Args:
            key: Of the layer; None: no layer can be used.
            near: Whether one of another key, that is on its way already, is better than none.
        """
        self.missing, self._wanted = None, key
        early = self.take_early()
        if early is not None and early.key == key and (early.is_there or not early.task.done()):
            return early
        found = await self._find(key) if key else None
        if isinstance(found, Missing):
            self.missing = found
        elif found is not None and (arrival := await self.begin(found)) is not None:
            await _cancelled(early)
            return arrival
        if key and near:
            return early
        await _cancelled(early)
        return None

    async def _find(self, key: str) -> Layer | Missing | None:
        found = await self.find(key)
        if isinstance(found, Missing):
            self.count("missing")
        return found

    async def find(
        self, key: str, *, refused: Layer | None = None, ahead: bool = True, send: bool = True
    ) -> Layer | Missing | None:
        """Ask for the layer of a key, as `LayerStore.find` does. None: nobody answered in time."""
        try:
            async with asyncio.timeout(FIND_SECONDS):
                return await self._store.find(key, refused=refused, ahead=ahead, send=send)
        except (LayerFailed, TimeoutError) as error:
            self._failed("unavailable", str(error) or f"no answer within {FIND_SECONDS:g} s")
            return None

    async def begin(self, layer: Layer, *, bundle: bool = False) -> Arrival | None:
        """Have a layer fetched and unpacked. None: there is no place for it, or an install has begun without it.

        `bundle`: it is the archive of what Vite bundled ahead.
        """
        asked, stage = self._asked, await self._stage()
        if stage is None or (asked is not self._asked and not bundle):  # an install has begun without it
            return None
        task = asyncio.create_task(self._arrive(layer, stage / "tree", bundle), name="modules")
        return Arrival(layer.key, stage, task)

    async def _arrive(self, layer: Layer, tree: Path, bundle: bool) -> str | None:
        try:
            await self._unpack(layer, tree, bundle)
        except LayerFailed as failure:
            self._failed(failure.outcome, str(failure))
            if failure.its_fault:
                found = await self.find(layer.key, refused=layer, ahead=not bundle, send=not bundle)
                if isinstance(found, Missing) and layer.key == self._wanted:
                    self.missing = found
            return str(failure)
        except Exception as bug:
            log.error("modules.bug", exc_info=bug)
            self.count("unavailable")
            return "the agent failed"
        return None

    async def _unpack(self, layer: Layer, tree: Path, bundle: bool) -> None:
        read, write = os.pipe()
        argv = command("unpack", str(tree), *(["bundle"] if bundle else []))
        program = asyncio.ensure_future(self._run(argv, read, FETCH_SECONDS))
        feeding = asyncio.ensure_future(self._feed(layer, write))
        try:
            # A program that ends early does not break the pipe: its other end is open here, too.
            await asyncio.wait({program, feeding}, return_when=asyncio.FIRST_COMPLETED)
            if feeding.done() and not isinstance(feeding.exception(), OSError):
                feeding.result()
            ended = await program
        finally:
            for task in (program, feeding):
                task.cancel()
            await asyncio.wait({program, feeding})
            os.close(read)
        if not ended.ok:
            said = ended.tail[-1] if ended.tail else "the program was killed"
            # A full disk or a stream that was cut says nothing of what is stored.
            damaged = said.startswith("refused: ") and not said.startswith("refused: truncated")
            raise LayerFailed("refused", said, its_fault=damaged)

    async def _feed(self, layer: Layer, write: int) -> None:
        loop = asyncio.get_running_loop()
        protocol = asyncio.StreamReaderProtocol(asyncio.StreamReader())
        transport, _ = await loop.connect_write_pipe(lambda: protocol, os.fdopen(write, "wb", buffering=0))
        writer = asyncio.StreamWriter(transport, protocol, None, loop)

        async def give(piece: bytes) -> None:
            writer.write(piece)
            await writer.drain()

        try:
            await self._store.fetch(layer, give)
        except BaseException:
            transport.abort()
            raise
        writer.close()
        with suppress(BrokenPipeError, ConnectionResetError):
            await writer.wait_closed()

    async def send(self, missing: Missing, directory: Path, stamp: Path | None) -> bool:
        """Pack the node_modules of a directory and send them. What goes wrong is a line of the log, and False.

        Args:
            missing: Where they are wanted.
            directory: Of the install, in which nothing of the project has run.
            stamp: A file as old as the install: what changed later is no part of a layer. None: what Vite has bundled
                ahead in there is packed instead.
        """
        began = time.monotonic()
        argv = command("pack", str(directory), str(stamp or "bundle"))
        try:
            # Unlinked from the start, and never opened by its name: the project's user writes into it.
            with tempfile.TemporaryFile(dir=self._spool) as file:
                ended = await self._run(argv, file.fileno(), PACK_SECONDS)
                if not ended.ok:
                    raise LayerFailed("refused", ended.tail[-1] if ended.tail else "the program was killed")
                size = await self._store.send(missing, file)
        except (LayerFailed, OSError) as failure:
            self._failed("not_sent", str(failure))
            return False
        outcome = "sent" if stamp else "bundle_sent"
        self.count(outcome)
        log.info(f"modules.{outcome}", bytes=size, seconds=round(time.monotonic() - began, 3))
        return True

    def used(self, arrival: Arrival, outcome: str) -> None:
        """Note that an arrival was used, as it is (`unpacked`) or as a start (`head_start`)."""
        seconds = time.monotonic() - arrival.began
        self._metrics.modules_seconds.observe(seconds)
        self.count(outcome)
        log.info("modules.used", outcome=outcome, seconds=round(seconds, 3))

    def count(self, outcome: str) -> None:
        """Count what became of a layer."""
        self._metrics.modules.labels(outcome).inc()

    def _failed(self, outcome: str, reason: str) -> None:
        self.count(outcome)
        log.warning("modules.failed", outcome=outcome, reason=reason)


async def _cancelled(arrival: Arrival | None) -> None:
    if arrival is not None:
        await arrival.cancel()
