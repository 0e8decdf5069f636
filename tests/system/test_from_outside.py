"""What an agent is told, and what it has to tell, of any size: it goes on, and its session with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.system.plane import Agent, eventually, running_plane

pytestmark = pytest.mark.system

FILES = {"package.json": '{"scripts": {"dev": "x"}}', "src/a.ts": "a\n"}
LOUD = f"""{sys.executable} -c "print(('é' * 4090 + chr(10)) * 10); raise SystemExit(1)" """
"""A dev server whose last ten lines are 80 KB."""

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]


async def told(agent: Agent) -> dict[str, Any]:
    """The session as the control plane knows it: state, and the last heartbeat as it came."""
    async with await psycopg.AsyncConnection.connect(agent.project.plane.dsn) as connection:
        rows = await connection.execute(
            "select state, status, status_at from preview.sessions where id = %s", (agent.session_id,)
        )
        state, status, at = (await rows.fetchall())[0]
        return {"session": state, "status": status, "at": at}


async def lives_on(agent: Agent, *, dev_server: tuple[str, ...], beats: int = 3) -> dict[str, Any]:
    """After `beats` more heartbeats that arrived with the dev server like this; the last of them."""
    seen = set()

    async def beaten() -> dict[str, Any] | None:
        assert agent.process is not None
        assert agent.process.poll() is None, agent.log()[-3000:]
        now = await told(agent)
        if now["status"] and now["status"]["dev_server"] in dev_server:
            seen.add(now["at"])
        return now if len(seen) >= beats else None

    try:
        last: dict[str, Any] = await eventually("heartbeats that arrive", beaten)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{await told(agent)}\n{agent.log()[-3000:]}") from None
    return last


@pytest.mark.parametrize("limit", [65_536, 1_024], ids=["as it is", "of a strict peer"])
async def test_a_dev_server_that_says_a_lot_does_not_end_its_session(
    limit: int, database: str, tmp_path: Path
) -> None:
    async with running_plane(database, tmp_path, body_limit=limit) as plane:
        project = await plane.project(FILES)
        agent = await project.session(tmp_path / "machine", DEV_COMMAND=LOUD)
        agent.start()
        try:
            last = await lives_on(agent, dev_server=("backoff", "failed"))
            if limit == 1_024:
                assert (last["status"]["problems"], last["status"]["problems_left_out"]) == ([], 1)
            else:
                (problem,) = last["status"]["problems"]
                assert problem["kind"].startswith("dev_server_")
                assert " bytes left out … " in problem["detail"]

            async def told_whole() -> bool:
                report = await agent.status()
                problems = [] if report is None else report["problems"]
                assert {each["kind"] for each in problems} <= {"dev_server_backoff", "dev_server_failed"}
                return any("é" * 4_090 in each["detail"] for each in problems)

            await eventually("between two starts the agent itself tells all of it", told_whole)
        finally:
            agent.kill()


async def test_two_hundred_problems_do_not_end_a_session(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project({"src/a.ts": "a\n"})
        agent = await project.session(tmp_path / "machine")
        agent.start()
        try:
            await agent.equal()
            for start in range(0, 250, 50):
                refused = [
                    {"action": "update", "file_path": f"../{n}/{'é' * 190}", "content": "x"}
                    for n in range(start, start + 50)
                ]
                await project.broadcast(
                    "bulk:apply", {"files": refused, "epoch": "none", "revision": 10**6 + start}
                )
            last = await lives_on(agent, dev_server=("absent",), beats=2)

            async def left_out() -> dict[str, Any] | None:
                now = await told(agent)
                return now if now["status"]["problems_left_out"] else None

            last = await eventually("problems that did not fit", left_out)
            assert {each["kind"] for each in last["status"]["problems"]} >= {"path_refused"}
            assert await plane.http.get(f"/v1/sessions/{agent.session_id}")
            assert (await told(agent))["session"] == "ready"
        finally:
            agent.kill()


WRONG: tuple[dict[str, Any], ...] = (
    {"revision": 2**63}, {"revision": 2**64 - 1}, {"revision": 10**30}, {"version": 2**63}, {"version": 10**30},
    {"size": 2**63, "content": None, "content_hash": "0" * 64}, {"epoch": "e" * 70_000},
    {"timestamp": "0001-01-01T00:00:00+23:59"}, {"file_path": DEEP}, {"encoding": DEEP},
)  # fmt: skip
"""Of an event, otherwise the next one."""


async def test_messages_that_nobody_can_keep_are_survived(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project({"src/a.ts": "a\n"})
        agent = await project.session(tmp_path / "machine")
        agent.start()
        try:
            here = await agent.equal()
            said = {"file_path": "src/b.ts", "content": "b\n", "version": 1, "epoch": here["epoch"]}
            for wrong in WRONG:
                await project.broadcast("file:update", {**said, "revision": here["revision"] + 1, **wrong})
            await project.save("src/a.ts", "after\n")
            await agent.equal()
            assert await agent.stop() == 0
            agent.start()
            await agent.equal()
        finally:
            agent.kill()


async def test_offers_at_no_address_are_survived(database: str, tmp_path: Path) -> None:
    """Without a session API an offer is the only answer there is."""
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project({"src/a.ts": "a\n"})
        agent = await project.session(tmp_path / "machine", SESSION_API_URL="")
        agent.start()
        try:
            before = await agent.equal()
            for port in ("99999", "-1", "x", "9" * 20):
                nowhere = f"http://127.0.0.1:{port}/snapshot.zip"
                await project.broadcast("snapshot:ready", {"snapshot_url": nowhere, "manifest": None})

            async def heard() -> bool:
                report = await agent.status()
                assert agent.process is not None
                assert agent.process.poll() is None, agent.log()[-3000:]
                return report is not None and "snapshot_expired" in {
                    each["kind"] for each in report["problems"]
                }

            await eventually("the offers are refused", heard)
            await project.save("src/a.ts", "after\n")
            assert (await agent.equal())["revision"] > before["revision"]
        finally:
            agent.kill()
