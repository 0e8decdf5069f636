"""What tools make in the container goes back to the project: the real agent, npm, orchestrator and database."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg
import pytest

from tests.system.plane import Agent, Plane, Project, eventually, running_plane

pytestmark = pytest.mark.system

FILES = {"src/app.ts": "app\n", "src/routes/index.ts": "export {}\n", "src/routeTree.gen.ts": "0\n"}
RULES = [
    {"glob": "**/package-lock.json", "mode": "generated"},
    {"glob": "**/*.gen.ts", "mode": "generated", "deletes": True},
    {"glob": "src/components/**", "mode": "authored"},
]
GENERATED = "src/routeTree.gen.ts"


@pytest.fixture
async def plane(database: str, tmp_path: Path) -> AsyncIterator[Plane]:
    async with running_plane(database, tmp_path) as plane:
        yield plane


async def project_with(plane: Plane, files: dict[str, str]) -> Project:
    project = await plane.project(files)
    await project.rpc("set_write_back", p_rules=RULES)
    return project


async def started(project: Project, directory: Path) -> Agent:
    agent = await project.session(directory)
    agent.start()

    async def gives_back() -> bool:
        report = await agent.status()
        return bool(report and report["write_back"] and report["link"]["state"] == "live")

    await eventually("it gives back", gives_back, 60.0)
    await agent.equal()
    return agent


async def has(project: Project, path: str, content: str) -> None:
    async def there() -> bool:
        return (await project.files()).get(path) == content.encode()

    await eventually(f"{path} is in the project", there, 60.0)


def history(database: str, project: Project, path: str) -> list[tuple[str, str]]:
    """Every content of a path and where it came from, oldest first."""
    with psycopg.connect(database) as sql:
        rows = sql.execute(
            "select content, origin from project_files where project_id = %s and file_path = %s order by version",
            (project.id, path),
        ).fetchall()
    return [(str(content), str(origin)) for content, origin in rows]


async def test_a_generator_goes_back_and_a_component_is_proposed(
    plane: Plane, database: str, tmp_path: Path
) -> None:
    project = await project_with(plane, FILES)
    agent = await started(project, tmp_path / "machine")
    try:
        tree = agent.tree
        (tree / GENERATED).write_text("1\n")
        (tree / "src/new").mkdir()
        (tree / "src/new/made.gen.ts").write_text("made\n")
        (tree / "src/components").mkdir()
        (tree / "src/components/button.tsx").write_text("export const Button = 1\n")
        await has(project, GENERATED, "1\n")
        await has(project, "src/new/made.gen.ts", "made\n")
        (tree / "src/new/made.gen.ts").unlink()

        async def gone() -> bool:
            return "src/new/made.gen.ts" not in await project.files()

        await eventually("what the tool removed is gone", gone)

        async def proposed() -> object:
            return await project.rpc("list_proposals")

        (proposal,) = await eventually("the component is proposed", proposed)
        assert proposal["file_path"] == "src/components/button.tsx"
        await project.rpc("accept_proposal", kept_id=proposal["kept_id"])
        await agent.equal()
        assert [origin for _, origin in history(database, project, GENERATED)][1:] == ["container"]
        await project.rpc("set_write_back", p_rules=[])

        async def off() -> bool:
            report = await agent.status()
            return report is not None and report["write_back"] is None

        await eventually("it gives back no more", off)
    finally:
        agent.kill()


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
async def test_an_install_by_package_json_alone_puts_its_lock_file_into_the_project(
    plane: Plane, tmp_path: Path
) -> None:
    package = {"name": "p", "version": "1.0.0", "dependencies": {"dep": "file:./dep"}}
    files = {
        "package.json": json.dumps({**package, "scripts": {"dev": "node -e 'setInterval(() => 0, 1000)'"}}),
        "dep/package.json": json.dumps({"name": "dep", "version": "1.0.0"}),
    }
    project = await project_with(plane, files)
    agent = await started(project, tmp_path / "machine")
    try:

        async def locked() -> bytes | None:
            return (await project.files()).get("package-lock.json")

        content = await eventually("the lock file is in the project", locked, 120.0)
        assert json.loads(content)["packages"]["node_modules/dep"]["link"] is True
        await agent.equal()

        async def installed_twice() -> list[str]:
            lines = [json.loads(line) for line in agent.log().splitlines() if '"install.done"' in line]
            results = [line["result"] for line in lines]
            return results if len(results) > 1 else []

        results = await eventually("the lock file that came back was looked at", installed_twice, 60.0)
        assert results == ["installed", "current"], "and installed nothing"
    finally:
        agent.kill()


@pytest.mark.nightly
async def test_no_save_is_lost_among_the_runs_of_a_tool(plane: Plane, database: str, tmp_path: Path) -> None:
    runs = 1_000
    project = await project_with(plane, FILES)
    agent = await started(project, tmp_path / "machine")
    saved: list[str] = []
    try:

        async def tool() -> None:
            for number in range(runs):
                (agent.tree / GENERATED).write_text(f"tool {number}\n")
                await asyncio.sleep(0.02)

        async def person() -> None:
            for number in range(runs // 6):
                saved.append(f"person {number}\n")
                await project.save(GENERATED, saved[-1])
                await asyncio.sleep(0.05)

        await asyncio.gather(person(), tool())
        await agent.equal(120.0)
    finally:
        agent.kill()
    versions = history(database, project, GENERATED)
    assert [content for content, origin in versions if origin != "container"][1:] == saved
    told = [content for content, origin in versions if origin == "container"]
    assert len(told) == len(set(told)), "one output, one version"


@pytest.mark.nightly
async def test_two_sessions_that_disagree_come_to_rest(plane: Plane, database: str, tmp_path: Path) -> None:
    project = await project_with(plane, FILES)
    agents = [await started(project, tmp_path / name) for name in ("a", "b")]
    try:
        for _ in range(6):
            for name, agent in zip("ab", agents, strict=True):
                place = agent.tree / GENERATED
                if place.read_text() != f"generated by {name}\n":
                    place.write_text(f"generated by {name}\n")
            await asyncio.sleep(0.7)  # as generators do, whenever they see another's
        told = [content for content, origin in history(database, project, GENERATED) if origin == "container"]
        assert 1 <= len(told) <= 2
    finally:
        for agent in agents:
            agent.kill()
