"""`tail`: what it prints, where it looks, and that it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.config import SettingsError
from orchestrator_stub.devstack.state_directory import StateDirectory
from orchestrator_stub.devstack.tail import describe, find_channel, run_tail
from orchestrator_stub.devstack.terminal import CannotStart
from tests.fakes.serving import Local, serve_local

PROJECT = str(uuid4())
TOPIC = f"project:{PROJECT}"


@pytest.mark.parametrize(
    ("event", "payload", "line"),
    [
        (
            "file:update",
            {"file_path": "src/App.tsx", "version": 3, "revision": 12, "content": "ä"},
            "file:update   r12    v3  src/App.tsx  (2 bytes)",
        ),
        (
            "file:update",
            {"file_path": "a.png", "version": 1, "revision": 2, "content": None, "size": 120_000},
            "file:update   r2     v1  a.png  (120,000 bytes, by reference)",
        ),
        (
            "file:update",
            {
                "file_path": "package-lock.json",
                "version": 2,
                "revision": 3,
                "content": None,
                "size": 400_000,
                "splices": [[1, 2, "x"]],
            },
            "file:update   r3     v2  package-lock.json  (400,000 bytes, 1 splices)",
        ),
        (
            "file:delete",
            {"file_path": "old.ts", "version": 4, "revision": 13},
            "file:delete   r13    v4  old.ts",
        ),
        (
            "bulk:apply",
            {
                "revision": 14,
                "files": [{"action": "update", "file_path": "a"}, {"action": "delete", "file_path": "b"}],
            },
            "bulk:apply    r14    2 files: +a -b",
        ),
        (
            "bulk:apply",
            {"revision": 1, "files": [{"file_path": str(n)} for n in range(8)]},
            "bulk:apply    r1     8 files: +0 +1 +2 +3 +4 +5 … 2 more",
        ),
        (
            "bulk:apply",
            {"revision": 1, "files": [], "complete": False},
            "bulk:apply    r1     too many files to name; ask sync",
        ),
        ("snapshot:ready", {"snapshot_url": "https://secret"}, "snapshot:ready"),
    ],
)
def test_an_event_is_one_line(event: str, payload: dict[str, object], line: str) -> None:
    assert describe(event, payload) == line


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
KEYS = st.sampled_from(["file_path", "files", "content", "size", "version", "revision", "complete", "x"])


@given(st.sampled_from(["file:update", "file:delete", "bulk:apply", "x"]), st.dictionaries(KEYS, JSON))
def test_no_payload_breaks_it_or_the_terminal(event: str, payload: dict[str, object]) -> None:
    assert describe(event, {**payload, "version": 1, "revision": 1}).isprintable()


def test_where_it_looks(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is `preview-orchestrator dev` running"):
        find_channel("-", tmp_path)
    info = {"orchestrator_url": "http://x", "service_key": "k", "project_id": PROJECT}
    (tmp_path / "dev.json").write_text(json.dumps(info))
    assert str(find_channel("-", tmp_path).project_id) == PROJECT
    other = str(uuid4())
    assert str(find_channel(other, tmp_path).project_id) == other
    with pytest.raises(SettingsError, match="must be a project's UUID"):
        find_channel("nonsense", tmp_path)
    (tmp_path / "dev.json").write_text("{")
    with pytest.raises(SettingsError):
        find_channel("-", tmp_path)


def test_what_a_killed_dev_left_is_not_taken_for_a_running_one(tmp_path: Path) -> None:
    info = {"orchestrator_url": "http://x", "service_key": "k", "project_id": PROJECT}
    state = StateDirectory(tmp_path)
    with state.lock():
        (tmp_path / "dev.json").write_text(json.dumps(info))
        assert str(find_channel("-", tmp_path).project_id) == PROJECT
        assert str(find_channel("-", tmp_path).project_id) == PROJECT, "to ask takes nothing away"
        with pytest.raises(CannotStart, match="another dev"), StateDirectory(tmp_path).lock():
            pass
    with pytest.raises(SettingsError, match="is `preview-orchestrator dev` running"):
        find_channel("-", tmp_path)
    with state.lock():
        pass


@contextlib.asynccontextmanager
async def tailing(local: Local, state: Path, out: io.StringIO) -> AsyncIterator[None]:
    info = {"orchestrator_url": local.url, "service_key": local.keys.service_key, "project_id": PROJECT}
    (state / "dev.json").write_text(json.dumps(info))
    task = asyncio.create_task(run_tail("-", state, out=out))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not true():
            await asyncio.sleep(0.01)


async def test_it_prints_what_happens_and_comes_back(database: str, tmp_path: Path) -> None:
    out = io.StringIO()
    async with serve_local(database, tmp_path / "storage") as local, tailing(local, tmp_path, out):
        connections, seen = local.stand_in.realtime.connections, set()

        async def joined() -> None:
            """On a socket that was not there before."""
            await until(lambda: any(one.channels for one in connections - seen))
            seen.update(connections)

        await joined()
        await local.send(
            TOPIC, "file:update", {"file_path": "a.ts", "content": "1", "version": 1, "revision": 1}
        )
        await until(lambda: "a.ts" in out.getvalue())
        await local.fault(action="expire_tokens")
        await joined()
        await local.fault(action="abort")
        await joined()
        await local.send(TOPIC, "file:delete", {"file_path": "a.ts", "version": 2, "revision": 2})
        await until(lambda: "file:delete" in out.getvalue())
    lines = [line.split(maxsplit=1)[1].strip() for line in out.getvalue().splitlines()]
    assert lines == ["file:update   r1     v1  a.ts  (1 bytes)", "file:delete   r2     v2  a.ts"]
