"""Following a project by its revisions: what catch-up answers, and that nothing is missed while many write."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Json,
    Project,
    apply,
    changes_since,
    connect,
    delete,
    files,
    hash_of,
    head,
    messages,
    one,
    upsert,
    user,
)

Db = psycopg.Connection[Any]

WRITERS = 16
WRITES = 25


def follow(tree: dict[str, str], changes: list[Json]) -> None:
    """Advance a path → hash tree, checking the content that came along."""
    for change in changes:
        if change["action"] == "delete":
            tree.pop(change["file_path"], None)
        else:
            if change["content"] is not None:
                assert hashlib.sha256(change["content"].encode()).hexdigest() == change["content_hash"]
            tree[change["file_path"]] = change["content_hash"]


def test_what_is_answered_where(db: Db, project: Project) -> None:
    epoch, _ = head(db, project.id)
    assert changes_since(db, project.id, epoch, 0) == {"kind": "current", "epoch": epoch, "revision": 0}
    upsert(db, project.id, "a", "1")
    upsert(db, project.id, "a", "2")
    upsert(db, project.id, "b", "1")
    delete(db, project.id, "b")
    a = {
        "action": "update",
        "file_path": "a",
        "content": "2",
        "content_hash": hashlib.sha256(b"2").hexdigest(),
        "version": 2,
        "encoding": "utf-8",
    }
    b = {"action": "delete", "file_path": "b", "version": 2}
    changed = {"kind": "changes", "epoch": epoch, "revision": 4}
    assert changes_since(db, project.id, epoch, 0) == changed | {"base_revision": 0, "changes": [a, b]}
    assert changes_since(db, project.id, epoch, 1) == changed | {"base_revision": 1, "changes": [a, b]}
    assert changes_since(db, project.id, epoch, 2) == changed | {"base_revision": 2, "changes": [b]}
    assert changes_since(db, project.id, epoch, 4) == {"kind": "current", "epoch": epoch, "revision": 4}
    assert changes_since(db, project.id, epoch, 4, ["a", "never"]) == changed | {
        "base_revision": 4,
        "changes": [a],
    }
    assert changes_since(db, project.id, epoch, 2, ["a", "b"]) == changed | {
        "base_revision": 2,
        "changes": [a, b],
    }
    snapshot = {"kind": "snapshot", "epoch": epoch, "revision": 4}
    assert changes_since(db, project.id, epoch, 5) == snapshot | {"reason": "ahead"}
    assert changes_since(db, project.id, str(project.id), 4) == snapshot | {"reason": "epoch"}
    assert changes_since(db, project.id, "not an epoch", 4) == snapshot | {"reason": "epoch"}
    assert changes_since(db, project.id, epoch, 0, max_bytes=1)["kind"] == "changes"
    upsert(db, project.id, "c", "four")
    assert changes_since(db, project.id, epoch, 0, max_bytes=4)["reason"] == "too_large"
    with pytest.raises(psycopg.Error) as error:
        changes_since(db, project.stranger, epoch, 0)
    assert error.value.sqlstate == "PT404"


def test_what_is_asked_for_by_path_counts_towards_the_limit(db: Db, project: Project) -> None:
    """A question with many paths was answered with 37 MB for a limit of 2 MB."""
    for name in ("a", "b", "c"):
        upsert(db, project.id, name, "x" * 10)
    epoch, revision = head(db, project.id)

    def kind(after: int, paths: list[str], most: int) -> str:
        answer = changes_since(db, project.id, epoch, after, paths, max_bytes=most)
        return str(answer.get("reason", answer["kind"]))

    assert kind(revision, ["a", "b", "c"], 30) == "changes"
    assert kind(revision, ["a", "b", "c"], 29) == "too_large"
    assert kind(revision, ["a", "a", "never"], 10) == "changes", (
        "none is counted twice, nor what is not there"
    )
    assert kind(2, ["a", "c"], 20) == "changes", "c is newer and asked for"
    assert kind(2, ["a", "c"], 19) == "too_large"
    delete(db, project.id, "a")
    assert kind(revision + 1, ["a"], 0) == "changes", "a deletion has no bytes"


def test_a_transaction_held_open_is_not_passed_by(db: Db, database: str, project: Project) -> None:
    """Whoever reads while a writer has not committed sees neither its files nor any revision above it."""
    upsert(db, project.id, "a", "before")
    epoch, _ = head(db, project.id)
    with connect(database) as slow, connect(database) as other:
        with slow.transaction():
            upsert(slow, project.id, "held", "open")
            assert changes_since(db, project.id, epoch, 0)["revision"] == 1
            # A snapshot taken now: one transaction that reads the head and then the files.
            reader = connect(database)
            reader.execute("begin isolation level repeatable read")
            assert head(reader, project.id)[1] == 1
            # Another writer cannot take the next revision: it waits for the first.
            other.execute("set lock_timeout = '200ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                upsert(other, project.id, "b", "impatient")
        assert files(reader, project.id).keys() == {"a"}
        assert one(reader, "select project_tree_hash(%s)", [project.id]) == hash_of(files(reader, project.id))
        reader.close()
        assert upsert(other, project.id, "b", "patient")["revision"] == 3
    tail = changes_since(db, project.id, epoch, 1)
    assert [change["file_path"] for change in tail["changes"]] == ["held", "b"]


def write_along(database: str, project: Project, number: int, failures: list[BaseException]) -> None:
    """One of many writers on overlapping paths; a lost race for a version is tried again on the new head."""
    dice = random.Random(number)
    try:
        with connect(database) as connection:
            for turn in range(WRITES):
                path = f"d{dice.randrange(4)}/f{dice.randrange(6)}"
                content = f"{number}:{turn}"
                kind = dice.random()
                with user(connection, dice.choice([project.owner, project.collaborator])):
                    if kind < 0.2:
                        apply(connection, project.id, [{"action": "delete", "file_path": path}])
                    elif kind < 0.4:
                        others = {f"d{dice.randrange(4)}/f{dice.randrange(6)}" for _ in range(4)}
                        apply(connection, project.id, [{"file_path": p, "content": content} for p in others])
                    elif kind < 0.7:
                        upsert(connection, project.id, path, content)
                if kind >= 0.7:
                    careful(connection, project, path, content)
    except BaseException as error:
        failures.append(error)


def careful(connection: Db, project: Project, path: str, content: str) -> None:
    while True:
        seen = one(
            connection,
            "select coalesce(max(version), 0) from project_files where project_id = %s and file_path = %s",
            [project.id, path],
        )
        try:
            upsert(connection, project.id, path, content, expected=seen)
        except psycopg.Error as error:
            if error.sqlstate != "PT409":
                raise
        else:
            return


def test_sixteen_writers_and_a_reader_that_misses_nothing(db: Db, database: str, project: Project) -> None:
    """The reader rebuilds the tree from catch-up alone, while sixteen write, and holds it against the database."""
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=write_along, args=(database, project, number, failures))
        for number in range(WRITERS)
    ]
    epoch, seen = head(db, project.id)
    tree: dict[str, str] = {}
    answers = 0
    for thread in threads:
        thread.start()
    try:
        while True:
            alive = any(thread.is_alive() for thread in threads)
            row = db.execute(
                "select changes_since(%s, %s, %s), project_tree_hash(%s)",
                [project.id, epoch, seen, project.id],
            ).fetchone()
            assert row
            answer, expected = row
            if answer["kind"] == "changes":
                follow(tree, answer["changes"])
                seen = answer["revision"]
                answers += 1
            assert hash_of(tree) == expected, f"at revision {seen}"
            if not alive and answer["kind"] == "current":
                break
    finally:
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert answers > 3, "the reader was meant to look in between"
    assert tree == files(db, project.id)
    assert_gapless_and_told(db, project, seen)


def assert_gapless_and_told(db: Db, project: Project, revision: int) -> None:
    """Every revision is there once, was broadcast once, and replaying the broadcasts gives every tree on the way."""
    told = messages(db, project.id)
    assert [payload["revision"] for _, payload in told] == list(range(1, revision + 1))
    rows = db.execute(
        "select revision, file_path, version, content_hash, is_deleted from project_files where project_id = %s"
        " order by revision, file_path",
        [project.id],
    ).fetchall()
    by_revision: dict[int, list[tuple[str, int, str | None]]] = {}
    for number, path, version, digest, gone in rows:
        by_revision.setdefault(number, []).append((path, version, None if gone else digest))
    assert sorted(by_revision) == list(range(1, revision + 1))
    for event, payload in told:
        changes = payload["files"] if event == "bulk:apply" else [payload]
        said = [(c["file_path"], c["version"], c.get("content_hash")) for c in changes]
        assert sorted(said) == by_revision[payload["revision"]]


def test_one_path_sixteen_writers_no_version_twice(db: Db, database: str, project: Project) -> None:
    failures: list[BaseException] = []

    def hammer(number: int) -> None:
        try:
            with connect(database) as connection:
                for turn in range(20):
                    upsert(connection, project.id, "hot", f"{number}:{turn}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=hammer, args=(number,)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    versions = db.execute("select version from project_files order by version").fetchall()
    assert [v for (v,) in versions] == list(range(1, WRITERS * 20 + 1))
    assert one(db, "select count(*) from project_files where is_current_version") == 1


def test_two_writers_cannot_make_a_file_and_its_directory(db: Db, database: str, project: Project) -> None:
    """RACE: each half alone is fine. The head's lock makes the second see the first."""
    outcomes: list[str] = []
    gate = threading.Barrier(2)

    def write(path: str) -> None:
        with connect(database) as connection:
            gate.wait(10)
            try:
                upsert(connection, project.id, path, "x")
                outcomes.append("written")
            except psycopg.Error as error:
                outcomes.append(error.sqlstate or "")

    for turn in range(10):
        outcomes.clear()
        threads = [threading.Thread(target=write, args=(path,)) for path in (f"p{turn}", f"p{turn}/q")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(outcomes) == ["PT409", "written"]


def test_one_correlation_id_from_many_at_once_is_one_write(db: Db, database: str, project: Project) -> None:
    answers: list[Json] = []

    def write() -> None:
        with connect(database) as connection:
            answers.append(upsert(connection, project.id, "a", "x", correlation="click"))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [answers[0]] * 8
    assert head(db, project.id)[1] == 1


@contextmanager
def at_most(db: Db, rows: int) -> Iterator[None]:
    """The block reads no more rows of project_files than this, by index or not, used or not."""
    query = (
        "select idx_tup_fetch + seq_tup_read from pg_stat_xact_user_tables where relname = 'project_files'"
    )
    with db.transaction():
        before = one(db, query)
        yield
        assert one(db, query) - before <= rows


@pytest.mark.parametrize("statistics", ["of many small projects", "of a table that was emptied", "none"])
def test_reads_are_in_proportion_to_what_is_asked(
    db: Db, database: str, project: Project, statistics: str
) -> None:
    """Whatever the planner was told: a write reads as many rows as it has files, and catch-up as many as it answers."""
    db.execute("delete from pg_statistic where starelid = 'public.project_files'::regclass")
    if statistics == "of a table that was emptied":
        emptied = one(db, "insert into projects (owner_id) values (%s) returning id", [project.owner])
        for turn in range(3):
            apply(db, emptied, [{"file_path": f"f{i}", "content": f"{i} {turn}"} for i in range(2000)])
        db.execute("delete from projects where id = %s", [emptied])
        db.execute("analyze project_files")
    if statistics == "of many small projects":
        for _ in range(100):
            small = one(db, "insert into projects (owner_id) values (%s) returning id", [project.owner])
            upsert(db, small, "a", "x")
        db.execute("vacuum analyze project_files")
    apply(db, project.id, [{"file_path": f"d{i % 9}/f{i}", "content": f"{i}"} for i in range(2000)])
    epoch, _ = head(db, project.id)
    with connect(database) as fresh:  # plans are made anew
        with at_most(fresh, 10_000):
            apply(
                fresh, project.id, [{"file_path": f"e{i % 9}/f{i}", "content": f"{i}"} for i in range(1000)]
            )
        with at_most(fresh, 20):
            upsert(fresh, project.id, "d1/f1", "later")
        with at_most(fresh, 5):
            assert len(changes_since(fresh, project.id, epoch, 2)["changes"]) == 1
        with at_most(fresh, 5):
            assert (
                len(changes_since(fresh, project.id, epoch, 3, ["d1/f1", "e1/f1", "never"])["changes"]) == 2
            )
