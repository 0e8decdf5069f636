"""Stores and restores Vite's pre-bundled dependencies (`node_modules/.vite/deps`) between machines of a project.

Vite bundles the packages that a project imports before it serves its first page: seconds of processor time, and where
its scan has missed one, a reload in front of the visitor. It keeps the bundles by hashes of the lock file and of its
settings, the project's directory among them, and throws away what does not match. So nothing here has to be right for a
preview to be: a bundle that is not the one wanted costs what no bundle costs.

The archive is a layer of its own key (`install_key.bundle_key`) that the project's next machine is not told of ahead.
The project's code has written what is in it. So it is its project's alone, is bounded when it is packed as when it is
unpacked, and nothing of it but that directory leaves the stage.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.modules.arrivals import Arrival, Layers
from agent.modules.layers import Layer, Missing
from agent.modules.stages import Stages
from agent.modules.steps import BUNDLE
from agent.project.choice import read_small
from agent.project.imports import imports
from agent.project.install_key import bundle_key
from agent.telemetry.logging import get_logger

DEPS: Final = Path("node_modules/.vite/deps")
METADATA: Final = DEPS / "_metadata.json"
"""Vite writes it last: it names the other files."""
LARGEST_METADATA: Final = 4 * 2**20
WAIT_SECONDS: Final = 3.0
"""For a bundle, once node_modules are there: what Vite takes to make one, so that waiting costs no more."""
QUIET_SECONDS: Final = 10.0
"""For which Vite must not have bundled again: the first visitors show it what its scan has missed."""
MOST_SENT: Final = 5
"""Bundles of one session. A project that changes what it imports all day makes one a machine that is opened."""

log = get_logger("modules")


@dataclass(frozen=True, slots=True)
class _Known:
    """The bundle that is kept under a key: the layer, if it was read or sent here, and the metadata in it."""

    key: str
    layer: Layer | None
    metadata: str | None


LayerKey = Callable[[], Awaitable[str | None]]
"""Gives the key of the layer for an install; None: no key says what it brings about."""


class Bundles:
    """What Vite bundles ahead, of one session."""

    def __init__(self, layers: Layers, stages: Stages[Any]) -> None:
        self._layers = layers
        self._stages = stages
        self._known: _Known | None = None
        self._keeping = False
        self._sent = 0
        self._installed: tuple[Path, LayerKey] | None = None
        """The directory that was installed last."""

    def installed(self, root: Path, layer_key: LayerKey) -> None:
        """Note which directory is installed, and so where Vite will bundle."""
        self._installed = root, layer_key

    async def fetch(self, root: Path, layer_key: LayerKey) -> Path | None:
        """Return the stage that has the bundle of a project; None: there is none that could be used."""
        try:
            key = await _key(root, layer_key)
            found = await self._layers.find(key, ahead=False, send=False) if key else None
            if not isinstance(found, Layer):
                return None
            arrival = await self._layers.begin(found, bundle=True)
            return await self._arrived(arrival, found) if arrival else None
        except Exception as bug:
            log.error("modules.bug", exc_info=bug)
            return None

    async def _arrived(self, arrival: Arrival, layer: Layer) -> Path | None:
        try:
            await asyncio.wait({arrival.task})
        finally:
            if not arrival.task.done():
                await arrival.cancel()
        metadata = await asyncio.to_thread(_metadata, arrival.stage / "tree") if arrival.is_there else None
        if metadata is None:
            return None
        self._known = _Known(layer.key, layer, metadata)
        return arrival.stage

    async def place(self, stage: Path, directory: Path) -> None:
        """Move a fetched bundle into the node_modules of a directory, if that has none."""
        if (await self._stages.shell(BUNDLE, stage / "tree", directory, DEPS)).ok:
            self._layers.count("bundle_unpacked")

    async def keep(self) -> None:
        """Send what Vite has bundled whenever it is another, until cancelled."""
        if self._keeping:
            return
        self._keeping = True
        done: tuple[object, ...] | None = None
        try:
            while self._sent < MOST_SENT:
                root, layer_key, done = await self._quiet(done)
                self._sent += await self._send_if_new(root, layer_key)
        finally:
            self._keeping = False

    async def _quiet(self, done: tuple[object, ...] | None) -> tuple[Path, LayerKey, tuple[object, ...]]:
        """Wait until Vite has bundled, other than `done`, and has not done so again for QUIET_SECONDS."""
        before: tuple[object, ...] | None = None
        while True:
            installed = self._installed
            now = (installed[0], *_state(installed[0])) if installed else None
            if installed is not None and now is not None and len(now) > 1 and now == before != done:
                return *installed, now
            before = now
            await asyncio.sleep(QUIET_SECONDS)

    async def _send_if_new(self, root: Path, layer_key: LayerKey) -> bool:
        """Send the bundle in a directory, unless it is the one that is kept. Returns whether that was tried."""
        metadata = await asyncio.to_thread(_metadata, root)
        if metadata is None or (key := await _key(root, layer_key)) is None:
            return False
        known = self._known if self._known and self._known.key == key else None
        if known and known.metadata == metadata:
            return False
        self._known = _Known(key, None, metadata)
        found = await self._layers.find(key, refused=known.layer if known else None, ahead=False)
        if not isinstance(found, Missing) or not found.upload_urls:
            return False
        if await self._layers.send(found, root, None):
            sent = await self._layers.find(key, ahead=False, send=False)
            self._known = _Known(key, sent if isinstance(sent, Layer) else None, metadata)
        return True


async def _key(root: Path, layer_key: LayerKey) -> str | None:
    if (layer := await layer_key()) is None:
        return None
    found = await asyncio.to_thread(imports, root)
    return bundle_key(layer, str(root), *found) if found else None


def _metadata(directory: Path) -> str | None:
    """Return the hash of Vite's metadata in a directory; None where there is none."""
    content = read_small(directory / METADATA, LARGEST_METADATA)
    return hashlib.sha256(content).hexdigest() if content else None


def _state(directory: Path) -> tuple[int, ...]:
    """Return which state of Vite's metadata is there; empty where there is none."""
    try:
        found = os.lstat(directory / METADATA)
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size
