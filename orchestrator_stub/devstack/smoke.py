"""One file made, edited and removed again, timed from the save to what the dev server serves: `dev --once`."""

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
            # Each look is work for the dev server and for this very loop: often enough to see, no oftener.
            await asyncio.sleep(0.01)
        raise CannotStart(f"the preview did not {what} within {ONCE_DEADLINE:.0f} s")

    async def _rpc(self, name: str, arguments: Mapping[str, object]) -> None:
        body = {"project_uuid": self._info.project_id, **arguments}
        (await self._http.post(f"/rest/v1/rpc/{name}", json=body)).raise_for_status()
