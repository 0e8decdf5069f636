"""A new session of a project that was saved since its last archive: none is built, and its agent has all of now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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
