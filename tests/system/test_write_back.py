"""What tools in a container make, end to end: the agent sees and offers it, the database judges it, the project has it.

The tool is mostly this test, which writes into the project's directory as any program there does; beside it are npm
and, in the nightly run, TanStack Router's generator and prettier.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio

from orchestrator_stub.write_back.presets import rules_of
from tests.system.plane import Agent, Plane, Project, eventually, running_plane

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="module")]

GENERATED = "gen/a.txt"
RULES = [
    {"glob": "gen/**", "mode": "generated", "deletes": True},
    {"glob": "src/components/**", "mode": "authored"},
    *rules_of(["lock", "routes", "format"]),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plane(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plane]:
    async with running_plane(module_database, tmp_path_factory.mktemp("plane")) as plane:
        yield plane


async def project_with(plane: Plane, files: dict[str, str] | None = None) -> Project:
    project = await plane.project(files or {GENERATED: "0", "index.txt": "x"})
    await project.rpc("set_write_back", p_rules=RULES)
    return project


async def running(project: Project, directory: Path, **environ: str) -> Agent:
    """An agent that gives back."""
    agent = await project.session(directory, **environ)
    agent.start()

    async def gives_back() -> bool:
        report = await agent.status()
        return bool(report and report["write_back"] and report["link"]["state"] == "live")

    await eventually("it gives back", gives_back, 60)
    await agent.equal()
    return agent


async def in_project(project: Project, path: str, content: str | None = None) -> str:
    """The content of a path, once it is there, and that one."""

    async def there() -> bytes | None:
        found = (await project.files()).get(path)
        return found if found is not None and content in (None, found.decode()) else None

    found: bytes = await eventually(f"{path} in the project", there, 60)
    return found.decode()


async def rows(project: Project, name: str, **more: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await project.rpc(name, **more)
    return found


def history(project: Project, path: str = GENERATED) -> list[tuple[str, str]]:
    """Every content of a path and where it came from, oldest first."""
    with psycopg.connect(project.plane.dsn) as sql:
        found = sql.execute(
            "select content, origin from project_files where project_id = %s and file_path = %s order by version",
            (project.id, path),
        ).fetchall()
    return [(str(content), str(origin)) for content, origin in found]


async def test_it_is_there_and_with_the_others_and_a_proposal_is_decided(
    plane: Plane, tmp_path: Path
) -> None:
    project = await project_with(plane)
    one = await running(project, tmp_path / "one")
    two = await running(project, tmp_path / "two")
    try:
        (one.tree / GENERATED).write_text("1")
        (one.tree / "gen/deep").mkdir()
        (one.tree / "gen/deep/b.txt").write_text("new")
        (one.tree / "src/components").mkdir(parents=True)
        component = one.tree / "src/components/New.tsx"
        component.write_text("export default 1\n")
        await in_project(project, GENERATED, "1")
        await in_project(project, "gen/deep/b.txt", "new")
        await two.equal()
        assert two.files()["gen/deep/b.txt"] == b"new"
        (one.tree / "gen/deep/b.txt").unlink()

        async def gone() -> bool:
            return "gen/deep/b.txt" not in await project.files()

        await eventually("what the tool removed is gone", gone)
        [proposal] = await eventually("a proposal", lambda: rows(project, "list_proposals"), 60)
        assert proposal["file_path"] == "src/components/New.tsx"
        await project.rpc("accept_proposal", kept_id=proposal["kept_id"])
        await one.equal()
        await two.equal()
        component.write_text("export default 2\n")
        [proposal] = await eventually("another", lambda: rows(project, "list_proposals"), 60)
        await project.rpc("reject_proposal", kept_id=proposal["kept_id"])
        assert (await project.files())["src/components/New.tsx"] == b"export default 1\n"
        assert [origin for _, origin in history(project)][1:] == ["container"]
        await project.rpc("set_write_back", p_rules=[])

        async def off() -> bool:
            report = await one.status()
            return report is not None and report["write_back"] is None

        await eventually("it gives back no more", off)
    finally:
        one.kill()
        two.kill()


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
    agent = await running(project, tmp_path / "machine")
    try:
        content = await in_project(project, "package-lock.json")
        assert json.loads(content)["packages"]["node_modules/dep"]["link"] is True
        await agent.equal()

        async def installed_twice() -> list[str]:
            lines = [json.loads(line) for line in agent.log().splitlines() if '"install.done"' in line]
            results = [line["result"] for line in lines]
            return results if len(results) > 1 else []

        results = await eventually("the lock file that came back was looked at", installed_twice, 60)
        assert results == ["installed", "current"], "and installed nothing"
    finally:
        agent.kill()


@pytest.mark.parametrize("runs", [20, pytest.param(1000, marks=pytest.mark.nightly)])
async def test_a_person_saves_while_a_tool_runs_and_nothing_is_lost(
    plane: Plane, tmp_path: Path, runs: int
) -> None:
    """Every save of the person is in the history, and the last word of both is somewhere: on the disk or kept."""
    project = await project_with(plane)
    agent = await running(project, tmp_path / "machine")
    saved = []
    try:
        for n in range(runs):
            (agent.tree / GENERATED).write_text(f"by a tool {n}")
            saved.append(f"by a person {n}")
            await project.save(GENERATED, saved[-1])
        await project.save("index.txt", "the end")

        async def quiet() -> bool:
            on_disk = agent.files().get(GENERATED)
            return on_disk is not None and on_disk == (await project.files()).get(GENERATED)

        await eventually("both the same", quiet, 120)
        nothing_is_lost(project, saved)
        assert (await project.files())[GENERATED].decode() == saved[-1], "a tool never goes over it"
    finally:
        agent.kill()


@pytest.mark.nightly
async def test_a_tool_that_runs_beside_a_person_loses_nothing(plane: Plane, tmp_path: Path) -> None:
    runs = 1_000
    project = await project_with(plane)
    agent = await running(project, tmp_path / "machine")
    saved: list[str] = []
    try:

        async def tool() -> None:
            for number in range(runs):
                (agent.tree / GENERATED).write_text(f"by a tool {number}")
                await asyncio.sleep(0.02)

        async def person() -> None:
            for number in range(runs // 6):
                saved.append(f"by a person {number}")
                await project.save(GENERATED, saved[-1])
                await asyncio.sleep(0.05)

        await asyncio.gather(person(), tool())
        await agent.equal(120.0)
    finally:
        agent.kill()
    nothing_is_lost(project, saved)


def nothing_is_lost(project: Project, saved: list[str]) -> None:
    """Every save of a person is a version, in their order, and no output of a tool is two."""
    versions = history(project)
    assert [content for content, origin in versions if origin != "container"][1:] == saved
    told = [content for content, origin in versions if origin == "container"]
    assert len(told) == len(set(told)), "one output, one version"


@pytest.mark.nightly
async def test_two_sessions_that_disagree_come_to_rest(plane: Plane, tmp_path: Path) -> None:
    project = await project_with(plane)
    agents = [await running(project, tmp_path / name) for name in ("a", "b")]
    try:
        for _ in range(6):
            for name, agent in zip("ab", agents, strict=True):
                place = agent.tree / GENERATED
                if place.read_text() != f"generated by {name}\n":
                    place.write_text(f"generated by {name}\n")
            await asyncio.sleep(0.7)  # as generators do, whenever they see another's
        told = [content for content, origin in history(project) if origin == "container"]
        assert 1 <= len(told) <= 2
    finally:
        for agent in agents:
            agent.kill()


TOOLS = """\
import { createServer } from "node:http";
import { execFileSync } from "node:child_process";
import { watch, readFileSync, mkdirSync, writeFileSync } from "node:fs";
const run = (name, ...words) => execFileSync(`node_modules/.bin/${name}`, words, { stdio: "inherit" });
createServer((_, answer) => answer.end("ok")).listen(process.env.PORT ?? process.env.DEV_PORT, "127.0.0.1");
run("tsr", "generate");
mkdirSync("src/components", { recursive: true });
writeFileSync("src/components/Made.tsx", "export const Made = 1;\\n");
watch("src", { recursive: true }, (_, name) => {
  if (!name?.endsWith("ugly.ts")) return;
  try { if (/ {2}=/.test(readFileSync(`src/${name}`, "utf8"))) run("prettier", "--write", `src/${name}`); } catch {}
});
"""
PACKAGE = {
    "name": "tools", "private": True, "type": "module", "scripts": {"dev": "node tools.mjs"},
    "devDependencies": {"prettier": "3", "@tanstack/router-cli": "1"},
}  # fmt: skip


@pytest.mark.nightly
async def test_real_tools(plane: Plane, tmp_path: Path) -> None:
    """npm's lock file, TanStack Router's route tree, prettier on save, a component as a proposal."""
    library = 'from "@tanstack/react-router";\nexport const Route ='
    route = f'import {{ createFileRoute }} {library} createFileRoute("/")({{}});\n'
    root = f"import {{ createRootRoute }} {library} createRootRoute();\n"
    project = await project_with(
        plane,
        {
            "package.json": json.dumps(PACKAGE),
            "tools.mjs": TOOLS,
            "tsr.config.json": "{}",
            "src/routes/index.tsx": route,
            "src/routes/__root.tsx": root,
            "src/ugly.ts": "export const a = 1;\n",
        },
    )
    agent = await project.session(tmp_path / "machine", HOME=str(tmp_path))
    agent.start()
    try:

        async def lock() -> str | None:
            found = (await project.files()).get("package-lock.json")
            return found and found.decode()

        made = json.loads(await eventually("npm's lock file", lock, 240))
        assert "node_modules/prettier" in made["packages"]
        tree = await in_project(project, "src/routeTree.gen.ts")
        assert "IndexRoute" in tree
        [proposal] = await eventually("a component", lambda: rows(project, "list_proposals"), 60)
        await project.rpc("accept_proposal", kept_id=proposal["kept_id"])
        await project.save("src/ugly.ts", "export   const b   = 2\n")
        assert await in_project(project, "src/ugly.ts", "export const b = 2;\n")
        assert (await project.files())["src/components/Made.tsx"]
    finally:
        agent.kill()
