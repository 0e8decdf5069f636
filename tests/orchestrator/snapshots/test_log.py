"""`preview-orchestrator log`: a project's commits, the turns that they were, and the turns that are open."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any
from uuid import uuid4

import psycopg

from tests.database.db import apply, begin, connect, delete, end, make_project, upsert


def printed(dsn: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "orchestrator_stub", "log", "--database-url", dsn, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def history(db: psycopg.Connection[Any]) -> tuple[str, str, str]:
    """Two commits, one of them a turn; a turn that changed nothing; and one that is open. The project and two turns."""
    project = make_project(db).id
    upsert(db, project, "old.ts", "1")
    turn = begin(db, project, "A page\x1b[2J")
    apply(db, project, [{"file_path": f"src/{n}.ts", "content": "x"} for n in range(4)], turn=turn)
    delete(db, project, "old.ts", turn=turn)
    end(db, project, turn)
    end(db, project, begin(db, project, "nothing"))
    still = begin(db, project)
    upsert(db, project, "new.ts", "four", turn=still)
    return str(project), turn, still


def test_a_line_for_each_turn_and_commit(database: str) -> None:
    with connect(database) as db:
        project, turn, still = history(db)
    opened, second, first = printed(database, project)
    assert opened == f"turn {still} open: 1 file, 4 bytes"
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    what = f"5 files: -old.ts, src/0.ts, src/1.ts, and 2 more  turn {turn} “A page\ufffd[2J”"
    assert re.fullmatch(rf" +2  {moment}  {re.escape(what)}", second)
    assert re.fullmatch(rf" +1  {moment}  1 file: old\.ts", first)
    assert len(printed(database, project, "--limit", "1")) == 2
    assert printed(database, str(uuid4())) == []


def test_json_has_all_of_it(database: str) -> None:
    with connect(database) as db:
        project, turn, still = history(db)
    opened, second, first = map(json.loads, printed(database, project, "--json"))
    assert (opened["kind"], opened["turn"], opened["files"]) == ("turn", still, 1)
    assert (second["revision"], second["turn"], second["label"]) == (2, turn, "A page\x1b[2J")
    assert second["paths"] == ["-old.ts", *(f"src/{n}.ts" for n in range(4))]
    assert (first["revision"], first["turn"]) == (1, None)


def test_a_database_that_is_away_is_said_in_one_line() -> None:
    away = "host=127.0.0.1 port=1 connect_timeout=2 dbname=x"
    command = [sys.executable, "-m", "orchestrator_stub", "log", str(uuid4()), "--database-url", away]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("preview-orchestrator: cannot read the log: .*\n", done.stderr)
