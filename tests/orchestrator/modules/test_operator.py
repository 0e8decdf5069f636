"""`preview-orchestrator modules`: a layer for all projects, from a lock file alone."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator_stub.config import Settings
from orchestrator_stub.modules import operator
from orchestrator_stub.modules.operator import CannotBuild
from tests.agent.cli.test_modules import locked
from tests.agent.devserver.installs import needs_npm, write
from tests.system.plane import Plane, running_plane


def settings(plane: Plane) -> Settings:
    return Settings.of(
        {
            "database_url": plane.dsn,
            "supabase_url": plane.url,
            "supabase_anon_key": plane.keys.anon_key,
            "supabase_service_role_key": plane.keys.service_key,
            "template_dir": None,
        }
    )


@needs_npm
async def test_a_layer_is_built_listed_and_dropped(database: str, tmp_path: Path) -> None:
    root = locked(tmp_path / "project")
    said: list[str] = []
    async with running_plane(database, tmp_path) as plane:
        files = {name: (root / name).read_text() for name in ("package.json", "package-lock.json")}
        project = await plane.project(files)
        await operator.build(settings(plane), str(root), said.append)
        key, _, how = said[-1].partition(" ")
        assert how.startswith("is shared: ")
        await operator.build(settings(plane), str(project.id), said.append)
        assert said[-1] == f"{key} is there already", (
            "the same manifests are the same key, wherever they come from"
        )
        await operator.show(settings(plane), said.append, as_json=False)
        assert said[-1].split()[:2] == ["shared", key]
        await operator.show(settings(plane), said.append, as_json=True)
        listed = json.loads(said[-1])
        assert (listed["project_id"], listed["key"], listed["parts"]) == (None, key, 1)
        await operator.drop(settings(plane), key, said.append)
        assert said[-1] == "dropped 1"
        await operator.show(settings(plane), said.append, as_json=False)
        assert said[-1] == "no layers"


@needs_npm
async def test_what_cannot_be_built_says_why(database: str, tmp_path: Path) -> None:
    write(tmp_path / "project", dependencies={"a": "1"})
    async with running_plane(database, tmp_path) as plane:
        for source, said in (
            ("nowhere", "neither a directory nor"),
            (str(uuid4()), "nothing to install"),
            (str(tmp_path / "project"), "no package-lock"),
        ):
            with pytest.raises(CannotBuild, match=said):
                await operator.build(settings(plane), source, print)
