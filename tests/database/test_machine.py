"""All the RPCs in any order against a model: a dict with a history, in Python.

After each step the database's current tree, its hash, its head, its history and what it broadcast are the model's;
and a follower that hears only some of the messages, in any order, has the same tree once it has caught up.
"""

from __future__ import annotations

import hashlib
import json
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
    abandon,
    apply,
    begin,
    changes_since,
    connect,
    delete,
    end,
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
    labels: dict[int, str] = field(default_factory=dict)
    answered: dict[str, tuple[str, Json]] = field(default_factory=dict)

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


@dataclass
class Turn:
    """What an open turn will do: the changes of its writers, folded; and what each file was when first written."""

    id: str
    label: str
    folded: dict[str, Json] = field(default_factory=dict)
    bases: dict[str, int] = field(default_factory=dict)

    def files(self) -> list[str]:
        return [path for path, change in self.folded.items() if change.get("action") != "delete"]

    def stage(self, model: Model, changes: list[Json]) -> str | None:
        folded, bases = dict(self.folded), dict(self.bases)
        for each in changes:
            path, expected = each["file_path"], each.get("expected")
            gone = path in model.current and not model.there(path)
            if expected is not None and expected != model.version(path) and not (expected == 0 and gone):
                return "PT409"
            if path not in bases or expected is not None:
                bases[path] = model.version(path) if model.there(path) else 0
            before = folded.get(path, {})
            folded[path] = {key: value for key, value in each.items() if key != "expected"}
            if each.get("action") != "delete" and each.get("executable") is None:
                folded[path]["executable"] = (
                    False if before.get("action") == "delete" else before.get("executable")
                )
        files = [path for path, change in folded.items() if change.get("action") != "delete"]
        if any(b.startswith(f"{a}/") for a in files for b in files):
            return "PT409"
        self.folded, self.bases = folded, bases
        return None

    def moved(self, model: Model) -> list[str]:
        now = {path: model.version(path) if model.there(path) else 0 for path in self.bases}
        return sorted((path for path in self.bases if now[path] != self.bases[path]), key=str.encode)

    def tree(self, model: Model) -> dict[str, str]:
        written = {path: sha(self.folded[path]["content"]) for path in self.files()}
        return {path: digest for path, digest in model.tree().items() if path not in self.folded} | written


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
        self.turns: list[Turn] = []
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
        self.begin_one("from the start")

    def expected(self, kind: str, path: str) -> int | None:
        return {"none": None, "right": self.model.version(path), "wrong": 97, "zero": 0}[kind]

    def compare(
        self, kind: str, correlation: str | None, changes: list[Json], call: Callable[[], Json]
    ) -> None:
        """The database's verdict is the model's; a correlation id heard before brings its first answer again."""
        before = self.model.answered.get(correlation) if correlation else None
        request = json.dumps([kind, changes], sort_keys=True)
        with outcome() as said, user(self.db, self.project.collaborator):
            answer = call()
        if any(change["file_path"] in BAD_PATHS for change in changes):
            assert said == ["PT400"]
        elif before is not None:
            assert said == [None if request == before[0] else "PT422"]
            assert request != before[0] or answer == before[1]
        else:
            wanted = self.model.write(changes)
            assert said == [wanted]
            if wanted is None:
                assert answer["revision"] == len(self.model.commits)
                if correlation:
                    self.model.answered[correlation] = request, answer

    @rule(
        path=st.one_of(paths, paths, paths, st.sampled_from(BAD_PATHS)),
        content=contents,
        kind=expectations,
        correlation=correlations("upsert"),
    )
    def upsert(self, path: str, content: str, kind: str, correlation: str | None) -> None:
        expected = self.expected(kind, path)
        self.compare(
            "upsert",
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
            "delete",
            correlation,
            [{"file_path": path, "action": "delete", "expected": expected}],
            lambda: delete(self.db, self.project.id, path, expected=expected, correlation=correlation),
        )

    @rule(changes=bulks, correlation=correlations("bulk"))
    def bulk(self, changes: list[Json], correlation: str | None) -> None:
        self.compare(
            "bulk",
            correlation,
            changes,
            lambda: apply(self.db, self.project.id, changes, correlation=correlation),
        )

    @precondition(lambda self: len(self.turns) < 2)
    @rule(label=st.sampled_from(["a landing page", "ž"]))
    def begin(self, label: str) -> None:
        self.begin_one(label)

    def begin_one(self, label: str) -> None:
        with user(self.db, self.project.collaborator):
            self.turns.append(Turn(begin(self.db, self.project.id, label), label))

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), each=change.filter(lambda c: "executable" not in c), kind=expectations)
    def stage_one(self, data: st.DataObject, each: Json, kind: str) -> None:
        """Nothing that anybody follows changes; what the turn's writers see is looked at by an invariant."""
        turn = data.draw(st.sampled_from(self.turns))
        path = each["file_path"]
        expected = self.expected(kind, path)
        never = path not in self.model.current and path not in turn.folded
        with outcome() as said, user(self.db, self.project.owner):
            if each.get("action") == "delete":
                delete(self.db, self.project.id, path, expected=expected, turn=turn.id)
            else:
                upsert(self.db, self.project.id, path, each["content"], expected=expected, turn=turn.id)
        if each.get("action") == "delete" and never and expected in (None, 0):
            assert said == ["PT404"]
        else:
            assert said == [turn.stage(self.model, [each | {"expected": expected}])]

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), changes=bulks, kind=expectations)
    def stage_many(self, data: st.DataObject, changes: list[Json], kind: str) -> None:
        turn = data.draw(st.sampled_from(self.turns))
        expected = [self.expected(kind, each["file_path"]) for each in changes]
        sent = [each | {"expected_version": version} for each, version in zip(changes, expected, strict=True)]
        wanted = [each | {"expected": version} for each, version in zip(changes, expected, strict=True)]
        with outcome() as said, user(self.db, self.project.owner):
            apply(self.db, self.project.id, sent, turn=turn.id)
        assert said == [turn.stage(self.model, wanted)]

    @precondition(lambda self: self.turns)
    @rule(data=st.data(), force=st.booleans())
    def end(self, data: st.DataObject, force: bool) -> None:
        turn = data.draw(st.sampled_from(self.turns))
        moved = [] if force else turn.moved(self.model)
        commits = len(self.model.commits)
        if moved or self.model.write(list(turn.folded.values())) == "PT409":
            with pytest.raises(psycopg.Error) as error, user(self.db, self.project.owner):
                end(self.db, self.project.id, turn.id, force=force)
            assert error.value.sqlstate == "PT409"
            told = json.loads(error.value.diag.message_detail or "{}").get("conflicts", [])
            assert [conflict["file_path"] for conflict in told] == moved
            return
        with user(self.db, self.project.owner):
            answer = end(self.db, self.project.id, turn.id, force=force)
        assert answer["revision"] == len(self.model.commits)
        assert end(self.db, self.project.id, turn.id, force=not force) == answer
        self.turns.remove(turn)
        if len(self.model.commits) > commits:
            self.model.labels[len(self.model.commits)] = turn.label

    @precondition(lambda self: len(self.turns) > 1)
    @rule(data=st.data())
    def abandon(self, data: st.DataObject) -> None:
        turn = data.draw(st.sampled_from(self.turns))
        abandon(self.db, self.project.id, turn.id)
        self.turns.remove(turn)
        with outcome() as said:
            upsert(self.db, self.project.id, "a", "late", turn=turn.id)
        assert said == ["PT410"]

    @invariant()
    def a_turn_shows_its_writers_what_it_will_be(self) -> None:
        for turn in self.turns:
            with user(self.db, self.project.owner):
                rows = self.db.execute(
                    "select file_path, content_hash from list_current_files(%s, %s)",
                    [self.project.id, turn.id],
                ).fetchall()
            assert dict(rows) == turn.tree(self.model)
            held = "select files, bytes from preview.turns where id = %s"
            sizes = [len(change.get("content", "").encode()) for change in turn.folded.values()]
            assert self.db.execute(held, [turn.id]).fetchone() == (len(turn.folded), sum(sizes))

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
            assert payload.get("label") == self.model.labels.get(payload["revision"])
            assert ("turn" in payload) == ("label" in payload)
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
            max_examples=300 if NIGHTLY else 50,
            stateful_step_count=40,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
