"""The agent of the release before works on today's database and orchestrator.

An update migrates the database first and replaces machines afterwards, so for a while, and after a way back, agents of
the release before follow today's database. `LAST` names the commit of that release; its `agent` runs here with today's
dependencies. Where the clone does not have the commit the test says so and is skipped.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest

from tests.system.plane import Agent, Plane, eventually, running_plane

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
LAST = (Path(__file__).parent / "LAST").read_text().strip()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package `agent` of the release before."""
    git = ["git", "-C", str(ROOT)]
    try:
        known = subprocess.run([*git, "cat-file", "-e", f"{LAST}^{{commit}}"], capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"there is no git to take the agent of {LAST} from: {error}")
    if known.returncode != 0:
        pytest.skip(f"this clone has no commit {LAST}: {known.stderr.strip()}")
    packed = subprocess.run([*git, "archive", LAST, "agent"], capture_output=True, check=True).stdout
    directory = tmp_path_factory.mktemp("released")
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(directory, filter="data")
    where = subprocess.run(
        [sys.executable, "-P", "-c", "import agent; print(agent.__file__)"],
        capture_output=True, text=True, check=True, cwd=directory, env={**os.environ, "PYTHONPATH": str(directory)},
    )  # fmt: skip
    assert where.stdout.startswith(str(directory)), "it is that agent which runs, not the installed one"
    return directory


async def status_of(plane: Plane, agent: Agent) -> httpx.Response:
    return await plane.http.get(f"/v1/sessions/{agent.session_id}")


async def test_it_hydrates_follows_and_reports(database: str, released: Path, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"src/a.ts": "a\n", "src/b.ts": "b\n"})
        agent = await project.session(tmp_path / "machine", PYTHONPATH=str(released))
        agent.start()
        try:
            await agent.equal()

            await project.save("src/a.ts", "a second time\n")
            await project.bulk({"src/c.ts": "c\n", "src/b.ts": None})
            await agent.equal()

            turn = await project.rpc("begin_turn", p_label="three files")
            for name in ("one", "two"):
                await project.rpc(
                    "upsert_project_file", p_file_path=f"{name}.ts", p_content=name, p_turn_id=turn["turn_id"]
                )
            await project.rpc("end_turn", turn_id=turn["turn_id"])
            await agent.equal()

            [version] = [
                row["version"]
                for row in await project.rpc("list_current_files")
                if row["file_path"] == "src/a.ts"
            ]
            await project.rpc(
                "rename_project_file", p_from="src/a.ts", p_to="src/z.ts", expected_version=version
            )
            report = await agent.equal()
            assert set(agent.files()) == {"src/z.ts", "src/c.ts", "one.ts", "two.ts"}

            async def ready() -> bool:
                said = (await status_of(plane, agent)).json()
                return bool(said["state"] == "ready" and said["applied"] == report["revision"])

            await eventually("the session is ready, at the agent's revision", ready)

            agent.kill()
            await project.save("src/z.ts", "while it was away\n")
            agent.start()
            await agent.equal()
        finally:
            await agent.stop()
