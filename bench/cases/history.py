"""Measures splices and history in the database: what they cost a save, what travels, what ten thousand versions take.

A save with splices against the same save without (`patch_above_bytes` null), of three sizes, in short turns on one
connection, durably. Sizes of messages are those of edits that are typical: a key typed, a third rewritten, a lock file
with a newer version and with dependencies added, a few places of a large JSON. The table is measured after
`vacuum full`, since space that upkeep frees is used by later rows; splices are made every thousand saves.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

from bench.cases.database import Bench
from bench.harness.results import Row, in_turn, ratio_of
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.migrations import bootstrap, migrate

SAVE_AT_MOST = 1.1
"""Of the time without splices."""

TABLE_AT_MOST = 4.0
"""MB for 10,000 versions of a file of 20 KB; whole they are 90, compressed as PostgreSQL does it."""

SIZES = {"21 KB": 21_000, "388 KB": 388_000, "1.5 MB": 1_530_000}

KEYS = 100
"""Typed into a file of 388 KB."""


def source(size: int, seed: int = 0) -> str:
    """Code of about `size` bytes that no compressor makes nothing of."""
    dice = random.Random(seed)
    lines: list[str] = []
    left = size
    while left > 0:
        line = f"  export const value{len(lines)} = compute({dice.randrange(10**9)}, 'é{dice.randrange(10**6):x}');\n"
        lines.append(line)
        left -= len(line.encode())
    return "".join(lines)


def rewritten(text: str, share: float) -> str:
    """The text with a share of its lines written anew, in three places."""
    lines, other = (
        text.splitlines(keepends=True),
        source(len(text.encode()), seed=1).splitlines(keepends=True),
    )
    each = int(len(lines) * share / 3)
    for third in range(3):
        at = len(lines) * third // 3
        lines[at : at + each] = other[at : at + each]
    return "".join(lines)


def in_places(text: str, places: int, put: str) -> str:
    """The text with `put` in so many places."""
    for place in range(places):
        at = len(text) * (2 * place + 1) // (2 * places)
        text = text[:at] + put + text[at + len(put) :]
    return text


def edits() -> dict[str, tuple[str, str, int]]:
    """Before, after, and at most so many bytes of splices: what the same kinds of edit took when they were designed
    (15, 5,842, 154, 2,610 and 383 bytes), and a fifth more."""
    code, lock, data = source(21_000), source(388_000), source(1_530_000)
    entry = "".join(f"    node_modules/added{n}: sha512-{n * 7919:0160}\n" for n in range(12))
    middle = len(lock) // 2
    return {
        "a key typed, 21 KB": (code, code[:9000] + "x" + code[9000:], 18),
        "a third rewritten, 20 KB": (code, rewritten(code, 0.27), 7010),
        "a version bumped, 388 KB": (lock, in_places(lock, 2, "0123456789" * 5), 185),
        "dependencies added, 388 KB": (lock, lock[:middle] + entry + lock[middle:], 3132),
        "five places, 1.5 MB": (data, in_places(data, 5, "0123456789" * 6), 460),
    }


def measure_saves(bench: Bench, name: str, size: int, *, rounds: int, count: int) -> Row:
    """Milliseconds of one save."""
    project, path = bench.projects[0], f"src/{size}.ts"
    content = source(size)
    with bench.connect() as db, psycopg.connect(bench.dsn, autocommit=True) as owner:

        def saves(above: int | None) -> float:
            nonlocal content
            owner.execute("update preview.settings set patch_above_bytes = %s", [above])
            taken = 0.0
            for _ in range(count):
                at = next(bench.number) * 7919 % len(content)
                content = content[:at] + "x" + content[at:]
                started = time.perf_counter()
                db.execute("select public.upsert_project_file(%s, %s, %s)", [project, path, content])
                taken += time.perf_counter() - started
            return taken / count * 1e3

        samples = in_turn({"ours": lambda: saves(16384), "whole": lambda: saves(None)}, rounds, warm_up=2)
    return Row(
        name=f"history: a save of {name}",
        ours=median(samples["ours"]),
        unit="ms",
        peer="without splices",
        theirs=median(samples["whole"]),
        ratio=ratio_of(samples["ours"], samples["whole"]),
        sense="time",
        at_most=SAVE_AT_MOST,
        samples=rounds,
        note="one key typed, one connection",
    )


def measure_edits(bench: Bench) -> list[Row]:
    """What travels of each edit, as the database makes it."""
    rows = []
    with psycopg.connect(bench.dsn, autocommit=True) as db:
        for name, (before, after, most) in edits().items():
            [splices] = _one(db, "select preview.splices_of(%s, %s)::text", before, after)
            rows.append(
                Row(
                    name=f"history: bytes of {name}",
                    ours=len((splices if splices is not None else after).encode()),
                    unit="B",
                    sense="size",
                    at_most=most,
                    samples=1,
                    note=f"{len(after.encode()):,} whole",
                )
            )
    return rows


def measure_references(bench: Bench) -> Row:
    """Messages of a typing session that a reader has to fetch the file for."""
    project, content = bench.projects[1], source(388_000)
    with bench.connect() as db, psycopg.connect(bench.dsn, autocommit=True) as owner:
        owner.execute("update preview.settings set patch_above_bytes = 16384")
        db.execute("select public.upsert_project_file(%s, 'lock', %s)", [project, content])
        for n in range(KEYS):
            content = content[: 190_000 + n] + "x" + content[190_000 + n :]
            db.execute("select public.upsert_project_file(%s, 'lock', %s)", [project, content])
        [fetched] = _one(
            owner,
            "select count(*) from realtime.messages where topic = %s and payload ->> 'content' is null"
            " and not payload ? 'splices' and (payload ->> 'version')::int > 1",
            f"project:{project}",
        )
    return Row(
        name=f"history: fetches of {KEYS} keys in 388 KB",
        ours=fetched,
        unit="fetches",
        sense="size",
        at_most=0,
        samples=KEYS,
        note="by reference, of each agent",
    )


def measure_table(bench: Bench, *, versions: int) -> Row:
    """Megabytes of the table for versions of a file of 20 KB."""
    project, content, dice = bench.projects[2], source(20_000), random.Random(1)
    with bench.connect() as db, psycopg.connect(bench.dsn, autocommit=True) as owner:
        owner.execute("delete from public.project_files")
        owner.execute("update preview.settings set compact_after = '0'")
        for number in range(versions):
            at = dice.randrange(len(content))
            content = content[:at] + "x" + content[at + dice.randrange(2) :]
            db.execute("select public.upsert_project_file(%s, 'src/page.tsx', %s)", [project, content])
            if number % 1000 == 999 or number == versions - 1:
                compact(owner, project)
        owner.execute("vacuum full public.project_files")
        [size] = _one(owner, "select pg_table_size('public.project_files')")
    return Row(
        name=f"history: {versions:,} versions of 20 KB",
        ours=size / 1e6,
        unit="MB",
        sense="size",
        at_most=TABLE_AT_MOST * versions / 10_000,
        samples=versions,
        note="the table, without its indexes and free space",
    )


def compact(db: psycopg.Connection[Any], project: uuid.UUID) -> None:
    """Make splices of all that was superseded."""
    db.execute(
        "insert into preview.compactions (project_id) values (%s)"
        " on conflict (project_id) do update set due_at = '-infinity'",
        [project],
    )
    while _one(db, "select preview.compact()") != (None,):
        pass


def _one(db: psycopg.Connection[Any], query: str, *values: object) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = db.execute(query.encode(), values).fetchone()
    assert row is not None
    return row


async def measure(dsn: str, quick: bool) -> list[Row]:
    await bootstrap(dsn)
    await migrate(dsn)

    def all_of_it() -> list[Row]:
        bench = Bench(dsn)
        return [
            *(
                measure_saves(bench, name, size, rounds=9 if quick else 31, count=4 if quick else 10)
                for name, size in SIZES.items()
            ),
            *measure_edits(bench),
            measure_references(bench),
            measure_table(bench, versions=2_000 if quick else 10_000),
        ]

    return await asyncio.to_thread(all_of_it)


def run(quick: bool) -> Sequence[Row]:
    """A server of its own, with its default durability."""

    async def whole() -> list[Row]:
        with tempfile.TemporaryDirectory(prefix="preview-bench-pg-") as directory:
            async with EmbeddedPostgres(Path(directory) / "data") as dsn:
                return await measure(dsn, quick)

    return asyncio.run(whole())
