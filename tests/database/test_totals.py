"""A project's files are counted with each commit, and no commit makes it larger than its readers take."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator_stub.platform.migrations import MIGRATIONS, migrate, read_migrations
from tests.database.db import (
    Json,
    Project,
    abandon,
    apply,
    begin,
    connect,
    delete,
    end,
    head,
    make_project,
    one,
    upsert,
    user,
)
from tests.profiles import examples

Db = psycopg.Connection[Any]
Tree = dict[str, int]
"""Bytes of each current file."""
Changes = Mapping[str, int | str | None]
"""Bytes of a text, the hash of an asset, or None for a deletion."""

LIMITS = (4, 100, 20)
"""Files, bytes, bytes of paths."""
PATHS = ["a", "b", "c/1", "d", "é/lang", "p" * 14]
ASSETS = {hashlib.sha256(bytes([size])).hexdigest(): size for size in (5, 70)}

TOTALS = (
    "select (select row(files, bytes, path_bytes)::text from preview.project_totals where project_id = %s)"
)
COUNTED = "select preview.counted(%s)::text"

paths = st.sampled_from(PATHS)
changes = st.dictionaries(paths, st.sampled_from([None, 0, 3, 40, *ASSETS]), min_size=1)
steps = st.one_of(
    st.tuples(st.just("upsert"), paths, st.sampled_from([0, 3, 40, 101])),
    st.tuples(st.just("delete"), paths),
    st.tuples(st.just("bulk"), changes),
    st.tuples(st.just("rename"), paths, paths),
    st.tuples(st.just("restore"), paths),
    st.tuples(st.just("stage"), changes),
    st.tuples(st.sampled_from(["end", "abandon", "forget"])),
)


def set_limits(db: Db, files: int, size: int = 2**30, path_bytes: int = 2**23) -> None:
    db.execute(
        "update preview.settings set writes_per_minute = 1000000, turns_per_minute = 1000000,"
        " max_project_files = %s, max_project_bytes = %s, max_project_path_bytes = %s",
        [files, size, path_bytes],
    )


def totals(tree: Tree) -> tuple[int, int, int]:
    return len(tree), sum(tree.values()), sum(len(path.encode()) for path in tree)


def changed(tree: Tree, changes: Changes) -> Tree:
    sizes = {path: ASSETS[it] if isinstance(it, str) else it for path, it in changes.items()}
    return {path: size for path, size in {**tree, **sizes}.items() if size is not None}


def entries(changes: Changes) -> list[Json]:
    return [
        {"action": "delete", "file_path": path} if it is None
        else {"file_path": path, "encoding": "base64", "content_hash": it} if isinstance(it, str)
        else {"file_path": path, "content": "x" * it}
        for path, it in changes.items()
    ]  # fmt: skip


def is_too_large(before: Tree, after: Tree) -> bool:
    of = zip(totals(before), totals(after), LIMITS, strict=True)
    return any(now > most and now > was for was, now, most in of)


def refusal(call: Callable[[], object]) -> psycopg.Error | None:
    try:
        call()
    except psycopg.Error as error:
        return error
    return None


class Model:
    """What the project has to be, and the calls that are to make it so."""

    def __init__(self, db: Db) -> None:
        self.db = db
        self.id = make_project(db).id
        for digest, size in ASSETS.items():
            db.execute(
                "insert into storage.objects (bucket_id, name, metadata) values ('project-assets', %s, %s)",
                [f"{self.id}/{digest}", json.dumps({"size": size})],
            )
        self.tree: Tree = {}
        self.first: Tree = {}
        self.turn: str | None = None
        self.staged: Changes = {}

    def commit(self, after: Tree, call: Callable[[], object]) -> bool:
        """Whether it was taken, as the model says."""
        error = refusal(call)
        assert (error and error.sqlstate) == ("PT413" if is_too_large(self.tree, after) else None)
        if error is None:
            self.tree = after
            self.first = {**after, **self.first}
        return error is None

    def upsert(self, path: str, size: int) -> None:
        self.commit({**self.tree, path: size}, lambda: upsert(self.db, self.id, path, "x" * size))

    def delete(self, path: str) -> None:
        if path in self.first:
            self.commit(changed(self.tree, {path: None}), lambda: delete(self.db, self.id, path))

    def bulk(self, changes: Changes) -> None:
        self.commit(changed(self.tree, changes), lambda: apply(self.db, self.id, entries(changes)))

    def rename(self, old: str, new: str) -> None:
        if old in self.tree and new not in self.tree:
            after = changed({**self.tree, new: self.tree[old]}, {old: None})
            self.commit(
                after, lambda: one(self.db, "select rename_project_file(%s, %s, %s)", [self.id, old, new])
            )

    def restore(self, path: str) -> None:
        if path in self.first:
            after = {**self.tree, path: self.first[path]}
            self.commit(
                after, lambda: one(self.db, "select restore_project_file(%s, %s, 1)", [self.id, path])
            )

    def stage(self, changes: Changes) -> None:
        turn = self.turn = self.turn or begin(self.db, self.id)
        staged = {**self.staged, **changes}
        grows = any(it is not None for it in changes.values())
        refused = grows and is_too_large(self.tree, changed(self.tree, staged))
        error = refusal(lambda: apply(self.db, self.id, entries(changes), turn=turn))
        assert (error and error.sqlstate) == ("PT413" if refused else None)
        self.staged = self.staged if refused else staged

    def end(self) -> None:
        turn = self.turn
        if turn and self.commit(
            changed(self.tree, self.staged), lambda: end(self.db, self.id, turn, force=True)
        ):
            self.turn, self.staged = None, {}

    def abandon(self) -> None:
        if self.turn:
            abandon(self.db, self.id, self.turn)
            self.turn, self.staged = None, {}

    def forget(self) -> None:
        """As a project of before the migration: it is counted with its next commit."""
        self.db.execute("delete from preview.project_totals where project_id = %s", [self.id])


@settings(examples(40, 400), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(steps, max_size=20))
def test_whatever_is_written_is_counted_and_bounded(db: Db, steps: list[tuple[Any, ...]]) -> None:
    set_limits(db, *LIMITS)
    model = Model(db)
    for name, *arguments in steps:
        getattr(model, name)(*arguments)
        exact = "({},{},{})".format(*totals(model.tree))
        assert one(db, COUNTED, [model.id]) == exact
        assert one(db, TOTALS, [model.id]) in (exact, None)


def fill(db: Db, project: Project, count: int, size: int = 1) -> None:
    apply(db, project.id, entries({f"f{n}": size for n in range(count)}))


def test_the_refusal_says_the_limit_what_it_would_be_and_what_helps(db: Db, project: Project) -> None:
    set_limits(db, 5)
    fill(db, project, 5)
    with user(db, project.owner):
        error = refusal(lambda: upsert(db, project.id, "one/more", "1"))
    assert error is not None
    assert error.sqlstate == "PT413"
    assert (
        error.diag.message_primary
        == f"project_uuid {project.id}: the project would have 6 files, at most 5 are taken"
    )
    assert json.loads(error.diag.message_detail or "") == {"limit": "project.files", "most": 5, "would_be": 6}
    assert "Delete files first" in (error.diag.message_hint or "")
    assert head(db, project.id)[1] == 1


def test_a_project_that_is_too_large_already_shrinks_and_is_edited(db: Db, project: Project) -> None:
    fill(db, project, 6, 40)
    db.execute("delete from preview.project_totals")
    set_limits(db, 3, 100)
    assert refusal(lambda: upsert(db, project.id, "more", "")) is not None
    assert refusal(lambda: upsert(db, project.id, "f0", "x" * 41)) is not None
    upsert(db, project.id, "f0", "y" * 40)
    upsert(db, project.id, "f1", "less")
    one(db, "select rename_project_file(%s, 'f1', 'g1')", [project.id])
    turn = begin(db, project.id)
    delete(db, project.id, "f2", turn=turn)
    upsert(db, project.id, "f3", "y" * 40, turn=turn)
    error = refusal(lambda: upsert(db, project.id, "more", "x" * 90, turn=turn))
    assert error is not None
    assert json.loads(error.diag.message_detail or "")["turn_id"] == turn
    end(db, project.id, turn)
    delete(db, project.id, "f4")
    assert one(db, TOTALS, [project.id]) == one(db, COUNTED, [project.id]) == "(4,124,8)"


def test_writers_at_once_fill_it_to_the_last_file_and_not_further(
    db: Db, database: str, project: Project
) -> None:
    set_limits(db, 40)
    db.execute("update preview.settings set max_open_turns = 100")
    start = threading.Barrier(8)
    taken: list[int] = []

    def write(number: int) -> None:
        with connect(database) as own:
            start.wait()
            for n in range(10):
                in_turn = begin(own, project.id) if n % 3 == number % 3 else None
                if refusal(lambda: upsert(own, project.id, f"{number}/{n}", "x" * n, turn=in_turn)):  # noqa: B023
                    continue
                if in_turn is None or refusal(lambda: end(own, project.id, in_turn)) is None:  # noqa: B023
                    taken.append(n)

    writers = [threading.Thread(target=write, args=[number]) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(taken) == 40
    expected = f"(40,{sum(taken)},{40 * 3})"
    assert one(db, TOTALS, [project.id]) == one(db, COUNTED, [project.id]) == expected


def test_the_end_of_a_turn_is_refused_where_others_took_the_room_and_goes_on_after_a_deletion(
    db: Db, project: Project
) -> None:
    set_limits(db, 5)
    fill(db, project, 3)
    turn = begin(db, project.id)
    upsert(db, project.id, "mine/1", "", turn=turn)
    upsert(db, project.id, "mine/2", "", turn=turn)
    upsert(db, project.id, "other", "")
    error = refusal(lambda: end(db, project.id, turn))
    assert error is not None
    assert error.sqlstate == "PT413"
    delete(db, project.id, "f0", turn=turn)
    assert end(db, project.id, turn)["changed"] == 3
    assert one(db, TOTALS, [project.id]) == one(db, COUNTED, [project.id])


@pytest.mark.parametrize("size", [0, 7])
def test_a_project_from_before_is_counted_with_its_next_save(blank: str, size: int) -> None:
    versions = [migration.version for migration in read_migrations(MIGRATIONS)]
    asyncio.run(migrate(blank, only=versions.index("20261207000000")))
    with connect(blank) as db:
        project = make_project(db)
        fill(db, project, 3, size)
        delete(db, project.id, "f2")
        asyncio.run(migrate(blank))
        assert one(db, TOTALS, [project.id]) is None
        set_limits(db, 2)
        assert refusal(lambda: upsert(db, project.id, "new", "12")) is not None
        upsert(db, project.id, "f1", "12345")
        assert one(db, TOTALS, [project.id]) == f"(2,{size + 5},4)"
