"""A database that forgot commits it had acknowledged, within one epoch: a failover to a replica that was behind.

Its revisions are given out again, so the events pass for duplicates; the tree hash of a heartbeat is what finds it.
"""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.system.plane import running_plane

pytestmark = pytest.mark.system


@pytest.mark.parametrize("forgotten", ["an update", "a deletion", "a new file"])
async def test_what_the_database_forgot_goes_from_the_disk(
    database: str, tmp_path: Path, forgotten: str
) -> None:
    path = "new.txt" if forgotten == "a new file" else "kept.txt"
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project({"kept.txt": "one\n", "other.txt": "one\n"})
        agent = await project.session(tmp_path / "machine")
        agent.start()
        try:
            await agent.equal()
            await (project.delete(path) if forgotten == "a deletion" else project.save(path, "two\n"))
            await agent.equal()
            async with await psycopg.AsyncConnection.connect(database) as connection:
                await connection.execute("set session_replication_role = replica")
                here = (project.id, path)
                await connection.execute(
                    "delete from public.project_files where project_id = %s and file_path = %s and revision = 2",
                    here,
                )
                await connection.execute(
                    "update public.project_files set is_current_version = true"
                    " where project_id = %s and file_path = %s",
                    here,
                )
                await connection.execute(
                    "update public.project_heads set revision = 1 where project_id = %s", (project.id,)
                )
            await project.save("other.txt", "another revision 2\n")
            await project.save("another.txt", "revision 3\n")
            await agent.equal()
        finally:
            agent.kill()
