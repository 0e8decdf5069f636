"""A correlation id is one request's: asked again it is answered again, for a day."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Project,
    apply,
    begin,
    delete,
    end,
    files,
    head,
    make_project,
    one,
    upsert,
)
from tests.database.test_writing import refused, sha

Db = psycopg.Connection[Any]


def test_a_correlation_id_is_one_request_s(db: Db, project: Project) -> None:
    first = upsert(db, project.id, "a", "1", correlation="c")
    for other in (
        lambda: upsert(db, project.id, "a", "2", correlation="c"),
        lambda: upsert(db, project.id, "b", "1", correlation="c"),
        lambda: upsert(db, project.id, "a", "1", expected=1, correlation="c"),
        lambda: delete(db, project.id, "a", correlation="c"),
        lambda: apply(db, project.id, [{"file_path": "a", "content": "1"}], correlation="c"),
        lambda: upsert(db, project.id, "a", "1", correlation="c", turn=begin(db, project.id)),
    ):
        with pytest.raises(psycopg.Error) as error:
            other()
        refused(error, "PT422", 'p_correlation_id "c"')
    assert upsert(db, project.id, "a", "1", correlation="c") == first
    assert (files(db, project.id), head(db, project.id)[1]) == ({"a": sha("1")}, 1)
    assert upsert(db, make_project(db).id, "a", "other project", correlation="c")["revision"] == 1


def test_a_staged_write_is_answered_again_even_when_its_turn_is_over(db: Db, project: Project) -> None:
    turn = begin(db, project.id)
    first = upsert(db, project.id, "a", "1", correlation="c", turn=turn)
    upsert(db, project.id, "a", "2", turn=turn)
    assert upsert(db, project.id, "a", "1", correlation="c", turn=turn) == first
    end(db, project.id, turn)
    assert upsert(db, project.id, "a", "1", correlation="c", turn=turn) == first
    assert files(db, project.id) == {"a": sha("2")}


def test_answers_expire_by_themselves_and_are_counted(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1", correlation="old")
    db.execute("update preview.answers set created_at = created_at - interval '25 hours'")
    assert upsert(db, project.id, "a", "2", correlation="old")["version"] == 2, (
        "forgotten, so it is a new request"
    )
    for n in range(5):
        upsert(db, project.id, "a", "2", correlation=f"n{n}")
    db.execute("update preview.answers set created_at = created_at - interval '25 hours'")
    for n in range(4):
        upsert(db, project.id, "a", "2", correlation=f"m{n}")
    assert one(db, "select count(*) from preview.answers") == 4
    assert head(db, project.id)[1] == 2
    db.execute("update preview.settings set writes_per_minute = 1")

    def quiet() -> None:
        for n in range(3):
            upsert(db, project.id, "a", "2", correlation=f"q{n}")

    with pytest.raises(psycopg.Error) as error:
        quiet()
    refused(error, "PT429", "project_uuid")


def test_an_answer_from_before_there_were_hashes_is_given_again(db: Db, project: Project) -> None:
    first = upsert(db, project.id, "a", "1", correlation="c")
    db.execute("update preview.answers set request = null")
    assert upsert(db, project.id, "a", "1", correlation="c") == first
