"""Sessions whose tools disagree come to rest, and a project without write-back does not know that there is any."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from tests.database.db import Project, apply, connect, delete, head, make_project, one, upsert
from tests.database.test_write_back import change, offer, outcomes, session_of

Db = psycopg.Connection[Any]
PATH = "gen/x"


@pytest.fixture(scope="module")
def shared(module_database: str) -> Iterator[Db]:
    with connect(module_database) as connection:
        connection.execute(
            "update preview.settings set offers_per_minute = 100000, writes_per_minute = 100000"
        )
        yield connection


@pytest.fixture
def on(shared: Db) -> Project:
    project = make_project(shared)
    rules = [{"glob": "gen/**", "mode": "generated", "deletes": True}]
    one(shared, "select set_write_back(%s, %s::jsonb)", [project.id, json.dumps(rules)])
    return project


@dataclass(frozen=True)
class Fight:
    """Two sessions, each of which writes what its generator makes whenever it sees something else.

    Attributes:
        turns: whose turn it is, for so many; None: at random.
        person: a person saves this path after each so many turns; None: nobody.
        late: each knows only the version that it saw at its own last turn.
        deletes: the second one removes what the first one makes.
        mode: they agree on the content and not on whether it may be executed.
    """

    turns: int | None = 1
    person: str | None = None
    late: bool = False
    deletes: bool = False
    mode: bool = False


FIGHTS = {
    "in turns": Fight(),
    "at random": Fight(turns=None),
    "a person saves what they are made from": Fight(turns=None, person="src/input"),
    "a person saves the same file": Fight(turns=None, person=PATH),
    "each offers what it made of an older version": Fight(late=True),
    "one removes what the other makes": Fight(deletes=True),
    "whether it may be executed": Fight(mode=True),
}


@pytest.mark.parametrize("name", FIGHTS)
def test_two_that_disagree_make_two_versions_at_most(shared: Db, on: Project, name: str) -> None:
    """Of each save of a person, in whatever way they disagree; without the rule it is one for each turn."""
    fight, draw = FIGHTS[name], random.Random(1)
    sessions = [session_of(shared, on), session_of(shared, on)]
    seen, inputs = [0, 0], 0
    people = head(shared, on.id)[1]
    for turn in range(60):
        if fight.person and turn % 20 == 10:
            inputs += 1
            upsert(shared, on.id, fight.person, f"a person {inputs}")
            people = head(shared, on.id)[1]
        who = draw.randrange(2) if fight.turns is None else turn % 2
        version, content, executable = current(shared, on)
        base = seen[who] if fight.late else version
        wanted = (
            None if fight.deletes and who else f"made {inputs}" if fight.mode else f"{'AB'[who]} of {inputs}"
        )
        if (content, executable) != (wanted, fight.mode and who == 0):
            offer(shared, sessions[who], change(PATH, wanted, base, executable=fight.mode and who == 0))
        seen[who] = version
        assert head(shared, on.id)[1] - people <= 2, turn
    if fight.person != PATH and not fight.late:
        assert head(shared, on.id)[1] - people == 2, "each says once what comes of a save"


def current(db: Db, project: Project) -> tuple[int, str | None, bool]:
    row = db.execute(
        "select version, content, executable and not is_deleted from project_files"
        " where project_id = %s and file_path = %s and is_current_version",
        [project.id, PATH],
    ).fetchone()
    return row or (0, None, False)


def test_one_that_writes_the_time_comes_to_rest_until_people_write(shared: Db, on: Project) -> None:
    """No content comes twice; it went on for ever."""
    sessions = [session_of(shared, on), session_of(shared, on)]

    def fight() -> list[tuple[str, str | None]]:
        told = []
        for turn in range(30):
            version = current(shared, on)[0]
            told += outcomes(offer(shared, sessions[turn % 2], change(PATH, f"at {version} {turn}", version)))
        return told

    assert fight() == [("applied", None)] * 20 + [("refused", "restless")] * 10
    assert outcomes(offer(shared, sessions[0], change("gen/y", "another"))) == [("applied", None)]
    upsert(shared, on.id, "src/input", "1")
    assert fight() == [("applied", None)] * 20 + [("refused", "restless")] * 10


def test_saves_do_not_touch_what_is_off(shared: Db) -> None:
    """In the database a save costs what it did; the agent's half is in `tests/agent/write_back/test_flow.py`."""
    project = make_project(shared)

    def used() -> dict[str, int]:
        """Of each table, the scans of it and its rows that were written, so far."""
        return dict(
            shared.execute(
                "select relname, seq_scan + coalesce(idx_scan, 0) + n_tup_ins + n_tup_upd + n_tup_del"
                " from pg_stat_xact_user_tables where schemaname = 'preview' or relname = 'project_files'"
            ).fetchall()
        )

    with shared.transaction():
        before = used()
        upsert(shared, project.id, "a", "1")
        upsert(shared, project.id, "a", "2")
        apply(shared, project.id, [{"action": "update", "file_path": "b", "content": "1"}])
        delete(shared, project.id, "a")
        after = used()
    touched = {name for name, count in after.items() if count != before.get(name, 0)}
    assert "project_files" in touched
    assert touched & {"project_write_back", "kept_changes", "write_back_state"} == set()
