"""The whole local stack as a process of its own, and the questions a browser would ask of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "react-app"
START_SECONDS = 120.0
"""For the first start on a busy machine: initdb, npm install, Vite."""


def copy_example(to: Path) -> Path:
    """The example as a fresh clone has it."""
    shutil.copytree(EXAMPLE, to, ignore=shutil.ignore_patterns("node_modules", "dist"))
    return to


def until(what: str, condition: Callable[[], object], seconds: float = 60.0) -> Any:
    """The condition's first true value. Fails with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.005)


@dataclass
class Stack:
    """`preview-orchestrator dev`, running on a project directory with its state beside it."""

    project: Path
    state: Path
    options: tuple[str, ...] = ()
    editor: bool = False
    """Build and serve the editor page too."""
    info: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def begin(self) -> None:
        """Start, and wait for nothing."""
        log = (self.state.parent / "dev.log").open("a")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator_stub", "dev", str(self.project), "--port", "0",
                 "--state", str(self.state), *([] if self.editor else ["--no-editor"]), *self.options],
                cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip

    def start(self) -> Stack:
        """Start, and wait until the preview is served."""
        dev_json = self.state / "dev.json"
        before = dev_json.stat().st_mtime_ns if dev_json.exists() else 0
        self.begin()

        def published() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            return dev_json.exists() and dev_json.stat().st_mtime_ns > before

        until("dev.json is written", published, START_SECONDS)
        self.info = json.loads(dev_json.read_text())
        return self

    def log(self) -> str:
        """What it printed."""
        return (self.state.parent / "dev.log").read_text()

    def interrupt(self) -> int:
        """Ctrl-C; the exit code."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=30)

    def kill(self) -> None:
        """However the test ended, nothing stays."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.interrupt()
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    # --- as the editor

    def rpc(self, name: str, **arguments: object) -> Any:
        """Call an RPC as the product's backend would, with the service key."""
        key = self.info["service_key"]
        answer = httpx.post(
            f"{self.info['orchestrator_url']}/rest/v1/rpc/{name}",
            json={"project_uuid": self.info["project_id"], **arguments},
            headers={"apikey": key, "authorization": f"Bearer {key}"},
            timeout=20,
        )
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def save(self, path: str, content: str) -> Any:
        """One save."""
        return self.rpc("upsert_project_file", p_file_path=path, p_content=content)

    # --- as the browser

    def fetch(self, path: str) -> httpx.Response:
        """What Vite serves at `path`, asked as a module import asks."""
        return httpx.get(f"{self.info['preview_url']}/{path}", headers={"accept": "*/*"}, timeout=10)

    def serves(self, path: str, text: str) -> bool:
        """Whether Vite serves `path`, transformed, with `text` in it."""
        answer = self.fetch(path)
        return answer.status_code == 200 and text in answer.text

    def gone(self, path: str) -> bool:
        """Whether Vite has no such module: a 404, or the page it answers every unknown path with."""
        answer = self.fetch(path)
        return answer.status_code == 404 or answer.headers.get("content-type", "").startswith("text/html")

    def status(self) -> dict[str, Any]:
        """The agent's own report."""
        report: dict[str, Any] = httpx.get(f"{self.info['health_url']}/status", timeout=10).json()
        return report

    def processes(self) -> dict[int, str]:
        """Every process on the machine that has to do with this stack: by command line, directory or environment."""
        marks = (str(self.state).encode(), str(self.state.resolve()).encode())
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                command = (entry / "cmdline").read_bytes()
                known = command + (entry / "environ").read_bytes() + os.readlink(entry / "cwd").encode()
            except OSError:
                continue
            if state != "Z" and any(mark in known for mark in marks):
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found
