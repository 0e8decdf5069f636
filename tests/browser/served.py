"""One project served by a real dev server, with the agent's end of its plugin and without a database.

What the agent does to the tree, the tests do here step by step: so a fault can lie between any two steps.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from agent.config import Settings
from agent.core.model import RelPath
from agent.devserver.screen import Screen, What
from agent.devserver.supervisor import Supervisor
from agent.telemetry.metrics import Metrics
from tests.ports import free_port
from tests.system.stack import EXAMPLE

T = TypeVar("T")
SECONDS = 30.0
"""For what a busy machine does late."""


INDEX = """<!doctype html>
<html><body><div id="root"></div><script type="module" src="/src/main.tsx"></script></body></html>
"""
MAIN = """import { createRoot } from 'react-dom/client'
import './index.css'
import { App } from './App.tsx'

createRoot(document.getElementById('root')!).render(<App />)
"""


def small_project(root: Path, files: Mapping[str, str | None]) -> Path:
    """The example's packages and configuration, with sources of a test's own."""
    root.mkdir()
    for name in ("package.json", "package-lock.json", "tsconfig.json", "vite.config.ts"):
        shutil.copy(EXAMPLE / name, root / name)
    for path, text in {"index.html": INDEX, "src/main.tsx": MAIN, **files}.items():
        if text is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
    return root


class Served:
    """Starts on `with`; the loop of the agent's half runs in a thread of its own."""

    def __init__(
        self,
        root: Path,
        installed: Path,
        *,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        seconds: float = 120.0,
    ) -> None:
        settings = Settings(
            project_id=UUID(int=1), session_id=UUID(int=1), project_dir=root, dev_port=free_port(),
            dev_host="127.0.0.1", modules_dir=installed,
        )  # fmt: skip
        self.root = root
        self._seconds = seconds  # for its first start
        self.revision = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served")
        self.screen = Screen(root, metrics=Metrics(), clock=clock)
        self.supervisor = Supervisor(settings, environ={**os.environ, **(environ or {})}, screen=self.screen)

    def __enter__(self) -> Served:
        self._thread.start()
        self._task = self._on_loop(lambda: asyncio.create_task(self.supervisor.run()))
        self._on_loop(self.supervisor.project_ready)
        self.until("it is served", lambda: self.supervisor.ready, self._seconds)
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self.screen.close()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- what the agent does

    def begin(self, *paths: str) -> None:
        """A batch of these paths begins."""
        self._on_loop(lambda: self.screen.begin([RelPath(each) for each in paths]))

    def put(self, path: str, text: str | None) -> What:
        """One file, by rename, as the agent writes; None removes it."""
        target = self.root / path
        known = target.exists()
        if text is None:
            target.unlink()
            return "unlink"
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = self.root.parent / f"{self.root.name}.staged"
        staged.write_text(text)
        staged.rename(target)
        return "change" if known else "add"

    def undo(self) -> None:
        """The batch that was begun did not happen."""
        self._on_loop(self.screen.undo)

    def commit(self, changes: Mapping[str, What]) -> int:
        """The batch is on the disk; its revision."""
        self.revision += 1
        self._on_loop(
            lambda: self.screen.commit(self.revision, {RelPath(path): what for path, what in changes.items()})
        )
        return self.revision

    def apply(self, files: Mapping[str, str | None]) -> int:
        """One batch, whole, of what is not there already; its revision."""
        there = {path: file.read_text() if (file := self.root / path).exists() else None for path in files}
        files = {path: text for path, text in files.items() if text != there[path]}
        self.begin(*files)
        return self.commit({path: self.put(path, text) for path, text in files.items()})

    # --- what happens to it

    def die(self) -> None:
        """The agent's socket goes, as when its process is killed; another one listens then at the same place."""
        self._on_loop(self.screen.close)

    def kill_dev_server(self) -> None:
        """The dev server is killed; the supervisor starts another."""
        pid = self.status()["pid"]
        assert isinstance(pid, int)
        os.killpg(pid, signal.SIGKILL)
        self.until("another runs", lambda: self.status()["pid"] not in (None, pid))
        self.until("it is served", lambda: self.supervisor.ready, 60)

    # --- what is known

    @property
    def url(self) -> str:
        """Where it is served."""
        return self.supervisor.url

    def report(self) -> dict[str, Any]:
        """What is shown and which errors are open."""
        return self._on_loop(self.screen.report)

    def status(self) -> dict[str, Any]:
        """What the supervisor says."""
        return self._on_loop(self.supervisor.report)

    def problems(self) -> list[str]:
        """The kinds of what is wrong with the screen."""
        return self._on_loop(lambda: [each.kind for each in self.screen.problems(ready=True)])

    def memory(self) -> float:
        """Bytes of memory of the dev server's own, all its processes together."""
        group = self.status()["pid"]
        total = 0
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(entry.name)) == group:
                    total += int((entry / "statm").read_text().split()[1])
        return total * 4096.0

    def until(self, what: str, wanted: Callable[[], T | None], seconds: float = SECONDS) -> T:
        """The first value that holds."""
        deadline = time.monotonic() + seconds
        while not (value := wanted()):
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}; {self.report()}"
            time.sleep(0.01)
        return value

    def shown(self, revision: int | None = None) -> dict[str, Any]:
        """Wait until a visible page shows the newest revision (or `revision`)."""
        wanted = self.revision if revision is None else revision

        def now() -> dict[str, Any] | None:
            report = self.report()
            return report if report["shown"] and report["shown"]["revision"] >= wanted else None

        return self.until(f"revision {wanted} is shown", now)

    def errors(self, *kinds: str) -> list[tuple[str, int | None, int]]:
        """File, line and revision of the open errors of these kinds."""
        return [
            (each["file"], each["line"], each["revision"])
            for each in self.report()["errors"]
            if each["kind"] in kinds
        ]

    def _on_loop(self, call: Callable[[], T]) -> T:
        async def called() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result(SECONDS)
