"""All the RPCs in any order against a model: a dict with a history, in Python.

After each step the database's current tree, its hash, its head, its history and what it broadcast are the model's;
and a follower that hears only some of the messages, in any order, has the same tree once it has caught up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.database.db import (
    Json,
    apply,
    changes_since,
    connect,
    delete,
    hash_of,
    head,
    make_project,
    messages,
    one,
    upsert,
    user,
)
from tests.profiles import NIGHTLY

PATHS = ["a", "a/b", "a/b/c", "d", "d.ts", "d/e", "Ž/é", "-"]
BAD_PATHS = ["", "/a", "a/../b", "node_modules/x", "a//b", "e\u0301"]
CONTENTS = ["", "one", "two", "žluť\n", 'quo"te\\', "x" * 500]
LIMIT = 900
"""Bytes of a message: some contents and most bulks go by reference."""

paths = st.sampled_from(PATHS)
contents = st.sampled_from(CONTENTS)


def correlations(rpc: str) -> st.SearchStrategy[str | None]:
    """Ids that are used again, each by one RPC alone: what a repeat is."""
    return st.sampled_from([None, None, None, f"{rpc} 1", f"{rpc} 2"])


expectations = st.sampled_from(["none", "none", "right", "wrong", "zero"])
change = st.one_of(
    st.fixed_dictionaries({"file_path": paths, "content": contents}, optional={"executable": st.booleans()}),
    st.fixed_dictionaries({"file_path": paths, "action": st.just("delete")}),
)
bulks = st.lists(change, max_size=5, unique_by=lambda c: str(c["file_path"]))


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class File:
    """One version, as the model has it. `content` None: a tombstone."""

    version: int
    content: str | None
    executable: bool = False


@dataclass
class Model:
    """What a project is: the current version of each path, all versions ever, how many commits."""

    current: dict[str, File] = field(default_factory=dict)
    history: dict[tuple[str, int], File] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    answered: dict[str, Json] = field(default_factory=dict)

    def there(self, path: str) -> bool:
        file = self.current.get(path)
        return file is not None and file.content is not None

    def tree(self) -> dict[str, str]:
        return {path: sha(file.content) for path, file in self.current.items() if file.content is not None}

    def version(self, path: str) -> int:
        return self.current[path].version if path in self.current else 0

    def write(self, changes: list[Json]) -> str | None:
        """Do it all, or nothing and say why: the SQLSTATE."""
        fresh: dict[str, File] = {}
        for each in changes:
            path = each["file_path"]
            was = self.current.get(path)
            if path in BAD_PATHS:
                return "PT400"
            expected = each.get("expected")
            gone = was is not None and was.content is None
            if expected is not None and expected != self.version(path) and not (expected == 0 and gone):
                return "PT409"
            content = None if each.get("action") == "delete" else each["content"]
            executable = each.get("executable")
            if executable is None:
                executable = was.executable if was is not None and not gone else False
            if content is None:
                executable = False
                if not self.there(path):
                    continue
            elif was is not None and (was.content, was.executable) == (content, executable):
                continue
            fresh[path] = File(self.version(path) + 1, content, executable)
        after = self.current | fresh
        files = [path for path, file in after.items() if file.content is not None]
        if any(b.startswith(f"{a}/") for a in files for b in files):
            return "PT409"
        if fresh:
            self.current = after
            self.history |= {(path, file.version): file for path, file in fresh.items()}
            self.commits.append(sorted(fresh))
        return None


@contextmanager
def outcome() -> Iterator[list[str | None]]:
    """The SQLSTATE that the block ended with, None when it went well."""
    said: list[str | None] = []
    try:
        yield said
    except psycopg.Error as error:
        said.append(error.sqlstate)
    else:
        said.append(None)


class Machine(RuleBasedStateMachine):
    """`dsn` is set on a subclass by the test."""

    dsn = ""

    def __init__(self) -> None:
        super().__init__()
        self.db = connect(self.dsn)
        self.model = Model()
        self.told: list[tuple[str, Json]] = []
        self.follower: dict[str, str] = {}
        self.follower_at = 0

    def teardown(self) -> None:
        self.db.close()

    @initialize()
    def a_project(self) -> None:
        self.db.execute("update preview.settings set broadcast_limit_bytes = %s", [LIMIT])
        self.project = make_project(self.db)
        self.epoch, _ = head(self.db, self.project.id)

    def expected(self, kind: str, path: str) -> int | None:
        return {"none": None, "right": self.model.version(path), "wrong": 97, "zero": 0}[kind]

    def compare(self, correlation: str | None, changes: list[Json], call: Callable[[], Json]) -> None:
        """The database's verdict is the model's; a correlation id heard before brings its first answer again."""
        before = self.model.answered.get(correlation) if correlation else None
        with outcome() as said, user(self.db, self.project.collaborator):
            answer = call()
        if any(change["file_path"] in BAD_PATHS for change in changes):
            assert said == ["PT400"]
        elif before is not None:
            assert said == [None]
            assert answer == before
        else:
            wanted = self.model.write(changes)
            assert said == [wanted]
            if wanted is None:
                assert answer["revision"] == len(self.model.commits)
                if correlation:
                    self.model.answered[correlation] = answer

    @rule(
        path=st.one_of(paths, paths, paths, st.sampled_from(BAD_PATHS)),
        content=contents,
        kind=expectations,
        correlation=correlations("upsert"),
    )
    def upsert(self, path: str, content: str, kind: str, correlation: str | None) -> None:
        expected = self.expected(kind, path)
        self.compare(
            correlation,
            [{"file_path": path, "content": content, "expected": expected}],
            lambda: upsert(
                self.db, self.project.id, path, content, expected=expected, correlation=correlation
            ),
        )

    @rule(path=paths, kind=expectations, correlation=correlations("delete"))
    def delete(self, path: str, kind: str, correlation: str | None) -> None:
        expected = self.expected(kind, path)
        if (
            path not in self.model.current
            and expected in (None, 0)
            and correlation not in self.model.answered
        ):
            with outcome() as said, user(self.db, self.project.owner):
                delete(self.db, self.project.id, path, expected=expected, correlation=correlation)
            assert said == ["PT404"]
            return
        self.compare(
            correlation,
            [{"file_path": path, "action": "delete", "expected": expected}],
            lambda: delete(self.db, self.project.id, path, expected=expected, correlation=correlation),
        )

    @rule(changes=bulks, correlation=correlations("bulk"))
    def bulk(self, changes: list[Json], correlation: str | None) -> None:
        self.compare(
            correlation,
            changes,
            lambda: apply(self.db, self.project.id, changes, correlation=correlation),
        )

    @precondition(lambda self: self.model.history)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        path, version = data.draw(st.sampled_from(sorted(self.model.history)))
        old = self.model.history[path, version]
        with outcome() as said, user(self.db, self.project.owner):
            one(self.db, "select restore_project_file(%s, %s, %s)", [self.project.id, path, version])
        if old.content is None:
            assert said == ["PT400"]
        else:
            assert said == [
                self.model.write([{"file_path": path, "content": old.content, "executable": old.executable}])
            ]

    @rule(keep=st.integers(0, 2))
    def prune(self, keep: int) -> None:
        """Old versions may go: nothing that anybody follows changes."""
        one(self.db, "select prune_project_history(%s, '0', %s)", [self.project.id, keep])
        for path in {path for path, _ in self.model.history}:
            versions = sorted(version for name, version in self.model.history if name == path)[:-1]
            for version in versions[: len(versions) - keep]:
                del self.model.history[path, version]

    @rule(data=st.data())
    def hear_some(self, data: st.DataObject) -> None:
        """A follower hears any of the messages above its place, then asks for what it missed from where it stands."""
        heard = data.draw(st.lists(st.sampled_from(self.told), max_size=4) if self.told else st.just([]))
        at = self.follower_at
        for event, payload in heard:
            if payload["revision"] != at + 1:
                continue
            changes = payload["files"] if event == "bulk:apply" else [{"action": event[5:], **payload}]
            if payload.get("complete", True):
                for each in changes:
                    self.take(each)
                at += 1
        answer = changes_since(self.db, self.project.id, self.epoch, at)
        for each in answer.get("changes", []):
            self.take(each)
        self.follower_at = answer["revision"]
        assert self.follower == self.model.tree()

    def take(self, each: Json) -> None:
        if each["action"] == "delete":
            self.follower.pop(each["file_path"], None)
        else:
            self.follower[each["file_path"]] = each["content_hash"]

    @invariant()
    def the_database_is_the_model(self) -> None:
        if not hasattr(self, "project"):
            return
        project = self.project.id
        tree = self.model.tree()
        rows = self.db.execute(
            "select file_path, content, version, executable from list_current_files(%s)", [project]
        )
        assert {path: File(version, content, run) for path, content, version, run in rows.fetchall()} == {
            path: file for path, file in self.model.current.items() if file.content is not None
        }
        assert one(self.db, "select project_tree_hash(%s)", [project]) == hash_of(tree)
        assert head(self.db, project) == (self.epoch, len(self.model.commits))
        history = self.db.execute(
            "select file_path, version, content, executable from project_files where project_id = %s",
            [project],
        ).fetchall()
        assert {
            (path, version): File(version, text, run) for path, version, text, run in history
        } == self.model.history

    @invariant()
    def what_was_said_is_what_was_done(self) -> None:
        if not hasattr(self, "project"):
            return
        self.told = messages(self.db, self.project.id)
        assert [payload["revision"] for _, payload in self.told] == list(
            range(1, len(self.model.commits) + 1)
        )
        for event, payload in self.told:
            changes = payload["files"] if event == "bulk:apply" else [payload]
            if payload.get("complete", True):
                assert [each["file_path"] for each in changes] == self.model.commits[payload["revision"] - 1]
            for each in changes:
                if each.get("content") is not None:
                    assert sha(each["content"]) == each["content_hash"]


@pytest.mark.parametrize("seed", range(2 if not NIGHTLY else 6))
def test_the_rpcs_are_the_model(database: str, seed: int) -> None:
    class Here(Machine):
        dsn = database

    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=200 if NIGHTLY else 15,
            stateful_step_count=40 if NIGHTLY else 25,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
