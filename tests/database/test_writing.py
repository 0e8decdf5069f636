"""The write path: versions, revisions, hashes, conflicts, repeats, and the message that goes with each commit."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Project,
    acting_as,
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


def sha(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def refused(error: pytest.ExceptionInfo[psycopg.Error], sqlstate: str, names: str) -> dict[str, Any]:
    """The refusal has this SQLSTATE and names the argument; its detail, read."""
    assert error.value.sqlstate == sqlstate
    assert names in (error.value.diag.message_primary or "")
    detail = error.value.diag.message_detail
    return json.loads(detail) if detail else {}


def test_an_upsert_makes_the_next_version_and_the_next_revision(db: Db, project: Project) -> None:
    with user(db, project.owner):
        first = upsert(db, project.id, "src/App.tsx", "one")
        second = upsert(db, project.id, "src/App.tsx", "two", file_type="tsx")
    assert (first["version"], first["revision"], first["changed"]) == (1, 1, True)
    assert (second["version"], second["revision"], second["file_type"]) == (2, 2, "tsx")
    assert second["content_hash"] == sha("two")
    rows = db.execute(
        "select version, is_current_version, content, content_hash, size_bytes, created_by, parent_version_id::text"
        " from project_files order by version"
    ).fetchall()
    assert rows == [
        (1, False, "one", sha("one"), 3, project.owner, None),
        (2, True, "two", sha("two"), 3, project.owner, first["id"]),
    ]


def test_the_file_type_is_kept_or_told_by_the_name(db: Db, project: Project) -> None:
    assert upsert(db, project.id, "a.md", "1")["file_type"] == "markdown"
    assert upsert(db, project.id, "a.md", "2", file_type="prose")["file_type"] == "prose"
    assert upsert(db, project.id, "a.md", "3")["file_type"] == "prose"
    assert upsert(db, project.id, "a.md", "3", file_type="other") | {"changed": False} == upsert(
        db, project.id, "a.md", "3"
    )


def test_the_same_content_changes_nothing(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "same")
    again = upsert(db, project.id, "a", "same")
    assert (again["version"], again["changed"]) == (1, False)
    assert head(db, project.id)[1] == 1
    assert len(messages(db, project.id)) == 1


def test_a_delete_is_a_version_and_writing_again_goes_on_from_it(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "x")
    gone = delete(db, project.id, "a")
    assert (gone["version"], gone["revision"], gone["is_deleted"], gone["content_hash"]) == (2, 2, True, None)
    assert delete(db, project.id, "a")["changed"] is False
    assert files(db, project.id) == {}
    back = upsert(db, project.id, "a", "x")
    assert (back["version"], back["revision"], back["changed"]) == (3, 3, True)


def test_the_current_head_answers_a_conflict(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    upsert(db, project.id, "a", "2")
    with pytest.raises(psycopg.Error) as error:
        upsert(db, project.id, "a", "3", expected=1)
    epoch, revision = head(db, project.id)
    assert refused(error, "PT409", "expected_version") == {
        "file_path": "a",
        "version": 2,
        "content_hash": sha("2"),
        "is_deleted": False,
        "revision": revision,
        "epoch": epoch,
    }
    assert revision == 2
    assert upsert(db, project.id, "a", "3", expected=2)["version"] == 3


def test_expecting_nothing_means_it_must_not_be_there(db: Db, project: Project) -> None:
    assert upsert(db, project.id, "a", "1", expected=0)["version"] == 1
    with pytest.raises(psycopg.Error, match="expected_version 0: a is at version 1"):
        upsert(db, project.id, "a", "2", expected=0)
    delete(db, project.id, "a", expected=1)
    with pytest.raises(psycopg.Error, match="expected_version 1: a is at version 2"):
        upsert(db, project.id, "a", "2", expected=1)
    assert upsert(db, project.id, "a", "2", expected=0)["version"] == 3
    with pytest.raises(psycopg.Error, match="expected_version 7: b is at version 0"):
        delete(db, project.id, "b", expected=7)


def test_a_correlation_id_is_answered_once_and_then_again(db: Db, project: Project) -> None:
    first = upsert(db, project.id, "a", "1", correlation="save-1")
    upsert(db, project.id, "a", "2")
    assert upsert(db, project.id, "a", "1", correlation="save-1") == first
    assert files(db, project.id) == {"a": sha("2")}
    bulk = apply(db, project.id, [{"file_path": "b", "content": "b"}], correlation="bulk-1")
    delete(db, project.id, "b")
    assert apply(db, project.id, [{"file_path": "b", "content": "b"}], correlation="bulk-1") == bulk
    quiet = upsert(db, project.id, "a", "2", correlation="save-2")
    assert quiet["changed"] is False
    upsert(db, project.id, "a", "3")
    assert upsert(db, project.id, "a", "2", correlation="save-2") == quiet


def test_a_bulk_is_one_revision_one_message_all_or_nothing(db: Db, project: Project) -> None:
    upsert(db, project.id, "old", "x")
    upsert(db, project.id, "same", "s")
    answer = apply(
        db,
        project.id,
        [
            {"file_path": "a", "content": "A", "content_hash": sha("A")},
            {"action": "delete", "file_path": "old"},
            {"action": "update", "file_path": "same", "content": "s"},
            {"action": "delete", "file_path": "never"},
            {"file_path": "run.sh", "content": "#!", "executable": True},
        ],
    )
    assert (answer["revision"], answer["changed"]) == (3, 3)
    assert [(f["file_path"], f["changed"]) for f in answer["files"]] == [
        ("a", True),
        ("never", False),
        ("old", True),
        ("run.sh", True),
        ("same", False),
    ]
    event, payload = messages(db, project.id)[-1]
    assert event == "bulk:apply"
    assert payload["files"] == [
        {
            "action": "update",
            "file_path": "a",
            "content": "A",
            "content_hash": sha("A"),
            "version": 1,
            "encoding": "utf-8",
        },
        {"action": "delete", "file_path": "old", "version": 2},
        {
            "action": "update",
            "file_path": "run.sh",
            "content": "#!",
            "content_hash": sha("#!"),
            "version": 1,
            "encoding": "utf-8",
            "executable": True,
        },
    ]
    before = files(db, project.id), head(db, project.id), messages(db, project.id)
    with pytest.raises(psycopg.Error) as error:
        apply(
            db,
            project.id,
            [{"file_path": "n", "content": "n"}, {"file_path": "a", "content": "", "expected_version": 9}],
        )
    refused(error, "PT409", "expected_version")
    assert (files(db, project.id), head(db, project.id), messages(db, project.id)) == before
    assert apply(db, project.id, [])["changed"] == 0


def test_the_executable_bit_is_kept_and_can_be_turned(db: Db, project: Project) -> None:
    apply(db, project.id, [{"file_path": "run", "content": "1", "executable": True}])
    assert upsert(db, project.id, "run", "2")["executable"] is True
    assert messages(db, project.id)[-1][1]["executable"] is True
    off = apply(db, project.id, [{"file_path": "run", "content": "2", "executable": False}])
    assert (off["changed"], off["files"][0]["version"]) == (1, 3)
    delete(db, project.id, "run")
    assert upsert(db, project.id, "run", "3")["executable"] is False


def test_messages_have_the_protocols_fields(db: Db, project: Project) -> None:
    with user(db, project.collaborator):
        upsert(db, project.id, "src/é.ts", "žluť")
        delete(db, project.id, "src/é.ts")
    with acting_as(db, "service_role"):
        apply(db, project.id, [{"file_path": "a", "content": ""}])
    epoch, _ = head(db, project.id)
    (update_event, update), (delete_event, deleted), (bulk_event, bulk) = messages(db, project.id)
    assert [update_event, delete_event, bulk_event] == ["file:update", "file:delete", "bulk:apply"]
    stamps = [datetime.fromisoformat(message.pop("timestamp")) for message in (update, deleted, bulk)]
    assert all(stamp.tzinfo is not None for stamp in stamps)
    assert stamps == sorted(stamps)
    assert all(message.pop("id") for message in (update, deleted, bulk))
    assert update == {
        "file_path": "src/é.ts",
        "content": "žluť",
        "content_hash": sha("žluť"),
        "version": 1,
        "sender": str(project.collaborator),
        "revision": 1,
        "epoch": epoch,
        "file_type": "typescript",
        "size": 6,
        "encoding": "utf-8",
    }
    assert deleted == {
        "file_path": "src/é.ts",
        "version": 2,
        "sender": str(project.collaborator),
        "revision": 2,
        "epoch": epoch,
    }
    empty: dict[str, Any] = {
        "action": "update",
        "file_path": "a",
        "content": "",
        "content_hash": sha(""),
        "version": 1,
    }
    assert bulk == {
        "files": [empty | {"encoding": "utf-8"}],
        "sender": "service_role",
        "revision": 3,
        "epoch": epoch,
    }


@pytest.mark.parametrize("letter", ["x", '"', "ž"])
def test_a_message_above_the_limit_goes_by_reference(db: Db, project: Project, letter: str) -> None:
    db.execute("update preview.settings set broadcast_limit_bytes = 3000")
    for size in (2_000, 3_100):
        upsert(db, project.id, "a", letter * size)
    small, large = (payload for _, payload in messages(db, project.id))
    assert small["content"] == (letter * 2_000 if letter == "x" else None)
    assert large["content"] is None
    assert large["content_hash"] == sha(letter * 3_100)
    assert large["size"] == len(letter.encode()) * 3_100


def test_a_bulk_above_the_limit_is_references_and_then_a_doorbell(db: Db, project: Project) -> None:
    db.execute("update preview.settings set broadcast_limit_bytes = 5000")
    apply(
        db, project.id, [{"file_path": "big", "content": "x" * 6000}, {"file_path": "small", "content": "s"}]
    )
    payload = messages(db, project.id)[-1][1]
    assert [(f["file_path"], f["content"], f["content_hash"]) for f in payload["files"]] == [
        ("big", None, sha("x" * 6000)),
        ("small", None, sha("s")),
    ]
    assert "complete" not in payload
    apply(db, project.id, [{"file_path": f"f/{i}", "content": f"{i}"} for i in range(100)])
    payload = messages(db, project.id)[-1][1]
    assert (payload["files"], payload["complete"], payload["revision"]) == ([], False, 2)
    assert len(changes_since(db, project.id, head(db, project.id)[0], 1)["changes"]) == 100


def test_three_megabytes_of_text(db: Db, project: Project) -> None:
    text = "žluťoučký kůň\n" * 160_000
    assert len(text.encode()) > 3_000_000
    answer = upsert(db, project.id, "big.txt", text)
    assert answer["size_bytes"] == len(text.encode())
    assert answer["content_hash"] == sha(text)
    assert one(db, "select content from list_current_files(%s)", [project.id]) == text
    assert messages(db, project.id)[-1][1]["content"] is None


def test_five_thousand_files_at_once_and_not_one_more(db: Db, project: Project) -> None:
    answer = apply(db, project.id, [{"file_path": f"d{i % 50}/f{i}", "content": str(i)} for i in range(5000)])
    assert (answer["changed"], answer["revision"]) == (5000, 1)
    with pytest.raises(psycopg.Error) as error:
        apply(db, project.id, [{"file_path": f"f{i}", "content": ""} for i in range(5001)])
    refused(error, "PT413", "changes")


def test_a_binary_file_is_its_hash_and_an_object(db: Db, project: Project) -> None:
    pixel = bytes(range(256))
    change = {"file_path": "logo.png", "content": None, "content_hash": sha(pixel), "encoding": "base64"}
    with pytest.raises(psycopg.Error) as error:
        apply(db, project.id, [change])
    refused(error, "PT400", "project-assets")
    db.execute(
        "insert into storage.objects (bucket_id, name, metadata) values ('project-assets', %s, %s)",
        [f"{project.id}/{sha(pixel)}", json.dumps({"size": 256, "mimetype": "image/png"})],
    )
    answer = apply(db, project.id, [change])
    assert answer["files"][0]["size_bytes"] == 256
    assert apply(db, project.id, [change])["changed"] == 0
    reference: dict[str, Any] = {
        "action": "update",
        "file_path": "logo.png",
        "content": None,
        "content_hash": sha(pixel),
    }
    reference |= {"version": 1, "encoding": "base64"}
    assert messages(db, project.id)[-1][1]["files"] == [reference]
    assert changes_since(db, project.id, head(db, project.id)[0], 0)["changes"] == [reference]
    assert upsert(db, project.id, "logo.png", "text now")["version"] == 2
    assert answer["files"][0]["file_type"] == "binary"
    back = one(db, "select restore_project_file(%s, 'logo.png', 1)", [project.id])
    assert back["file_type"] == "binary"
    delete(db, project.id, "logo.png")
    assert upsert(db, project.id, "logo.png", "text again")["file_type"] == "text"
    assert (back["version"], back["content_hash"], back["size_bytes"]) == (3, sha(pixel), 256)


def test_a_lost_broadcast_leaves_the_write_and_the_revision(db: Db, project: Project) -> None:
    notices: list[str] = []
    db.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    db.execute("alter table realtime.messages add constraint full_up check (payload->>'file_path' <> 'a')")
    try:
        assert upsert(db, project.id, "a", "1")["revision"] == 1
    finally:
        db.execute("alter table realtime.messages drop constraint full_up")
    assert any("ErrorSendingBroadcastMessage" in notice for notice in notices)
    assert messages(db, project.id) == []
    assert upsert(db, project.id, "b", "2")["revision"] == 2
    answer = changes_since(db, project.id, head(db, project.id)[0], 0)
    assert [change["file_path"] for change in answer["changes"]] == ["a", "b"]


def test_what_is_rolled_back_was_never_said(db: Db, project: Project) -> None:
    with db.transaction(force_rollback=True):
        upsert(db, project.id, "a", "1")
        assert len(messages(db, project.id)) == 1
    assert messages(db, project.id) == []
    assert upsert(db, project.id, "b", "2")["revision"] == 1


def test_notifications_arrive_in_the_order_of_commits(db: Db, database: str, project: Project) -> None:
    with connect(database) as listener:
        listener.execute("listen realtime_messages")
        for i in range(5):
            upsert(db, project.id, "a", str(i))
        heard = [n.payload for n in listener.notifies(timeout=30, stop_after=5)]
    said = [payload["id"] for _, payload in messages(db, project.id)]
    assert heard == said


def test_the_tree_hash_is_the_agents(db: Db, project: Project) -> None:
    assert one(db, "select project_tree_hash(%s)", [project.id]) == hash_of({})
    for path in ("b", "a/z", "a.txt", "ž", "Z", "a-b"):
        upsert(db, project.id, path, path)
    delete(db, project.id, "b")
    assert one(db, "select project_tree_hash(%s)", [project.id]) == hash_of(files(db, project.id))


def test_too_many_writes_in_a_minute_wait(db: Db, project: Project) -> None:
    db.execute("update preview.settings set writes_per_minute = 1")

    def write_three() -> None:  # at least two of the three fall into one minute
        for i in range(3):
            upsert(db, project.id, "a", f"{i}")

    with pytest.raises(psycopg.Error) as error:
        write_three()
    detail = refused(error, "PT429", "project_uuid")
    assert 0 < detail["retry_after"] <= 60
    revision = head(db, project.id)[1]
    assert revision in (1, 2)
    db.execute("update project_heads set window_start = window_start - interval '1 minute'")
    assert upsert(db, project.id, "a", "a minute later")["revision"] == revision + 1
