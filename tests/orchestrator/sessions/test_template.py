"""What a new project begins with: once, in one revision, as it stands in the directory."""

from __future__ import annotations

import asyncio
import io
import os
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest

from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.sessions.template import Template
from tests.fakes.descriptors import no_descriptors
from tests.system.plane import Plane, running_plane

PICTURE = bytes(range(256)) * 8
FILES = {"package.json": b"{}\n", "src/App.tsx": "export const Ä = 1\n".encode(), "logo.png": PICTURE}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A template: text, a picture, a program, and what is never a project's."""
    place = tmp_path / "template"
    for path, content in {**FILES, "bin/run": b"#!/bin/sh\n", "node_modules/x/y.js": b"no"}.items():
        file = place / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (place / "bin/run").chmod(0o755)
    return place


@pytest.fixture
async def plane(database: str, tmp_path: Path, directory: Path) -> AsyncIterator[Plane]:
    async with running_plane(database, tmp_path / "plane", template_dir=directory) as running:
        yield running


async def session_of(plane: Plane, project_id: UUID) -> dict[str, Any]:
    answer = await plane.http.post("/v1/sessions", json={"project_id": str(project_id)})
    assert answer.status_code == 201, answer.text
    form: dict[str, Any] = answer.json()
    return form


async def manifest_of(plane: Plane, session: dict[str, Any]) -> dict[str, Any]:
    answer = await plane.http.post(f"/v1/sessions/{session['session_id']}/snapshot")
    manifest: dict[str, Any] = answer.json()["manifest"]
    return manifest


async def test_a_new_project_has_its_template_at_its_first_session_in_one_revision(plane: Plane) -> None:
    project = await plane.project({})
    assert (await project.rpc("changes_since", epoch="none", revision=0))["revision"] == 0
    session = await session_of(plane, project.id)
    manifest = await manifest_of(plane, session)
    assert manifest["revision"] == 1
    assert {f["file_path"]: f["size"] for f in manifest["files"]} == {
        **{path: len(content) for path, content in FILES.items()},
        "bin/run": 10,
    }
    assert {f["file_path"] for f in manifest["files"] if f.get("executable")} == {"bin/run"}
    # The machine was given what is there now, the picture with it.
    [spec] = plane.driver.made.values()
    async with httpx.AsyncClient() as http:
        packed = (await http.get(spec.env["SNAPSHOT_URL"])).content
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert {path: archive.read(path) for path in FILES} == FILES
    await session_of(plane, project.id)
    assert (await manifest_of(plane, session))["revision"] == 1, "and never again"


async def test_a_template_that_cannot_be_read_is_not_a_smaller_one(plane: Plane, directory: Path) -> None:
    project = await plane.project({})
    async with (
        pool_of(plane.dsn) as pool,
        httpx.AsyncClient() as http,
    ):
        template = Template(directory, pool, StorageClient(f"{plane.url}/storage/v1", "key", http))
        assert await template._is_new(project.id)
        with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
            await template.apply(project.id)
        assert await template._is_new(project.id)


async def test_without_a_template_a_new_project_stays_empty(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path, template_dir="") as plane:
        session = await session_of(plane, (await plane.project({})).id)
        manifest = await manifest_of(plane, session)
        assert (manifest["revision"], manifest["files"]) == (0, [])


async def test_many_first_sessions_at_once_give_it_once(plane: Plane) -> None:
    project = await plane.project({})
    sessions = await asyncio.gather(*(session_of(plane, project.id) for _ in range(8)))
    assert all(session["machine"] for session in sessions), sessions
    assert (await manifest_of(plane, sessions[0]))["revision"] == 1


async def test_a_project_that_had_a_commit_keeps_what_it_has(plane: Plane) -> None:
    project = await plane.project({"mine.ts": "m"})
    await project.delete("mine.ts")
    session = await session_of(plane, project.id)
    assert (await manifest_of(plane, session))["files"] == [], "emptied on purpose is not new"


@pytest.mark.parametrize("name", [b"back\\slash", b"caf\xe9", b"caf\xe9/a.ts", b"back\\slash/a.ts"])
async def test_a_template_that_no_project_may_hold_ends_the_session_and_says_why(
    plane: Plane, directory: Path, name: bytes
) -> None:
    (directory / "Readme").write_text("one")
    os.symlink("/etc/passwd", directory / "link")
    (directory / ("x" * 200)).mkdir()
    odd = directory / ("x" * 200) / os.fsdecode(name)
    odd.parent.mkdir(exist_ok=True)
    odd.write_text("a name that the database refuses")
    project = await plane.project({})
    session = await session_of(plane, project.id)

    async with asyncio.timeout(10):
        while (form := (await plane.http.get(f"/v1/sessions/{session['session_id']}")).json())[
            "state"
        ] != "failed":
            await asyncio.sleep(0.02)
    assert form["problem"].startswith("template_refused: "), form
    assert not plane.driver.made
    assert (await project.rpc("changes_since", epoch="none", revision=0))["revision"] == 0
