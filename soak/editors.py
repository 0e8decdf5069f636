"""The editors: each has a project's directory on its disk, changes it as `writing` says, and saves as the product does.

What was saved is what the directory holds; that is what everything else is compared with in the end. A save that the
stack does not take now (it is being killed) is kept and sent later, as an editor would.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from pathlib import Path
from uuid import UUID

import httpx

from orchestrator_stub.devstack.editor import Editor, Sent
from orchestrator_stub.devstack.project_client import UserAuth
from orchestrator_stub.platform.source_files import scan
from soak.stack import Stack
from soak.writing import ASSISTED, PERSON, Action, File, Step, Writing

EXAMPLE = Path(__file__).parents[1] / "examples" / "react-app"

SERVER = '''\
"""A dev server that costs little: the project's own files, never from a cache."""
import os
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer


class Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript"}

    def send_head(self):
        del self.headers["If-Modified-Since"]
        return super().send_head()

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
'''

SMALL = {
    "package.json": '{"name": "soak", "private": true, "scripts": {"dev": "exec python3 server.py"}}\n',
    "server.py": SERVER,
    "index.html": '<!doctype html><title>soak</title><script type="module" src="/src/marker.js"></script>\n',
}
"""A project whose preview is a small server: 15 MB, and npm's 50 above it, where Vite takes 140 to 250."""


def first_files(*, vite: bool) -> dict[str, File]:
    """What a project is made with."""
    if not vite:
        return {path: File(text.encode()) for path, text in SMALL.items()}
    return {path: File((EXAMPLE / path).read_bytes()) for path in scan(EXAMPLE)}


class ProjectEditor:
    """One project's editor. Holding `busy` keeps it from its next action."""

    def __init__(
        self, stack: Stack, number: int, project_id: UUID, owner: UUID, *, seed: int, vite: bool
    ) -> None:
        self.number = number
        self.id = project_id
        self.directory = stack.state / "projects" / str(number)
        self._dice = random.Random(f"editor {seed} {number}")
        self.writing = Writing(first_files(vite=vite), random.Random(f"writing {seed} {number}"))
        self._kinds = ASSISTED if number % 3 == 0 else PERSON
        self._http = httpx.AsyncClient(
            base_url=stack.url,
            headers={"apikey": stack.keys.anon_key},
            auth=UserAuth(stack.keyring, owner, time.time),
            timeout=30,
            trust_env=False,
        )
        self.directory.mkdir(parents=True)
        baseline = stack.state / "projects" / f"{number}.json"
        self._editor = Editor(self.directory, project_id, self._http, baseline)
        self.done: Counter[str] = Counter()
        self.refused: list[str] = []
        """Saves that the database turned away; there should be none."""
        self._unsent = False
        self.busy = asyncio.Lock()

    async def begin(self) -> None:
        """Make the first tree and save it. Raises `httpx.HTTPError`."""
        self.writing.begin()
        await asyncio.to_thread(_write, self.directory, self.writing.files)
        self._count(await self._editor.send_all())

    async def work(self, working: asyncio.Event, pause: float) -> None:
        """Edit for ever, while there is `working`."""
        while True:
            await asyncio.sleep(self._dice.expovariate(1 / pause))
            await working.wait()
            async with self.busy:
                if working.is_set():
                    await self._save(*self.writing.act(self._kinds))

    async def _save(self, action: Action, steps: list[Step]) -> None:
        for step in steps:
            await asyncio.to_thread(_write, self.directory, step)
            self.done["commits"] += 1
            try:
                self._count(await self._editor.send(set(step)))
            except httpx.HTTPError:
                self.done["unsent"] += 1
                self._unsent = True
        self.done[action] += 1
        if self._unsent:
            await self._send_rest()

    async def say(self, step: Step) -> None:
        """One save of our own, sent at once or with the rest."""
        await asyncio.to_thread(_write, self.directory, step)
        await self.finish()

    async def finish(self, seconds: float = 120.0) -> None:
        """Send all that is not sent yet. Raises the last `httpx.HTTPError` after so many seconds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self._count(await self._editor.send_all())
            except httpx.HTTPError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)
            else:
                self._unsent = False
                return

    async def _send_rest(self) -> None:
        try:
            self._count(await self._editor.send_all())
        except httpx.HTTPError:
            return
        self._unsent = False

    async def close(self) -> None:
        await self._http.aclose()

    def _count(self, sent: Sent) -> None:
        self.refused.extend(sent.skipped)


def _write(root: Path, step: Step) -> None:
    """Files made and removed, and with the last of a directory the directory, as an editor's file tree does it."""
    for path, file in step.items():
        if file is None:
            (root / path).unlink(missing_ok=True)
            for parent in (root / path).parents:
                if parent == root or any(parent.iterdir()):
                    break
                parent.rmdir()
    for path, file in step.items():
        if file is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(file.content)
            (root / path).chmod(0o755 if file.executable else 0o644)
