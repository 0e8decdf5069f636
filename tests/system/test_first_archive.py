"""A new session of a project that was saved since its last archive: none is built, and its agent has all of now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.project.managers import BESIDE, LOCKS
from agent.project.reading import PATCHES, decides_install
from orchestrator_stub.snapshots.newest import DECIDES_START
from tests.system.plane import Plane, running_plane

pytestmark = pytest.mark.system


async def given(plane: Plane) -> dict[str, float]:
    """Snapshots given out so far, by how."""
    text = (await plane.http.get("/metrics")).text
    return {
        how: float(number)
        for how, number in re.findall(
            r'^preview_orchestrator_snapshot_offers_total{how="(\w+)"} (\S+)$', text, re.M
        )
    }


async def test_a_session_after_twenty_saves_builds_no_archive(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"a.ts": "1\n", "gone.ts": "1\n", "large.txt": "line\n" * 20_000})
        first = await project.session(tmp_path / "first")
        first.start()
        await first.equal()
        assert await given(plane) == {"built": 1}
        assert await first.stop() == 0
        for number in range(18):
            await project.save("a.ts", f"{number}\n")
        await project.delete("gone.ts")
        await project.bulk({"new.ts": "new\n", "large.txt": "line\n" * 20_000 + "end\n"})
        second = await project.session(tmp_path / "second")
        second.start()
        try:
            report = await second.equal()
            assert not [problem for problem in report["problems"] if problem["kind"] != "nothing_to_serve"]
            assert second.files() == await project.files()
            assert await given(plane) == {"built": 1, "earlier": 1}
        finally:
            assert await second.stop() == 0


async def test_an_archive_from_before_what_decides_the_start_is_not_taken(
    database: str, tmp_path: Path
) -> None:
    """Its agent would install and start the dependencies of before, and then once more."""
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"package.json": "{}", "a.ts": "1\n", "web/vite.config.ts": "1\n"})
        await project.session(tmp_path / "first")
        await project.save("a.ts", "2\n")
        await project.session(tmp_path / "second")
        assert await given(plane) == {"built": 1, "earlier": 1}
        await project.save("package.json", '{"dependencies": {"zod": "4"}}')
        await project.session(tmp_path / "third")
        assert await given(plane) == {"built": 2, "earlier": 1}
        await project.delete("web/vite.config.ts")
        await project.session(tmp_path / "fourth")
        assert await given(plane) == {"built": 3, "earlier": 1}


def test_what_decides_an_install_decides_the_start() -> None:
    names = ["package.json", *LOCKS, *BESIDE, f"{PATCHES}/left-pad+1.0.0.patch", "index.html"]
    for path in [*names, *(f"apps/web/{name}" for name in names)]:
        assert decides_install(path, page=True)
        assert re.search(DECIDES_START, path), path
    for path in ("src/App.tsx", "package.json.md", "src/package.ts", "src/env.ts", "data/people.json"):
        assert not re.search(DECIDES_START, path), path
