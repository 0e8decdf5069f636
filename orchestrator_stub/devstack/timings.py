"""Says how long things took: one save with `dev --once`, each part of the start with `dev --timeline`.

The save is a file that is made, edited and removed, each until the dev server serves it so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import quote
from uuid import uuid4

import httpx

from orchestrator_stub.devstack.terminal import CannotStart, DevInfo, DevOptions

ONCE_DEADLINE: Final = 300.0
"""Seconds that `--once` gives the start, most of which is the first `npm install`, and then each of its steps."""

BAR: Final = 40
"""Characters of the longest bar."""
PARTS: Final = {
    "machine": "until the agent's process",
    "hydrated": "files on the disk",
    "modules": "node_modules in place",
    "dev_server": "dev server started",
    "first_page": "first page",
    "shown": "on a screen",
}


async def measure_save(
    options: DevOptions, info: DevInfo, http: httpx.AsyncClient, start_seconds: float
) -> dict[str, float]:
    """Write, edit and remove one file, and give the times. `http` speaks to the stack as a user.

    `start_seconds`, how long the start took, is reported with them.

    Raises `CannotStart` when a step takes longer than `ONCE_DEADLINE`.
    """
    name = f"preview-sync-check-{uuid4().hex[:8]}.js"
    path = f"src/{name}" if (options.directory / "src").is_dir() else name
    async with httpx.AsyncClient(base_url=info.preview_url, timeout=10, trust_env=False) as preview:
        check = Check(options, info, http, preview, path)
        try:
            created = await check.write("made")
            # Two writes to one path at once would measure the agent's spacing of them, not the way of one save.
            await asyncio.sleep(0.2)
            return {
                "start_seconds": round(start_seconds, 3),
                "create_to_served_ms": created,
                "save_to_served_ms": await check.write("edited"),
                "delete_to_gone_ms": await check.remove(),
            }
        finally:
            (options.directory / path).unlink(missing_ok=True)


def timing_table(timings: Mapping[str, float]) -> str:
    """The times for a person."""
    lines = "".join(f"    {name.replace('_', ' '):<22}{value:>9}\n" for name, value in timings.items())
    return f"{lines}\n"


class Check:
    """One file that `--once` writes through the directory, or with `--no-watch` through the RPC."""

    def __init__(
        self,
        options: DevOptions,
        info: DevInfo,
        http: httpx.AsyncClient,
        preview: httpx.AsyncClient,
        path: str,
    ) -> None:
        self._options = options
        self._info = info
        self._http = http
        self._preview = preview
        self._path = path

    async def write(self, what: str) -> float:
        """Milliseconds from the save to the new content being served."""
        nonce = f"{what}-{uuid4().hex}"
        content = f'export const check = "{nonce}";\n'
        started = time.perf_counter()
        if self._options.watch:
            (self._options.directory / self._path).write_text(content)
        else:
            await self._rpc("upsert_project_file", {"p_file_path": self._path, "p_content": content})
        return await self._until(started, lambda served: nonce in served, "serve the new content")

    async def remove(self) -> float:
        """Milliseconds from the removal to the file not being served any more."""
        started = time.perf_counter()
        if self._options.watch:
            (self._options.directory / self._path).unlink()
        else:
            await self._rpc("delete_project_file", {"p_file_path": self._path})
        return await self._until(
            started, lambda served: "export const check" not in served, "forget the file"
        )

    async def _until(self, started: float, done: Callable[[str], bool], what: str) -> float:
        deadline = started + ONCE_DEADLINE
        while time.perf_counter() < deadline:
            with suppress(httpx.HTTPError):
                if done((await self._preview.get(f"/{quote(self._path)}")).text):
                    return round((time.perf_counter() - started) * 1000, 1)
            # Each request costs the dev server and this loop time: 10 ms is as fine as the result is read.
            await asyncio.sleep(0.01)
        raise CannotStart(f"the preview did not {what} within {ONCE_DEADLINE:.0f} s")

    async def _rpc(self, name: str, arguments: Mapping[str, object]) -> None:
        body = {"project_uuid": self._info.project_id, **arguments}
        (await self._http.post(f"/rest/v1/rpc/{name}", json=body)).raise_for_status()


async def start_of(health_url: str, clock: float) -> dict[str, float]:
    """Return when each part ended, in seconds from the start of `dev`; nothing, where the agent does not say.

    Args:
        health_url: The agent's.
        clock: Seconds since the start of `dev`, now.
    """
    async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
        try:
            status = (await http.get(f"{health_url}/status")).json()
            machine = max(0.0, clock - float(status["uptime_seconds"]))
            return {
                "machine": machine,
                **{part: machine + float(end) for part, end in status["start"].items()},
            }
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def bars(ends: Mapping[str, float]) -> str:
    """One line for each part, from where the one before ended. `ends`: seconds from the start, by part."""
    whole = max(ends.values(), default=0.0) or 1.0
    lines, before = [], 0.0
    for part, end in sorted(ends.items(), key=lambda each: each[1]):
        begin, until = round(BAR * before / whole), round(BAR * end / whole)
        bar = " " * begin + "█" * max(1, until - begin)
        lines.append(f"    {PARTS.get(part, part):<26}{bar:<{BAR + 1}} {max(0.0, end - before):6.2f} s\n")
        before = max(before, end)
    return "".join(lines) + f"    {'together':<26}{'':<{BAR + 1}} {before:6.2f} s\n\n"
