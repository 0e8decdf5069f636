"""`supabase/tests/database`, run as the Supabase CLI runs it, with the extension where there is one."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

TESTS = Path(__file__).parents[2] / "supabase" / "tests" / "database"
SUBSET = Path(__file__).with_name("pgtap.sql")


def prepare(dsn: str) -> str:
    """Give the database pgTAP in the schema `extensions`, and a connection string that finds it, as on Supabase."""
    with psycopg.connect(dsn) as db:
        if db.execute("select 1 from pg_available_extensions where name = 'pgtap'").fetchone():
            db.execute("create extension if not exists pgtap with schema extensions")
        else:
            db.execute(SUBSET.read_bytes())
    return make_conninfo(dsn, options="-c search_path=public,extensions")


def run(dsn: str, text: bytes) -> list[str]:
    """Every line that the file's statements answer with."""
    lines: list[str] = []
    with psycopg.connect(dsn, autocommit=True) as db:
        cursor = db.execute(text)
        while True:
            if cursor.description:
                lines += [line for row in cursor.fetchall() for line in str(row[0]).splitlines()]
            if not cursor.nextset():
                return lines


def verdict(lines: list[str]) -> tuple[int, int, list[str]]:
    """How many tests were planned, how many passed, and the lines that complain."""
    planned = [int(match[1]) for line in lines if (match := re.fullmatch(r"1\.\.(\d+)", line))]
    passed = sum(bool(re.match(r"ok \d+", line)) for line in lines)
    return planned[0], passed, [line for line in lines if re.match(r"not ok|#", line)]


@pytest.mark.parametrize("path", sorted(TESTS.glob("*.test.sql")), ids=lambda path: path.name)
def test_the_files_pass(database: str, path: Path) -> None:
    planned, passed, complaints = verdict(run(prepare(database), path.read_bytes()))
    assert complaints == []
    assert passed == planned > 0


def test_a_failing_file_is_seen(database: str) -> None:
    dsn = prepare(database)
    text = b"""
        begin;
        select plan(7);
        select is(1, 2, 'differs');
        select ok(null, 'null is not true');
        select throws_ok('select 1', '42501', null, 'throws nothing');
        select throws_ok('select 1/0', '42501', null, 'throws something else');
        select lives_ok('select 1/0', 'dies');
        select results_eq('select 1', 'select 2', 'other rows');
        select * from finish();
        rollback;
    """
    lines = run(dsn, text)
    planned, passed, _ = verdict(lines)
    assert (planned, passed) == (7, 0)
    assert sum(line.startswith("not ok") for line in lines) == 6
    assert any("planned 7 tests but ran 6" in line for line in lines)
