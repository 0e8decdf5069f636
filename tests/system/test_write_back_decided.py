"""What tools in a container make, end to end: the agent sees and offers it, the database judges it, the project has it.

The tool is this test, which writes into the project's directory as any program there does; the nightly ones are npm,
TanStack Router's generator and prettier.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orchestrator_stub.write_back.presets import rules_of
from tests.system.plane import Agent, Project, eventually, running_plane

pytestmark = pytest.mark.system

RULES = [
    {"glob": "gen/**", "mode": "generated"},
    {"glob": "src/components/**", "mode": "authored"},
    *rules_of(["lock", "routes", "format"]),
]


@pytest.fixture
async def project(database: str, tmp_path: Path) -> AsyncIterator[Project]:
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"gen/a.txt": "0", "index.txt": "x"})
        await project.rpc("set_write_back", p_rules=RULES)
        yield project


async def running(project: Project, directory: Path, **environ: str) -> Agent:
    agent = await project.session(directory, **environ)
    agent.start()
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


async def test_there_and_to_the_others_and_a_proposal_is_decided(project: Project, tmp_path: Path) -> None:
    one = await running(project, tmp_path / "one")
    two = await running(project, tmp_path / "two")
    try:
        (one.tree / "gen/a.txt").write_text("1")
        (one.tree / "gen/deep").mkdir()
        (one.tree / "gen/deep/b.txt").write_text("new")
        assert await in_project(project, "gen/a.txt", "1") == "1"
        assert await in_project(project, "gen/deep/b.txt") == "new"
        await two.equal()
        assert two.files()["gen/deep/b.txt"] == b"new"
        (one.tree / "src/components").mkdir(parents=True)
        (one.tree / "src/components/New.tsx").write_text("export default 1\n")
        [proposal] = await eventually("a proposal", lambda: rows(project, "list_proposals"), 60)
        assert proposal["file_path"] == "src/components/New.tsx"
        await project.rpc("accept_proposal", kept_id=proposal["kept_id"])
        await one.equal()
        await two.equal()
        (one.tree / "src/components/New.tsx").write_text("export default 2\n")
        [proposal] = await eventually("another", lambda: rows(project, "list_proposals"), 60)
        await project.rpc("reject_proposal", kept_id=proposal["kept_id"])
        assert (await project.files())["src/components/New.tsx"] == b"export default 1\n"
    finally:
        one.kill()
        two.kill()


@pytest.mark.parametrize("runs", [20, pytest.param(1000, marks=pytest.mark.nightly)])
async def test_a_person_saves_while_a_tool_runs_and_nothing_is_lost(
    project: Project, tmp_path: Path, runs: int
) -> None:
    """Every save of the person is in the history, and the last word of both is somewhere: on the disk or kept."""
    agent = await running(project, tmp_path / "machine")
    saved = []
    try:
        for n in range(runs):
            (agent.tree / "gen/a.txt").write_text(f"by a tool {n}")
            saved.append(f"by a person {n}")
            await project.save("gen/a.txt", saved[-1])
            await asyncio.sleep(0)
        await project.save("index.txt", "the end")

        async def quiet() -> bool:
            on_disk = agent.files().get("gen/a.txt")
            return on_disk is not None and on_disk == (await project.files()).get("gen/a.txt")

        await eventually("both the same", quiet, 120)
        async with await psycopg.AsyncConnection.connect(project.plane.dsn) as connection:
            cursor = await connection.execute(
                "select content from public.project_files where project_id = %s and file_path = 'gen/a.txt'"
                " and origin <> 'container'",
                (project.id,),
            )
            kept = {row[0] for row in await cursor.fetchall()}
        assert set(saved) <= kept
        assert (await project.files())["gen/a.txt"].decode() == saved[-1], "a tool never goes over it"
    finally:
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
async def test_real_tools(database: str, tmp_path: Path) -> None:
    """npm's lock file, TanStack Router's route tree, prettier on save, a component as a proposal."""
    library = 'from "@tanstack/react-router";\nexport const Route ='
    route = f'import {{ createFileRoute }} {library} createFileRoute("/")({{}});\n'
    root = f"import {{ createRootRoute }} {library} createRootRoute();\n"
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project(
            {
                "package.json": json.dumps(PACKAGE),
                "tools.mjs": TOOLS,
                "tsr.config.json": "{}",
                "src/routes/index.tsx": route,
                "src/routes/__root.tsx": root,
                "src/ugly.ts": "export const a = 1;\n",
            }
        )
        await project.rpc("set_write_back", p_rules=RULES)
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
