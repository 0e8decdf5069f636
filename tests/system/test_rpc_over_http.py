"""A wrong call ends in the right HTTP status and a sentence that names the argument; no revision is spent."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest

from tests.system.plane import Plane, Project, running_plane

pytestmark = pytest.mark.system


@pytest.fixture
async def plane(database: str, tmp_path: Path) -> AsyncIterator[Plane]:
    async with running_plane(database, tmp_path) as plane:
        yield plane


@pytest.fixture
async def project(plane: Plane) -> Project:
    return await plane.project({"src/a.ts": "a\n"})


async def call(
    project: Project, name: str, headers: dict[str, str] | None = None, **arguments: Any
) -> httpx.Response:
    body = {"project_uuid": str(project.id), **arguments}
    return await project.plane.http.post(f"/rest/v1/rpc/{name}", json=body, headers=headers)


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("upsert_project_file", {"p_file_path": "../x", "p_content": "x"}, 400, "file_path"),
    ("upsert_project_file", {"p_file_path": "node_modules/x", "p_content": "x"}, 400, "file_path"),
    ("upsert_project_file", {"p_file_path": None, "p_content": "x"}, 400, "p_file_path"),
    ("upsert_project_file", {"p_file_path": "x", "p_content": None}, 400, "p_content"),
    ("upsert_project_file", {"p_file_path": "src", "p_content": "x"}, 409, "src"),
    ("upsert_project_file", {"p_file_path": "x", "p_content": "x", "expected_version": 7}, 409, "expected_version"),
    ("delete_project_file", {"p_file_path": "never/was"}, 404, "p_file_path"),
    ("upsert_project_file", {"p_file_path": "x", "p_content": "x", "project_uuid": str(uuid4())}, 404, "project_uuid"),
    ("apply_project_files", {"changes": {}}, 400, "changes"),
    ("apply_project_files", {"changes": [{"file_path": 7}]}, 400, "changes[0]"),
    ("apply_project_files", {"changes": [{"file_path": f"f{n}", "content": ""} for n in range(5001)]}, 413, "changes"),
    ("upsert_project_file", {"p_file_path": "big", "p_content": "x" * 10_485_761}, 413, "content of big"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "status", "says"), REFUSED, ids=lambda value: str(value)[:40])
async def test_a_wrong_argument_is_named(
    project: Project, name: str, arguments: dict[str, Any], status: int, says: str
) -> None:
    before = await project.rpc("changes_since", epoch="none", revision=0)
    answer = await call(project, name, **arguments)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["message"]
    assert await project.rpc("changes_since", epoch="none", revision=0) == before
    assert await project.files() == {"src/a.ts": b"a\n"}


async def test_a_conflict_brings_the_current_head(project: Project) -> None:
    answer = await call(
        project, "upsert_project_file", p_file_path="src/a.ts", p_content="x", expected_version=0
    )
    assert answer.status_code == 409
    assert answer.json()["code"] == "PT409"
    assert '"version": 1' in str(answer.json()["details"])


async def test_too_many_writes_in_a_minute_are_told_to_wait(project: Project) -> None:
    async with await psycopg.AsyncConnection.connect(project.plane.dsn, autocommit=True) as connection:
        await connection.execute("update preview.settings set writes_per_minute = 3")
    statuses = [
        (await call(project, "upsert_project_file", p_file_path="src/a.ts", p_content=f"{n}")).status_code
        for n in range(12)
    ]
    assert 429 in statuses
    head = await project.rpc("changes_since", epoch="none", revision=0)
    assert head["revision"] == 1 + statuses.count(200), "a refused write spends no revision"


async def test_nobody_writes_without_a_right_to(project: Project, tmp_path: Path) -> None:
    agent = await project.session(tmp_path / "machine")
    anon = project.plane.keys.anon_key
    for token in (anon, agent.environ["REALTIME_TOKEN"]):
        headers = {"apikey": anon, "authorization": f"Bearer {token}"}
        answer = await call(project, "upsert_project_file", headers, p_file_path="src/a.ts", p_content="x")
        assert answer.status_code in (401, 403), answer.text
    assert await project.files() == {"src/a.ts": b"a\n"}
