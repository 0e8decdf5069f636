"""A writer's `traceparent` goes with the event, whichever way it was given; nothing else that looks like one does."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from tests.database.db import Project, apply, delete, messages, upsert, user

Db = psycopg.Connection[Any]

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"


def said(db: Db, project: Project, **given: str) -> list[str | None]:
    """What three saves with these settings, one of each form, told of their trace."""
    before = len(messages(db, project.id))
    with user(db, project.owner):
        for name, value in given.items():
            db.execute("select set_config(%s, %s, true)", [name.replace("__", "."), value])
        upsert(db, project.id, "a", f"{before}")
        delete(db, project.id, "a")
        change = {"action": "update", "file_path": "b", "content": f"{before}"}
        apply(db, project.id, [change])
    return [payload.get("traceparent") for _, payload in messages(db, project.id)[before:]]


def test_it_is_in_every_form_of_event(db: Db, project: Project) -> None:
    headers = json.dumps({"accept": "*/*", "traceparent": TRACE, "x": "y"})
    assert said(db, project, request__headers=headers) == [TRACE] * 3
    assert said(db, project, request__headers=headers.replace(": ", ":")) == [TRACE] * 3
    assert (
        said(db, project, preview__traceparent=TRACE, request__headers=headers.replace(TRACE, OTHER))
        == [TRACE] * 3
    )


def test_without_one_the_message_is_what_it_was(db: Db, project: Project) -> None:
    assert said(db, project) == [None] * 3
    assert all("traceparent" not in payload for _, payload in messages(db, project.id))


@pytest.mark.parametrize(
    "headers",
    [
        "", "null", "not json", '{"traceparent": ', json.dumps({"traceparent": TRACE[:-1]}),
        json.dumps({"traceparent": TRACE.upper()}), json.dumps({"traceparent": f"{TRACE}-more"}),
        json.dumps({"traceparent": f"00-{'0' * 32}-00f067aa0ba902b7-01"}),
        json.dumps({"traceparent": f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01"}),
        json.dumps({"x": f'"traceparent": "{TRACE}"'}), json.dumps({"x-traceparent": TRACE}),
    ],
)  # fmt: skip
def test_a_header_that_is_none_is_no_header_and_the_save_stands(
    db: Db, project: Project, headers: str
) -> None:
    assert said(db, project, request__headers=headers) == [None] * 3
