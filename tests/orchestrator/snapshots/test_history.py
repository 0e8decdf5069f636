"""`preview-orchestrator log | show | diff | restore`: a project's commits and turns, and going back."""

from __future__ import annotations

import fcntl
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID as uuid_of
from uuid import uuid4

import psycopg
import pytest

from orchestrator_stub.__main__ import main
from tests.database.db import apply, begin, connect, delete, end, make_project, upsert


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(command: str, *arguments: str) -> Done:
    """The command line as a person gives it, in this process: a start of its own takes a second."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([command, *arguments])
    return Done(int(ended.value.code or 0), out.getvalue(), err.getvalue())


def printed(dsn: str, *arguments: str, command: str = "log") -> list[str]:
    done = run(command, "--database-url", dsn, *arguments)
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
    what = f"somebody  5 files, 4 bytes: -old.ts, +src/0.ts, +src/1.ts, and 2 more  turn {turn} “A page\ufffd[2J”"
    assert re.fullmatch(rf" +2  {moment}  {re.escape(what)}", second)
    assert re.fullmatch(rf" +1  {moment}  somebody  1 file, 1 bytes: \+old\.ts", first)
    assert len(printed(database, project, "--limit", "1")) == 2


def test_a_difference_is_shown_and_a_project_goes_back(database: str) -> None:
    with connect(database) as db:
        project = str(make_project(db).id)
        upsert(db, uuid_of(project), "a.ts", "one\ntwo\n")
        db.execute("select public.create_checkpoint(%s, 'good')", [project])
        upsert(db, uuid_of(project), "a.ts", "one\nTWO\x1b[2J\n")
    line, *diff = printed(database, project, "2", command="show")
    assert re.match(r" +2 .*1 file, 12 bytes: a\.ts$", line)
    assert diff == [
        "diff --git a/a.ts b/a.ts",
        "--- a/a.ts",
        "+++ b/a.ts",
        "@@ -1,2 +1,2 @@",
        " one",
        "-two",
        "+TWO\x1b[2J",
    ]
    assert printed(database, project, "good", command="diff") == diff, "in a pipe it is what git applies"
    assert "checkpoint “good”" in printed(database, project)[1]
    back = printed(database, project, "good", command="restore")
    assert back == [
        "revision 3 is as revision 1 was: 1 file changed",
        f"to take that back: preview-orchestrator restore {project} 2",
    ]
    assert "nothing was changed" in printed(database, project, "1", command="restore")[0]
    assert printed(database, project, "1", "3", command="diff") == []


def test_what_is_not_there_is_said_in_one_line(database: str) -> None:
    with connect(database) as db:
        project = str(make_project(db).id)
        upsert(db, uuid_of(project), "a.ts", "1")
    for command, arguments, code, said in (
        ("show", [project, "9"], 64, "there is no revision 9: the project is at revision 1"),
        ("show", [str(uuid4()), "1"], 1, "no such project"),
        ("show", [project, "0"], 64, "there is no revision 0: the project is at revision 1"),
        ("diff", [project, "0", "nowhere"], 64, "'nowhere' is neither"),
        ("restore", [project, "0"], 1, "revision must be 1 or more"),
        ("restore", [str(uuid4()), "1"], 1, "no such project"),
        ("log", ["never"], 64, "it is no UUID"),
        ("log", [str(uuid4())], 1, "no such project"),
        ("log", ["-", "--state", "/nowhere"], 64, "no `preview-orchestrator dev` runs in /nowhere"),
    ):
        done = run(command, "--database-url", database, *arguments)
        assert (done.returncode, done.stdout) == (code, ""), (command, done)
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_beside_a_running_dev_a_dash_is_its_project(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    with connect(database) as db:
        project = str(make_project(db).id)
        for n in range(15):
            upsert(db, uuid_of(project), "a.ts", f"{n}\n")
    state = tmp_path / ".preview-sync"
    state.mkdir()
    (state / "dev.json").write_text(json.dumps({"project_id": project, "database_url": database}))
    with (state / "dev.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert len(run("log", "-").stdout.splitlines()) == 15
        assert "-10\n+11\n" in run("show", "-", "12").stdout
        assert "-11\n+14\n" in run("diff", "-", "12", "15").stdout
        assert run("restore", "-", "12").stdout.startswith(
            "revision 16 is as revision 12 was: 1 file changed\n"
        )
        assert len(run("log", project).stdout.splitlines()) == 16
    assert run("log", "-").returncode == 64, "that dev has ended"


@pytest.mark.parametrize("command", ["log", "show", "diff", "restore"])
def test_the_help_says_what_a_revision_is_and_gives_an_example(command: str) -> None:
    done = run(command, "--help")
    assert f"preview-orchestrator {command} - " in done.stdout
    assert "docs/history.md" in done.stdout


def test_json_has_all_of_it(database: str) -> None:
    with connect(database) as db:
        project, turn, still = history(db)
    opened, second, first = map(json.loads, printed(database, project, "--json"))
    assert (opened["kind"], opened["turn"], opened["files"]) == ("turn", still, 1)
    assert (second["revision"], second["turn"], second["label"]) == (2, turn, "A page\x1b[2J")
    assert second["paths"] == ["-old.ts", *(f"+src/{n}.ts" for n in range(4))]
    assert (first["revision"], first["turn"]) == (1, None)


def test_a_database_that_is_away_is_said_in_one_line() -> None:
    away = "host=127.0.0.1 port=1 connect_timeout=2 dbname=x"
    done = run("log", str(uuid4()), "--database-url", away)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("preview-orchestrator: cannot log: .*\n", done.stderr)
