"""`dev` takes what tools made into its directory, and nothing that somebody wrote there is replaced."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orchestrator_stub.devstack.baseline import Baseline
from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.platform.source_files import LocalFile
from orchestrator_stub.write_back.pull import AT_ONCE, Pull
from tests.database.db import Project, connect, make_project, one, upsert
from tests.database.test_write_back import change, offer, session_of


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection[Any]]:
    with connect(database) as connection:
        yield connection


@pytest.fixture
def project(db: psycopg.Connection[Any]) -> Project:
    project = make_project(db)
    rules = [{"glob": "gen/**", "mode": "generated", "deletes": True}, {"glob": "src/**", "mode": "authored"}]
    one(db, "select set_write_back(%s, %s::jsonb)", [project.id, json.dumps(rules)])
    return project


@pytest.fixture
async def pull(database: str, project: Project, tmp_path: Path) -> AsyncIterator[Pull]:
    (tmp_path / "dir").mkdir()
    (tmp_path / "state").mkdir()
    async with pool_of(database, size=1) as pool:
        baseline = Baseline(tmp_path / "state" / "editor.json", project.id)
        yield Pull(tmp_path / "dir", project.id, pool, baseline, tmp_path / "state")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "dir"


def sent(pull: Pull, root: Path, path: str, content: str) -> None:
    """A file of the directory that the project has."""
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_text(content)
    pull._sent.files[path] = LocalFile(hashlib.sha256(content.encode()).hexdigest(), False)


async def test_what_comes_back_is_in_the_directory_and_is_not_sent_again(
    db: psycopg.Connection[Any], project: Project, pull: Pull, root: Path, tmp_path: Path
) -> None:
    session = session_of(db, project)
    upsert(db, project.id, "gen/a", "1")
    sent(pull, root, "gen/a", "1")
    upsert(db, project.id, "by/the/page", "not ours to bring")
    offer(db, session, change("gen/a", "2\r\n", 1), change("gen/deep/run", "x", executable=True))
    assert await pull.step() == ["gen/a came back", "gen/deep/run came back"]
    assert (root / "gen/a").read_bytes() == b"2\r\n"
    assert (root / "gen/deep/run").stat().st_mode & 0o111
    assert not (root / "by").exists()
    again = Baseline(tmp_path / "state" / "editor.json", project.id)
    assert again.files["gen/a"] == LocalFile(hashlib.sha256(b"2\r\n").hexdigest(), False)
    assert await pull.step() == []
    offer(db, session, change("gen/a", None, 2))
    assert await pull.step() == ["gen/a was removed by a tool"]
    assert not (root / "gen/a").exists()
    assert sorted(path.name for path in root.rglob("*") if path.is_file()) == ["run"]


async def test_what_somebody_wrote_there_stays(
    db: psycopg.Connection[Any], project: Project, pull: Pull, root: Path
) -> None:
    session = session_of(db, project)
    for name in "abcd":
        upsert(db, project.id, f"gen/{name}", "1")
        sent(pull, root, f"gen/{name}", "1")
    (root / "gen/a").write_text("not sent yet")
    (root / "gen/b").unlink()
    (root / "gen/c").write_text("not sent either")
    (root / "gen/new").write_text("mine")
    (root / "gen/d").write_text("2")
    offer(
        db, session, change("gen/a", "2", 1), change("gen/b", "2", 1), change("gen/c", None, 1),
        change("gen/d", "2", 1), change("gen/new", "theirs"),
    )  # fmt: skip
    assert await pull.step() == [
        "gen/a came back and was changed here: the tool's is kept as gen/a.conflict-v2",
        "gen/b came back and was removed here: it stays in the project alone",
        "gen/c was removed by a tool and changed here: it stays here",
        "gen/new came back and was changed here: the tool's is kept as gen/new.conflict-v1",
    ]
    found = {path.name: path.read_text() for path in (root / "gen").iterdir()}
    assert found == {
        "a": "not sent yet", "a.conflict-v2": "2", "c": "not sent either", "d": "2", "new": "mine",
        "new.conflict-v1": "theirs",
    }  # fmt: skip


async def test_links_lead_nowhere(
    db: psycopg.Connection[Any], project: Project, pull: Pull, root: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("1")
    (root / "gen").mkdir()
    (root / "gen/link").symlink_to(outside / "file")
    (root / "gen/below").symlink_to(outside)
    (root / "gen/directory").mkdir()
    made = [change(f"gen/{name}", "2") for name in ("link", "below/file", "below/new", "directory")]
    offer(db, session_of(db, project), *made)
    lines = await pull.step()
    assert len(lines) == 4
    assert (outside / "file").read_text() == "1"
    assert (root / "gen/link").is_symlink()
    assert sorted(path.name for path in outside.iterdir()) == ["file"]


async def test_what_a_member_accepts_comes_too_and_many_come_in_steps(
    db: psycopg.Connection[Any], project: Project, pull: Pull, root: Path
) -> None:
    session = session_of(db, project)
    kept = offer(db, session, change("src/a.ts", "new"))["results"][0]["kept_id"]
    assert await pull.step() == []
    one(db, "select accept_proposal(%s, %s)", [project.id, kept])
    assert await pull.step() == ["src/a.ts came back"]
    for part in range(3):
        offer(db, session, *(change(f"gen/{part}-{n}", "x") for n in range(AT_ONCE - 8)))
    assert len(await pull.step()) == 3 * (AT_ONCE - 8)
    assert len([*(root / "gen").iterdir()]) == 3 * (AT_ONCE - 8)


async def test_what_could_not_be_taken_is_taken_once_it_can_be(
    db: psycopg.Connection[Any], project: Project, pull: Pull, root: Path
) -> None:
    (root / "gen").mkdir()
    (root / "gen/in").write_text("a file, where a directory is to be")
    offer(db, session_of(db, project), change("gen/in/b", "x"), change("gen/c", "x"))
    [_, line] = await pull.step()
    assert line.startswith("gen/in/b came back and is not taken")
    assert await pull.step() == [], "it is said once"
    (root / "gen/in").unlink()
    assert await pull.step() == ["gen/in/b came back"]
    assert (root / "gen/in/b").read_text() == "x"
    assert await pull.step() == []


async def test_what_waits_for_a_decision_is_said_once(
    db: psycopg.Connection[Any], project: Project, pull: Pull
) -> None:
    session = session_of(db, project)
    assert await pull.waiting() == []
    upsert(db, project.id, "gen/a", "a person's")
    offer(db, session, change("gen/a", "a tool's"), change("src/b", "new"))
    lines = await pull.waiting()
    assert [line.partition(";")[0] for line in lines] == [
        "gen/a of a tool waits for a decision (conflict)",
        "src/b of a tool waits for a decision (proposal)",
    ]
    assert await pull.waiting() == []
    offer(db, session, *(change(f"src/{n}", "new") for n in range(5)))
    assert [line.partition(";")[0] for line in await pull.waiting()] == [
        "5 files that tools made wait for a decision"
    ]
