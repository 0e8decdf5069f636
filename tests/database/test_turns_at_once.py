"""Turns under sixteen writers: whoever reads sees all of a turn or nothing of it, at every revision."""

from __future__ import annotations

import threading
from typing import Any

import psycopg

from tests.database.db import (
    Project,
    abandon,
    apply,
    begin,
    changes_since,
    connect,
    delete,
    end,
    files,
    head,
    messages,
    one,
    upsert,
    user,
)
from tests.database.test_following import assert_gapless_and_told

Db = psycopg.Connection[Any]

WRITERS = 16
ROUNDS = 6
PARTS = 8


def parts(number: int) -> list[str]:
    """Files that only turns write, always all of them together, with the same content."""
    return [f"w{number}/part{n}.ts" for n in range(PARTS)]


def write_turns(dsn: str, project: Project, number: int, failures: list[BaseException]) -> None:
    """Turns written save by save, one in three of them abandoned; ordinary saves and a contended file in between."""
    try:
        with connect(dsn) as db:
            for n in range(ROUNDS):
                with user(db, project.owner):
                    turn = begin(db, project.id, f"{number}:{n}")
                for path in parts(number):
                    with user(db, project.owner):
                        upsert(db, project.id, path, f"{number}:{n}", turn=turn)
                with user(db, project.collaborator):
                    upsert(db, project.id, "plain", f"{number}:{n}")
                    upsert(db, project.id, "contended", f"{number}:{n}", turn=turn)
                if n % 3 == 1:
                    abandon(db, project.id, turn)
                    continue
                try:
                    end(db, project.id, turn)
                except psycopg.Error as error:
                    if error.sqlstate != "PT409":
                        raise
                    end(db, project.id, turn, force=True)
    except BaseException as error:
        failures.append(error)


def assert_whole(tree: dict[str, str]) -> int:
    """Each writer's parts are all there and alike, or all absent. How many writers have them."""
    seen = 0
    for number in range(WRITERS):
        contents = {tree.get(path) for path in parts(number)}
        assert len(contents) == 1, f"half of a turn of writer {number}: {contents}"
        seen += contents != {None}
    return seen


def test_every_reader_sees_all_of_a_turn_or_nothing(db: Db, database: str, project: Project) -> None:
    db.execute("update preview.settings set max_open_turns = 16, turns_per_minute = 1000")
    failures: list[BaseException] = []
    threads = [
        threading.Thread(target=write_turns, args=(database, project, number, failures))
        for number in range(WRITERS)
    ]
    epoch, _ = head(db, project.id)
    followed: dict[str, str] = {}
    revision, looks = 0, set()
    for thread in threads:
        thread.start()
    try:
        while True:
            alive = any(thread.is_alive() for thread in threads)
            listed = db.execute("select file_path, content_hash from list_current_files(%s)", [project.id])
            looks.add(assert_whole(dict(listed.fetchall())))
            answer = changes_since(db, project.id, epoch, revision)
            for change in answer.get("changes", []):
                followed[change["file_path"]] = change["content_hash"]
            revision = answer["revision"]
            assert_whole(followed)
            if not alive and answer["kind"] == "current":
                break
    finally:
        for thread in threads:
            thread.join(60)
    assert failures == []
    assert len(looks) > 2, "the reader was meant to look in between"
    assert followed == files(db, project.id)
    assert_gapless_and_told(db, project, revision)

    # At every revision, by the messages: a follower that hears them one by one.
    tree: dict[str, str] = {}
    ends = 0
    for event, payload in messages(db, project.id):
        for change in payload["files"] if event == "bulk:apply" else [payload]:
            tree[change["file_path"]] = change["content_hash"]
        assert_whole(tree)
        ends += "turn" in payload
    assert ends == WRITERS * ROUNDS * 2 // 3
    assert one(db, "select count(*) from preview.turn_changes") == 0


def test_two_writers_in_one_turn(db: Db, database: str, project: Project) -> None:
    """Both are members; the turn's row lets one write after the other, and its end takes all of both."""
    turn = begin(db, project.id, "together")
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with connect(database) as mine:
                for n in range(20):
                    upsert(mine, project.id, f"w{number}/f{n}", f"{n}", turn=turn)
                    upsert(mine, project.id, "shared", f"{number}:{n}", turn=turn)
                delete(mine, project.id, f"w{number}/f0", turn=turn)
                apply(mine, project.id, [{"file_path": f"w{number}/b", "content": "b"}], turn=turn)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    held = db.execute("select files, bytes from preview.turns").fetchone()
    counted = db.execute("select count(*)::int, sum(size_bytes)::int from preview.turn_changes").fetchone()
    assert held == counted
    end(db, project.id, turn)
    assert set(files(db, project.id)) == {
        "shared", *(f"w{w}/f{n}" for w in range(2) for n in range(1, 20)), "w0/b", "w1/b"
    }  # fmt: skip


def test_ended_by_many_at_once_is_ended_once(db: Db, database: str, project: Project) -> None:
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "1", turn=turn)
    answers: list[Any] = []

    def finish() -> None:
        with connect(database) as mine:
            answers.append(end(mine, project.id, turn))

    threads = [threading.Thread(target=finish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 8
    assert all(answer == answers[0] for answer in answers)
    assert head(db, project.id)[1] == len(messages(db, project.id)) == 1
