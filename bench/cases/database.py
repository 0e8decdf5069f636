"""Measures a save in the database against a bare `insert` of the same row, and says what a catch-up takes.

Ours is `upsert_project_file` of a new 2 KB file as PostgREST calls it, by the owner of the project: access, path
rules, hash, revision under the head's lock, the version, the broadcast with its notification, and the answer. The
peer inserts the finished row into a twin of `project_files`: same columns, constraints and indexes, no trigger, no
foreign key. Both commit each row, durably, over the same number of connections, in short turns, on the embedded server.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from bench.harness.results import Row, in_turn, ratio_of
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.migrations import bootstrap, migrate

SIZE = 2_000
PROJECTS = 50
REVISIONS = 100_000
BEHIND = 100

AT_LEAST = 0.35
"""Of the bare insert's speed, on one connection, for different projects."""

STAGED_AT_MOST = 0.7
"""Of the time of an ordinary save, for one inside a turn: no version, no revision, no message."""

END_AT_MOST = 1.1
"""Of the time of `apply_project_files` with the same files, for `end_turn`: the same commit, read from a table."""

TURN_FILES = 40

AT_MOST_MS = 5.0
"""For the last 100 of 100,000 revisions, on the server."""

LINES = "".join(f"export const value{n} = compute({n * 7919 % 1000}, 'item-{n}');\n" for n in range(100))

Db = psycopg.Connection[Any]

BARE = """
    insert into twin (id, project_id, file_path, file_type, content, content_hash, version, created_by,
                      last_modified_by, revision, size_bytes)
    values (%s, %s, %s, 'typescript', %s, %s, 1, %s, %s, %s, %s)
"""

HISTORY = """
    insert into public.project_files (project_id, file_path, file_type, content, content_hash, version,
                                      is_current_version, created_by, revision, size_bytes)
    select %(project)s, 'src/f' || n %% 2000 || '.ts', 'typescript', repeat('x', 2000), repeat('a', 64), 1 + n / 2000,
           n >= %(revisions)s - 2000, %(owner)s, n + 1, 2000
    from generate_series(0, %(revisions)s - 1) n
"""


class Bench:
    """The people, the projects and the numbering that both contestants share."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.owner = uuid.uuid4()
        self.number = itertools.count()
        with psycopg.connect(dsn, autocommit=True) as db:
            db.execute("update preview.settings set writes_per_minute = 1000000000")
            db.execute("create table twin (like public.project_files including all)")
            db.execute("insert into auth.users (id) values (%s)", [self.owner])
            db.execute("insert into public.user_profiles (id) values (%s)", [self.owner])
            rows = db.execute(
                "insert into public.projects (owner_id) select %s from generate_series(1, %s) returning id",
                [self.owner, PROJECTS],
            ).fetchall()
        self.projects = [row[0] for row in rows]

    def unlimited(self) -> None:
        """Nothing here is to be throttled."""
        with psycopg.connect(self.dsn, autocommit=True) as db:
            db.execute(
                "update preview.settings set turns_per_minute = 1000000, turn_writes_per_minute = 1000000"
            )

    def connect(self) -> Db:
        """As PostgREST has it: the role and the claims of the owner, each statement its own transaction."""
        claims = json.dumps({"role": "authenticated", "sub": str(self.owner)})
        db = psycopg.connect(self.dsn, autocommit=True, prepare_threshold=0)
        db.execute("select set_config('request.jwt.claims', %s, false)", [claims])
        db.execute("set role authenticated")
        return db

    def connect_bare(self) -> Db:
        return psycopg.connect(self.dsn, autocommit=True, prepare_threshold=0)

    def content(self, number: int) -> str:
        return (f"// {number}\n" + LINES)[:SIZE]

    def upsert(self, db: Db) -> None:
        number = next(self.number)
        db.execute(
            "select public.upsert_project_file(%s, %s, %s, 'typescript')",
            [self.projects[number % PROJECTS], f"src/file{number}.ts", self.content(number)],
        )

    def insert(self, db: Db) -> None:
        number = next(self.number)
        content = self.content(number)
        digest = hashlib.sha256(content.encode()).hexdigest()
        project = self.projects[number % PROJECTS]
        db.execute(
            BARE,
            [
                uuid.uuid4(),
                project,
                f"src/file{number}.ts",
                content,
                digest,
                self.owner,
                self.owner,
                number + 1,
                SIZE,
            ],
        )


def per_second(write: Callable[[Db], None], connections: Sequence[Db], count: int) -> float:
    """Writes per second, `count` on each of the connections at once."""

    def turn(db: Db) -> None:
        for _ in range(count):
            write(db)

    with ThreadPoolExecutor(len(connections)) as threads:
        started = time.perf_counter()
        for done in [threads.submit(turn, db) for db in connections]:
            done.result()
        return count * len(connections) / (time.perf_counter() - started)


def measure_writes(bench: Bench, connections: int, *, rounds: int, count: int, notify: bool = True) -> Row:
    """`notify` False: without the stand-in's NOTIFY, whose lock makes commits wait in line; hosted has none."""
    with psycopg.connect(bench.dsn, autocommit=True) as db:
        db.execute(
            f"alter table realtime.messages {'enable' if notify else 'disable'} trigger announce".encode()
        )
    ours = [bench.connect() for _ in range(connections)]
    bare = [bench.connect_bare() for _ in range(connections)]
    try:
        samples = in_turn(
            {
                "ours": lambda: per_second(bench.upsert, ours, count),
                "bare": lambda: per_second(bench.insert, bare, count),
            },
            rounds,
            warm_up=2,
        )
    finally:
        for db in [*ours, *bare]:
            db.close()
    return Row(
        name=f"database: upsert 2 KB, {connections} connection{'s' if connections > 1 else ''}",
        ours=median(samples["ours"]),
        unit="/s",
        peer="bare insert",
        theirs=median(samples["bare"]),
        ratio=ratio_of(samples["ours"], samples["bare"]),
        sense="speed",
        at_least=AT_LEAST if connections == 1 else None,
        samples=rounds,
        note="different projects" + ("" if notify else ", without NOTIFY, as hosted"),
    )


def measure_staging(bench: Bench, *, rounds: int, count: int) -> Row:
    """The same saves, on one connection, into a turn of 500 and into the project. Milliseconds each."""
    with bench.connect() as db:
        bench.unlimited()
        turns: list[Any] = []

        def saves(turn: bool) -> float:
            if turn:
                turns[:] = [_begin(db, bench.projects[0])]
            started = time.perf_counter()
            for _ in range(count):
                number = next(bench.number)
                db.execute(
                    "select public.upsert_project_file(%s, %s, %s, 'typescript', p_turn_id => %s)",
                    [
                        bench.projects[0],
                        f"src/file{number}.ts",
                        bench.content(number),
                        turns[0] if turn else None,
                    ],
                )
            taken = (time.perf_counter() - started) / count * 1e3
            if turn:
                db.execute("select public.abandon_turn(%s, %s)", [bench.projects[0], turns[0]])
            return taken

        samples = in_turn({"ours": lambda: saves(True), "plain": lambda: saves(False)}, rounds, warm_up=2)
    return Row(
        name="database: a save of 2 KB inside a turn",
        ours=median(samples["ours"]),
        unit="ms",
        peer="outside of one",
        theirs=median(samples["plain"]),
        ratio=ratio_of(samples["ours"], samples["plain"]),
        sense="time",
        at_most=STAGED_AT_MOST,
        samples=rounds,
        note="upsert_project_file, one connection, one project",
    )


def measure_ends(bench: Bench, *, rounds: int) -> Row:
    """What becomes of 40 new files of 2 KB: by `end_turn`, staged before the clock starts, and by one call."""
    with bench.connect() as db:
        bench.unlimited()

        def files() -> str:
            numbers = [next(bench.number) for _ in range(TURN_FILES)]
            return json.dumps(
                [{"file_path": f"src/file{n}.ts", "content": bench.content(n)} for n in numbers]
            )

        def timed(query: str, parameters: list[Any]) -> float:
            started = time.perf_counter()
            row = db.execute(query.encode(), parameters).fetchone()
            taken = (time.perf_counter() - started) * 1e3
            assert row is not None
            assert row[0]["changed"] == TURN_FILES
            return taken

        def ended() -> float:
            turn = _begin(db, bench.projects[1])
            staging = "select public.apply_project_files(%s, %s::jsonb, p_turn_id => %s)"
            db.execute(staging, [bench.projects[1], files(), turn])
            return timed("select public.end_turn(%s, %s)", [bench.projects[1], turn])

        def applied() -> float:
            return timed("select public.apply_project_files(%s, %s::jsonb)", [bench.projects[1], files()])

        samples = in_turn({"ours": ended, "applied": applied}, rounds, warm_up=3)
    return Row(
        name=f"database: end_turn of {TURN_FILES} files",
        ours=median(samples["ours"]),
        unit="ms",
        peer="apply_project_files",
        theirs=median(samples["applied"]),
        ratio=ratio_of(samples["ours"], samples["applied"]),
        sense="time",
        at_most=END_AT_MOST,
        samples=rounds,
        note="new files of 2 KB",
    )


def _begin(db: Db, project: uuid.UUID) -> Any:
    row = db.execute("select public.begin_turn(%s) ->> 'turn_id'", [project]).fetchone()
    assert row is not None
    return row[0]


def measure_catch_up(bench: Bench, *, rounds: int) -> Row:
    """On the server: what EXPLAIN ANALYZE says of the call, the answer made and thrown away."""
    with psycopg.connect(bench.dsn, autocommit=True) as db:
        project = bench.projects[0]
        parameters = {"project": project, "owner": bench.owner, "revisions": REVISIONS}
        db.execute("delete from public.project_files")
        db.execute(HISTORY, parameters)
        db.execute(
            "update public.project_heads set revision = %(revisions)s where project_id = %(project)s",
            parameters,
        )
        db.execute("vacuum analyze public.project_files")
        row = db.execute(
            "select epoch::text from public.project_heads where project_id = %s", [project]
        ).fetchone()
        assert row is not None
        call = [project, row[0], REVISIONS - BEHIND]
    with bench.connect() as db:
        row = db.execute("select public.changes_since(%s, %s, %s)", call).fetchone()
        assert row is not None
        assert len(row[0]["changes"]) == BEHIND
        taken = []
        for _ in range(rounds):
            explained = db.execute(
                "explain (analyze, timing off, format json) select public.changes_since(%s, %s, %s)",
                call,
                prepare=False,
            ).fetchone()
            assert explained is not None
            taken.append(float(explained[0][0]["Execution Time"]))
    return Row(
        name=f"database: changes_since, the last {BEHIND} of {REVISIONS:,} revisions",
        ours=median(taken),
        unit="ms",
        at_most=AT_MOST_MS,
        samples=rounds,
        note=f"{BEHIND * 2} KB of content in the answer",
    )


async def measure(dsn: str, quick: bool) -> list[Row]:
    await bootstrap(dsn)
    await migrate(dsn)

    def all_of_it() -> list[Row]:
        bench = Bench(dsn)
        return [
            measure_writes(bench, 1, rounds=9 if quick else 31, count=50 if quick else 100),
            measure_writes(bench, 16, rounds=7 if quick else 21, count=10 if quick else 25),
            measure_writes(bench, 16, rounds=7 if quick else 21, count=10 if quick else 25, notify=False),
            measure_staging(bench, rounds=9 if quick else 31, count=50 if quick else 100),
            measure_ends(bench, rounds=15 if quick else 51),
            measure_catch_up(bench, rounds=20 if quick else 100),
        ]

    return await asyncio.to_thread(all_of_it)


def run(quick: bool) -> Sequence[Row]:
    """A server of its own, with its default durability."""

    async def whole() -> list[Row]:
        with tempfile.TemporaryDirectory(prefix="preview-bench-pg-") as directory:
            async with EmbeddedPostgres(Path(directory) / "data") as dsn:
                return await measure(dsn, quick)

    return asyncio.run(whole())
