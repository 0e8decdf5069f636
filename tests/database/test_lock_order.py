"""Writers, forgetting, cleaning and deletions take their locks in one order: nobody waits in a circle (40P01)."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest

from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.snapshots.cache import CacheEntry, PostgresCacheStore
from tests.database.db import Project, begin, connect, end, make_project, one, upsert

Db = psycopg.Connection[Any]

WRITERS = 16
ROUNDS = 60


def until_waiting(db: Db, pid: int) -> None:
    """Return once the server process waits for a lock."""
    deadline = time.monotonic() + 30
    waiting = "select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    while not one(db, waiting, [pid]):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("keep_versions", [0, 1])
def test_forgetting_holds_nothing_that_a_writer_needs_while_it_waits(
    db: Db, database: str, project: Project, keep_versions: int
) -> None:
    for content in "1234":
        upsert(db, project.id, "a", content)
    with connect(database) as writer, connect(database) as pruner, ThreadPoolExecutor(1) as threads:
        with writer.transaction():
            upsert(writer, project.id, "b", "1")
            pruning = threads.submit(
                pruner.execute, b"select prune_project_history(%s, '0', %s)", [project.id, keep_versions]
            )
            until_waiting(db, pruner.info.backend_pid)
            assert upsert(writer, project.id, "a", "5")["version"] == 5
        # The fourth was superseded after the forgetting began, or is the one that is kept.
        assert pruning.result(30).fetchone() == ({"versions": 3, "tombstones": 0},)


def test_sixteen_writers_while_history_is_forgotten_and_projects_are_deleted(db: Db, database: str) -> None:
    projects = [make_project(db).id for _ in range(4)]
    refused: Counter[str] = Counter()
    writing = threading.Barrier(WRITERS + 4)
    done = threading.Event()

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except psycopg.Error as error:
            refused[str(error.sqlstate)] += 1

    def in_turn(connection: Db, project: UUID, path: str) -> None:
        turn = begin(connection, project)
        upsert(connection, project, path, turn, turn=turn)
        end(connection, project, turn, force=True)

    def write(number: int) -> None:
        dice = random.Random(number)
        with connect(database) as connection:
            writing.wait(60)
            for round_ in range(ROUNDS):
                project, path, name = dice.choice(projects), f"f{dice.randrange(3)}", f"{number}-{round_}"
                if dice.random() < 0.1:
                    attempt(partial(in_turn, connection, project, path))
                else:
                    attempt(partial(upsert, connection, project, path, name + "long " * 50, correlation=name))

    def repeat(query: str, choose: Callable[[random.Random], list[object]]) -> None:
        dice = random.Random(query)
        with connect(database) as connection:
            writing.wait(60)
            while not done.is_set():
                attempt(lambda: connection.execute(query.encode(), choose(dice)))

    db.execute("update preview.settings set upkeep_every = '1 minute', turns_per_minute = 10000")
    db.execute("update preview.settings set compact_after = '0', history_kept = '1 hour', versions_kept = 0")
    db.execute("update project_heads set kept_up_at = '-infinity'")
    with ThreadPoolExecutor(WRITERS + 4) as threads:
        writers = [threads.submit(write, number) for number in range(WRITERS)]
        others = [
            threads.submit(
                repeat,
                "select prune_project_history(%s, '0', %s)",
                lambda dice: [dice.choice(projects), dice.randrange(2)],
            ),
            threads.submit(
                repeat,
                "select preview.keep_up(10)",
                lambda dice: [],
            ),
            threads.submit(
                repeat,
                "with again as (update preview.compactions set due_at = now() where project_id in"
                " (select project_id from preview.compactions for update skip locked)) select preview.compact(%s)",
                lambda dice: [dice.choice([1, 3, 50])],
            ),
            threads.submit(
                repeat,
                "delete from projects where id = %s",
                lambda dice: [projects.pop() if len(projects) > 1 and dice.random() < 0.05 else None],
            ),
        ]
        for writer in writers:
            writer.result(120)
        done.set()
        for other in others:
            other.result(60)
    assert refused["40P01"] == 0, refused
    # Each version that is left can be read: none was forgotten that another is made of.
    assert one(db, "select count(preview.content_of(id)) = count(*) from project_files where not is_deleted")
    # P0002: a turn was begun at the very moment of the deletion.
    assert set(refused) <= {"PT404", "PT410", "P0002"}, refused


def test_keeping_a_cache_entry_meets_the_deletion_of_its_project(
    db: Db, database: str, project: Project
) -> None:
    """An entry that expired is cleared away while one of the same project is kept, and the project is deleted."""
    upsert(db, project.id, "a", "1")
    db.execute(
        "insert into preview.snapshot_offers values (%s, 'old', '{}', now() - interval '1 hour')",
        [project.id],
    )

    async def keep() -> None:
        async with pool_of(database, size=1) as pool:
            entry = CacheEntry("x.zip", {}, "https://storage.invalid/x.zip", 0.0)
            await PostgresCacheStore(pool).put(project.id, "new", entry)

    with connect(database) as deleter, connect(database) as obstacle, ThreadPoolExecutor(2) as threads:
        with obstacle.transaction():
            obstacle.execute("select from project_files for update")
            # It holds the head, has yet to come to the entries, and would be the first to find a circle.
            deleter.execute("set deadlock_timeout = '10ms'")
            deletion = threads.submit(deleter.execute, b"delete from projects where id = %s", [project.id])
            until_waiting(db, deleter.info.backend_pid)
            keeping = threads.submit(asyncio.run, keep())
            deadline = time.monotonic() + 30
            while one(db, "select count(*) from pg_stat_activity where wait_event_type = 'Lock'") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        deletion.result(30)
        keeping.result(30)
    assert one(db, "select count(*) from projects") == 0
    assert one(db, "select count(*) from preview.snapshot_offers") == 0
