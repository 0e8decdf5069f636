"""Turns: bad input and faults, and what is left of a turn then."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Project,
    abandon,
    acting_as,
    apply,
    begin,
    connect,
    delete,
    end,
    files,
    head,
    make_project,
    one,
    upsert,
    user,
)
from tests.database.test_deletion import until_waiting
from tests.database.test_writing import refused, sha

Db = psycopg.Connection[Any]


def over(db: Db, turn: str, interval: str) -> None:
    """As if the turn's last write had been so long ago."""
    db.execute(
        "update preview.turns set expires_at = expires_at - %(i)s::interval, kept_until = kept_until - %(i)s::interval,"
        " closed_at = closed_at - %(i)s::interval where id = %(turn)s",
        {"i": interval, "turn": turn},
    )


def state(db: Db, turn: str) -> str | None:
    row = db.execute("select state from preview.turns where id = %s", [turn]).fetchone()
    return row[0] if row else None


# -------------------------------------------------------------------------------- bad input and faults


@pytest.mark.parametrize(
    "how", ["ended", "abandoned", "reaped", "silently reaped", "foreign", "unknown", "replaced"]
)
def test_a_turn_that_cannot_be_written_to_says_why(db: Db, project: Project, how: str) -> None:
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "1", turn=turn)
    there = project.id
    if how == "ended":
        end(db, project.id, turn)
    elif how == "abandoned":
        abandon(db, project.id, turn)
    elif "reaped" in how:
        over(db, turn, "24 hours 1 second")
        if how == "reaped":
            assert one(db, "select preview.reap_turns()")["reaped"] == 1
    elif how == "foreign":
        there = make_project(db).id
    elif how == "unknown":
        turn = str(uuid.uuid4())
    else:
        one(db, "select new_project_epoch(%s)", [project.id])
    sqlstate = "PT404" if how in ("foreign", "unknown") else "PT410"
    before = files(db, project.id)
    calls = [lambda: end(db, there, turn)] if how != "ended" else []
    if how != "replaced":
        calls += [
            lambda: upsert(db, there, "a", "2", turn=turn),
            lambda: delete(db, there, "a", turn=turn),
            lambda: apply(db, there, [], turn=turn),
            lambda: one(db, "select count(*) from list_current_files(%s, %s)", [there, turn]),
        ]
        calls += [lambda: abandon(db, there, turn)] if how != "abandoned" else []
    for call in calls:
        with pytest.raises(psycopg.Error) as error:
            call()
        assert error.value.sqlstate == sqlstate
        detail = refused(error, sqlstate, "turn_id")
        if sqlstate == "PT410" and how != "replaced":
            assert detail == {"turn_id": turn, "state": how.removeprefix("silently ")}
    assert files(db, project.id) == before


def test_a_strangers_hand_on_a_turn(db: Db, project: Project) -> None:
    with user(db, project.collaborator):
        turn = begin(db, project.id)
        upsert(db, project.id, "a", "1", turn=turn)
    seen = "select count(*) from preview.turns t join preview.turn_changes c on c.turn_id = t.id"
    for call in (
        lambda: begin(db, project.id),
        lambda: upsert(db, project.id, "a", "2", turn=turn),
        lambda: end(db, project.id, turn),
        lambda: abandon(db, project.id, turn),
        lambda: one(db, "select count(*) from list_current_files(%s, %s)", [project.id, turn]),
    ):
        for claims in ({"sub": project.stranger}, {"sub": project.owner, "project_id": project.id}, {}):
            with pytest.raises(psycopg.Error) as error, acting_as(db, "authenticated", **claims):
                call()
            assert error.value.sqlstate == "PT404"
            with acting_as(db, "authenticated", **claims):
                assert one(db, seen) == 0
    for table in ("turns", "turn_changes"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), user(db, project.owner):
            db.execute(f"delete from preview.{table}".encode())
    with user(db, project.owner):
        assert one(db, seen) == 1
        upsert(db, project.id, "b", "of another member", turn=turn)
    with acting_as(db, "service_role"):
        assert end(db, project.id, turn)["changed"] == 2
    assert {who for (who,) in db.execute("select created_by from project_files")} == {project.owner}


def test_nobody_forges_the_name_of_a_turn(db: Db, project: Project) -> None:
    forged = "update preview.write_gate set project_id = %s, bulk = true, changes = '{}', turn = %s"
    with pytest.raises(psycopg.errors.InsufficientPrivilege), user(db, project.owner):
        db.execute(forged, [project.id, uuid.uuid4()])
    with user(db, project.owner):
        db.execute("update preview.turn_gate set project_id = %s, act = 'nothing of the kind'", [project.id])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("", 60), "p_label"), (("ž" * 101, 60), "p_label"), (("x", 0), "p_lease_seconds"),
        (("x", 3601), "p_lease_seconds"), (("x", None), "p_lease_seconds"),
    ],
)  # fmt: skip
def test_bad_arguments_of_begin_are_named(
    db: Db, project: Project, arguments: tuple[Any, ...], names: str
) -> None:
    with pytest.raises(psycopg.Error) as error:
        one(db, "select begin_turn(%s, %s, %s)", [project.id, *arguments])
    refused(error, "PT400", names)


def test_null_arguments_are_named(db: Db, project: Project) -> None:
    for call, names in {
        "begin_turn(null)": "project_uuid",
        "end_turn(null, gen_random_uuid())": "project_uuid",
        f"end_turn('{project.id}', null)": "turn_id",
        f"end_turn('{project.id}', gen_random_uuid(), false, '')": "p_correlation_id",
        f"abandon_turn('{project.id}', null)": "turn_id",
    }.items():
        with pytest.raises(psycopg.Error) as error:
            one(db, f"select public.{call}")
        refused(error, "PT400", names)


def test_eight_are_open_and_the_ninth_waits_or_takes_an_unattended_place(db: Db, project: Project) -> None:
    turns = [begin(db, project.id, lease=100 + n) for n in range(8)]
    upsert(db, project.id, "a", "1", turn=turns[3])
    with pytest.raises(psycopg.Error) as error:
        begin(db, project.id)
    assert 90 < refused(error, "PT429", "project_uuid")["retry_after"] <= 100
    begin(db, make_project(db).id)
    over(db, turns[3], "10 minutes")
    over(db, turns[5], "20 minutes")
    begin(db, project.id)
    assert [state(db, turn) for turn in turns] == ["open"] * 5 + ["reaped"] + ["open"] * 2
    assert end(db, project.id, turns[3])["changed"] == 1, (
        "a lease that ran out applies nothing and forgets nothing"
    )
    begin(db, project.id)


def test_eight_from_many_at_once_are_eight(db: Db, database: str, project: Project) -> None:
    upsert(db, project.id, "a", "1")

    def attempt(_: int) -> str | None:
        with connect(database) as mine:
            try:
                begin(mine, project.id)
            except psycopg.Error as error:
                return error.sqlstate
            return None

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(attempt, range(16)))
    assert sorted(answers, key=str) == [None] * 8 + ["PT429"] * 8


def test_beginning_has_a_rate(db: Db, project: Project) -> None:
    db.execute("update preview.settings set turns_per_minute = 3")
    for _ in range(3):
        abandon(db, project.id, begin(db, project.id))
    with pytest.raises(psycopg.Error) as error:
        begin(db, project.id)
    assert refused(error, "PT429", "project_uuid") == {"retry_after": 60}


def test_a_path_twice_is_its_last_word_and_twice_in_one_bulk_is_refused(db: Db, project: Project) -> None:
    turn = begin(db, project.id)
    for text in ("1", "22", "333"):
        upsert(db, project.id, "a", text, turn=turn)
    assert db.execute("select files, bytes from preview.turns").fetchone() == (1, 3)
    with pytest.raises(psycopg.Error) as error:
        apply(db, project.id, [{"file_path": "a", "content": t} for t in "xy"], turn=turn)
    refused(error, "PT400", "changes")
    answer = end(db, project.id, turn)
    assert [(f["file_path"], f["version"], f["content_hash"]) for f in answer["files"]] == [
        ("a", 1, sha("333"))
    ]


def test_a_file_and_its_directory_in_one_turn(db: Db, project: Project) -> None:
    upsert(db, project.id, "d", "a file")
    turn = begin(db, project.id)
    upsert(db, project.id, "p/q/r", "1", turn=turn)
    for path in ("p", "p/q", "p/q/r/s"):
        with pytest.raises(psycopg.Error) as error:
            upsert(db, project.id, path, "x", turn=turn)
        assert path in refused(error, "PT409", "would be a directory").values()
    upsert(db, project.id, "d/below", "1", turn=turn)  # room may yet be made
    with pytest.raises(psycopg.Error) as error:
        end(db, project.id, turn)
    assert refused(error, "PT409", "would be a directory") == {"file_path": "d", "in_the_way_of": "d/below"}
    delete(db, project.id, "d", turn=turn)
    end(db, project.id, turn)
    assert set(files(db, project.id)) == {"p/q/r", "d/below"}


def test_files_and_bytes_are_counted_while_staging(db: Db, project: Project) -> None:
    turn = begin(db, project.id)
    apply(
        db, project.id, [{"file_path": f"d{n % 50}/f{n}", "content": str(n)} for n in range(5000)], turn=turn
    )
    with pytest.raises(psycopg.Error) as error:
        upsert(db, project.id, "one-more", "", turn=turn)
    refused(error, "PT413", "turn_id")
    upsert(db, project.id, "d0/f0", "again", turn=turn)
    assert end(db, project.id, turn)["changed"] == 5000
    turn = begin(db, project.id)
    for n in range(4):
        upsert(db, project.id, f"big{n}", "x" * (4 << 20), turn=turn)
    with pytest.raises(psycopg.Error) as error:
        upsert(db, project.id, "a", "x", turn=turn)
    refused(error, "PT413", "turn_id")
    upsert(db, project.id, "big0", "", turn=turn)
    upsert(db, project.id, "a", "x", turn=turn)
    assert end(db, project.id, turn)["changed"] == 5


def test_a_throttled_turn_stays_whole(db: Db, project: Project) -> None:
    db.execute("update preview.settings set turn_writes_per_minute = 3, writes_per_minute = 1")
    turn = begin(db, project.id)

    def stage_seven() -> None:  # at least four of them fall into one minute
        for n in range(7):
            upsert(db, project.id, f"f{n}", "x", turn=turn)

    with pytest.raises(psycopg.Error) as error:
        stage_seven()
    assert 0 < refused(error, "PT429", "turn_id")["retry_after"] <= 60
    staged = one(db, "select count(*) from preview.turn_changes")
    assert staged >= 3
    db.execute(
        "update project_heads set window_start = date_trunc('minute', clock_timestamp()), window_writes = 9"
    )
    revision = head(db, project.id)[1]
    try:
        end(db, project.id, turn)
    except psycopg.Error as throttled:  # unless the minute ended just now
        assert throttled.sqlstate == "PT429"  # noqa: PT017
        assert head(db, project.id)[1] == revision
        db.execute("update project_heads set window_start = '-infinity'")
        assert end(db, project.id, turn)["changed"] == staged


def test_the_lease_is_renewed_by_each_write_and_an_old_one_can_be_resumed(db: Db, project: Project) -> None:
    turn = begin(db, project.id, lease=30)
    upsert(db, project.id, "a", "1", turn=turn)
    over(db, turn, "23 hours 59 minutes")
    assert one(db, "select expires_at < now() and kept_until > now() from preview.turns") is True
    assert one(db, "select preview.reap_turns()") == {"reaped": 0, "forgotten": 0, "answers": 0}
    upsert(db, project.id, "b", "1", turn=turn)
    left = one(db, "select extract(epoch from expires_at - clock_timestamp()) from preview.turns")
    assert 20 < left <= 30
    assert end(db, project.id, turn)["changed"] == 2


def test_reaping_ends_what_nobody_resumed_and_forgets_what_is_long_over(db: Db, project: Project) -> None:
    turns = [begin(db, project.id) for _ in range(4)]
    for turn in turns:
        upsert(db, project.id, turn, "x", turn=turn)
    end(db, project.id, turns[1], correlation="c")
    abandon(db, project.id, turns[2])
    for turn in turns[:3]:
        over(db, turn, "25 hours")
    db.execute("update preview.answers set created_at = created_at - interval '25 hours'")
    assert one(db, "select preview.reap_turns()") == {"reaped": 1, "forgotten": 2, "answers": 1}
    assert [state(db, turn) for turn in turns] == ["reaped", None, None, "open"]
    assert one(db, "select count(*) from preview.turn_changes") == 1
    assert set(files(db, project.id)) == {turns[1]}


def test_an_object_that_a_turn_names_is_in_use_until_the_turn_is_over(db: Db, project: Project) -> None:
    digest = sha(b"pixel")
    change = {"file_path": "logo.png", "content": None, "content_hash": digest, "encoding": "base64"}
    turn = begin(db, project.id)
    with pytest.raises(psycopg.Error) as error:
        apply(db, project.id, [change], turn=turn)
    refused(error, "PT400", "project-assets")
    stored = "insert into storage.objects (bucket_id, name, metadata) values ('project-assets', %s, %s)"
    db.execute(stored, [f"{project.id}/{digest}", json.dumps({"size": 5})])
    named = "select count(*) from preview.objects_named(%s) h where h = %s"
    assert one(db, named, [project.id, digest]) == 0
    apply(db, project.id, [change], turn=turn)
    with user(db, project.owner):
        row = db.execute(
            "select content_hash, size_bytes, encoding, file_type from list_current_files(%s, %s)",
            [project.id, turn],
        )
        assert row.fetchall() == [(digest, 5, "base64", "binary")]
    assert one(db, named, [project.id, digest]) == 1
    abandon(db, project.id, turn)
    assert one(db, named, [project.id, digest]) == 0
    turn = begin(db, project.id)
    apply(db, project.id, [change], turn=turn)
    end(db, project.id, turn)
    assert one(db, named, [project.id, digest]) == 1


def test_a_deleted_project_takes_its_turns_along(db: Db, project: Project) -> None:
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "1", turn=turn)
    db.execute("delete from public.projects where id = %s", [project.id])
    assert (
        one(db, "select count(*) from preview.turns")
        == one(db, "select count(*) from preview.turn_changes")
        == 0
    )
    for call in (
        lambda: upsert(db, project.id, "b", "1", turn=turn),
        lambda: end(db, project.id, turn),
        lambda: begin(db, project.id),
        lambda: abandon(db, project.id, turn),
    ):
        with pytest.raises(psycopg.Error) as error:
            call()
        assert error.value.sqlstate == "PT410"


@pytest.mark.parametrize("correlation", [None, "c"])
@pytest.mark.parametrize("what", ["stage", "end"])
def test_a_turn_and_the_deletion_of_its_project_do_not_wait_in_a_circle(
    db: Db, database: str, project: Project, what: str, correlation: str | None
) -> None:
    """The deletion comes while a writer waits for its turn's row."""
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "1", turn=turn)

    def write(writer: Db) -> str | None:
        try:
            if what == "stage":
                upsert(writer, project.id, "b", "1", correlation=correlation, turn=turn)
            else:
                end(writer, project.id, turn, correlation=correlation)
        except psycopg.Error as error:
            return error.sqlstate
        return None

    with connect(database) as writer, connect(database) as deleter, ThreadPoolExecutor(2) as threads:
        with connect(database) as obstacle, obstacle.transaction():
            obstacle.execute("select from preview.turns for update")
            written = threads.submit(write, writer)
            until_waiting(db, writer)
            deletion = threads.submit(deleter.execute, b"delete from public.projects")
            until_waiting(db, deleter)
        assert written.result(30) in (None, "PT410")
        deletion.result(30)
    assert one(db, "select count(*) from preview.turns") == 0


def test_a_turn_that_is_begun_while_its_project_is_deleted_is_refused(
    db: Db, database: str, project: Project
) -> None:
    """It waits for the head, and the head is gone."""

    def start(writer: Db) -> str | None:
        try:
            begin(writer, project.id)
        except psycopg.Error as error:
            return error.sqlstate
        return None

    with connect(database) as writer, connect(database) as deleter, ThreadPoolExecutor(1) as threads:
        with deleter.transaction():
            deleter.execute("delete from public.projects where id = %s", [project.id])
            begun = threads.submit(start, writer)
            until_waiting(db, writer)
        assert begun.result(30) == "PT410"
    assert one(db, "select count(*) from preview.turns") == 0
