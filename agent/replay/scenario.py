"""Reads a scenario, a recorded part of a project's history: the snapshot, the events, the faults, the end. Pure.

JSON Lines: a header, then steps in order (protocol: Replay scenario). The scenario is also the log: `Log` commits its
events as the database did, whether or not they are delivered, and answers catch-up from them. What an event does not
carry (content by reference, the true bytes behind a wrong hash) stands beside it as `bytes`, base64.

    {"scenario":1,"project_id":…,"epoch":…,"revision":1,"snapshot":"snap.zip"|{"files":{path:text}},"expect":{…}}
    {"at_ms":0,"event":"file:update","payload":{…},"bytes"?:{path:base64}}
    {"at_ms":40,"fault":"disconnect","lost"?:30}
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct, field, structs

from agent.core.errors import MalformedMessage, PathRefused
from agent.core.messages import SNAPSHOT_FORMAT, Count, Text, read_event
from agent.core.model import Change, Commit, RelPath, digest_of, parse_path, tree_hash

FAULTS = ("disconnect", "expire_token", "disk_full", "restart_agent")
FORMAT: Literal[1] = 1

T = TypeVar("T")

INLINE_LIMIT = 1_000_000
"""Bytes of content that a sync answer carries; above it a snapshot is the answer, as the orchestrator does."""


class Expect(Struct, frozen=True, omit_defaults=True):
    """How the tree should be at the end. `files` None: only its hash is known."""

    tree_hash: str
    files: dict[RelPath, str] | None = None


class Step(Struct, frozen=True, omit_defaults=True):
    """One event or one fault.

    Attributes:
        at_ms: milliseconds after the beginning.
        contents: bytes that the event does not carry.
        lost: how many events after this fault are not delivered.
        line: where it stands in the file, for messages.
    """

    at_ms: Count
    event: str | None = None
    payload: dict[str, Any] = field(default_factory=dict)
    contents: dict[RelPath, bytes] = field(default_factory=dict, name="bytes")
    fault: str | None = None
    lost: Count = 0
    line: int = 0


class Files(Struct, frozen=True):
    """The files to begin with, as text."""

    files: dict[RelPath, str]


class Header(Struct, frozen=True, omit_defaults=True):
    """The first line. `snapshot`: the files to begin with, or the name of a zip beside the scenario."""

    scenario: Literal[1]
    project_id: Text
    epoch: Text
    revision: Count
    snapshot: str | Files
    expect: Expect | None = None


class Scenario(Header, frozen=True, omit_defaults=True):
    """A whole scenario."""

    steps: tuple[Step, ...] = ()


def read_scenario(text: str, name: str = "scenario") -> Scenario:
    """Parse a scenario; `name` is how its author knows it. Raises `MalformedMessage` naming the line."""
    lines = [(f"{name}, line {n}", n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise MalformedMessage(name, "it is empty")
    (top, _, first), *others = lines
    header = _decoded(top, first, Header)
    _check_snapshot(top, header.snapshot)
    _check_expect(top, header.expect)
    steps = [_step(where, n, line) for where, n, line in others]
    for before, after in pairwise(steps):
        if after.at_ms < before.at_ms:
            where = f"{name}, line {after.line}"
            raise MalformedMessage(where, f"at_ms is {after.at_ms}, before that of the step above it")
    return Scenario(**structs.asdict(header), steps=tuple(steps))


def write_scenario(scenario: Scenario) -> str:
    """Return the text that `read_scenario` reads as `scenario`."""
    lines = (structs.replace(scenario, steps=()), *scenario.steps)
    return "".join(f"{msgspec.json.encode(line).decode()}\n" for line in lines)


def _decoded(where: str, line: str, form: type[T]) -> T:
    try:
        return msgspec.json.decode(line, type=form)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        kind = "the header, which is the first line" if form is Header else "a step"
        raise MalformedMessage(where, f"not {kind}: {error}") from None


def _check_snapshot(where: str, given: str | Files) -> None:
    if isinstance(given, Files):
        _check_paths(where, "snapshot", given.files)
    elif given in ("", ".", "..") or {"/", "\\", "\0"} & set(given):
        raise MalformedMessage(where, "snapshot is neither files nor the name of a zip beside the scenario")


def _check_expect(where: str, given: Expect | None) -> None:
    if given is not None and given.files is not None:
        _check_paths(where, "expect", given.files)
        true = tree_hash({path: digest_of(text.encode()) for path, text in given.files.items()})
        if true != given.tree_hash:
            raise MalformedMessage(where, f"expect's tree_hash is not that of its files, which is {true}")


def _step(where: str, number: int, line: str) -> Step:
    step = _decoded(where, line, Step)
    if (step.event is None) == (step.fault is None):
        raise MalformedMessage(where, "a step has either an event or a fault")
    if step.fault not in (None, *FAULTS):
        raise MalformedMessage(where, f"fault {step.fault!r} is none of {', '.join(FAULTS)}")
    _check_paths(where, "bytes", step.contents)
    return structs.replace(step, line=number)


def _check_paths(where: str, what: str, paths: Iterable[str]) -> None:
    """Raise `MalformedMessage` when one of `paths` is none that may be written."""
    try:
        for path in paths:
            parse_path(path)
    except PathRefused as refused:
        raise MalformedMessage(where, f"in {what}: {refused}") from None


@dataclass(frozen=True, slots=True)
class Row:
    """One path in the log: its latest change, whole, and the commit that brought it."""

    change: Change
    revision: int


def written(change: Change) -> dict[str, Any]:
    """Write a whole change as `bulk:apply` and the answer of a sync carry it."""
    if change.content is None:
        return {"action": "delete", "file_path": change.path, "version": change.version}
    return {
        "action": "update",
        "file_path": change.path,
        "content": base64.b64encode(change.content).decode(),
        "encoding": "base64",
        "content_hash": change.digest,
        "version": change.version,
        "executable": change.executable,
    }


class Log:
    """Stands for the database: holds what was committed so far, and answers catch-ups from it."""

    def __init__(self, project_id: str, epoch: str, revision: int, files: Mapping[RelPath, bytes]) -> None:
        self.project_id = project_id
        self.epoch = epoch
        self.revision = revision
        self.rows = {
            path: Row(Change(path, digest_of(content), 1, content), revision)
            for path, content in files.items()
        }
        self._past: set[str] = set()

    def commit(self, step: Step, name: str = "scenario") -> None:
        """Commit a step's event; one that no database sends (junk, no revision, a past epoch) is ignored.

        Raises `MalformedMessage` when bytes that the event does not carry are not in the scenario either.
        """
        assert step.event is not None
        try:
            read = read_event(step.event, step.payload)
        except (MalformedMessage, PathRefused):
            return
        if not isinstance(read, Commit) or read.revision is None or read.epoch in self._past:
            return
        if read.epoch is not None and read.epoch != self.epoch:
            self._past.add(self.epoch)
            self.epoch = read.epoch
            self.rows = {path: replace(row, revision=0) for path, row in self.rows.items()}
        elif read.revision <= self.revision:
            return
        self.revision = read.revision
        where = f"{name}, line {step.line}"
        for change in read.changes:
            self._take(change, step.contents, where)
        if not read.complete:
            for path, content in step.contents.items():
                self._take(Change(path, digest_of(content), None, content), {}, where)

    def _take(self, change: Change, contents: Mapping[RelPath, bytes], where: str) -> None:
        row = self.rows.get(change.path)
        before = row.change if row else Change(change.path, None, 0)
        if change.version is None:
            change = structs.replace(change, version=(before.version or 0) + 1)
        if change.by_reference:
            content = contents.get(change.path, self.made(change))
            if content is None or digest_of(content) != change.digest:
                reason = f"the bytes of {change.path} are missing, or do not have the hash {change.digest}"
                raise MalformedMessage(where, reason)
            change = structs.replace(change, content=content)
        self.rows[change.path] = Row(change, self.revision)

    def made(self, change: Change) -> bytes | None:
        """Return the content of a change by reference, when the log has it: the same as before, or splices of that."""
        row = self.rows.get(change.path)
        if row is None or row.change.content is None:
            return None
        if row.change.digest == change.digest:
            return row.change.content
        made = None if change.patch is None else change.patch.applied_to(row.change.content)
        return made if made is not None and digest_of(made) == change.digest else None

    def files(self) -> dict[RelPath, bytes]:
        """Return the current tree."""
        changes = (row.change for row in self.rows.values())
        return {change.path: change.content for change in changes if change.content is not None}

    def head(self) -> dict[str, Any]:
        """Return the head as the answer of PUT …/status says it."""
        digests = {path: digest_of(content) for path, content in self.files().items()}
        return {"epoch": self.epoch, "revision": self.revision, "tree_hash": tree_hash(digests)}

    def answer(self, request: Mapping[str, Any], snapshot_url: str) -> dict[str, Any]:
        """Return the answer of POST …/sync."""
        epoch, revision = request.get("epoch"), int(request.get("revision") or 0)
        paths = {RelPath(path) for path in request.get("paths") or ()}
        full = request.get("reason") in ("tree_hash", "snapshot_rejected")
        offer = {"kind": "snapshot", "snapshot_url": snapshot_url, "manifest": None}
        if epoch != self.epoch or revision > self.revision or full:
            return offer
        wanted = {path for path, row in self.rows.items() if row.revision > revision} | paths
        if not wanted:
            return {"kind": "current", "epoch": self.epoch, "revision": self.revision}
        rows = ((path, self.rows.get(path)) for path in sorted(wanted))
        changes = [row.change if row else Change(path, None, 0) for path, row in rows]
        if sum(len(change.content or b"") for change in changes) > INLINE_LIMIT:
            return offer
        return {
            "kind": "changes",
            "epoch": self.epoch,
            "revision": self.revision,
            "base_revision": revision,
            "changes": [written(change) for change in changes],
        }

    def manifest(self, base: int | None = None) -> dict[str, Any]:
        """Return the manifest of a full snapshot; with `base`, of a delta for a tree at or above that revision."""
        changes = [row.change for row in self.rows.values() if base is None or row.revision > base]
        return {
            "format": SNAPSHOT_FORMAT,
            "project_id": self.project_id,
            "epoch": self.epoch,
            "revision": self.revision,
            "base_revision": base,
            "files": [
                {
                    "file_path": change.path,
                    "content_hash": change.digest,
                    "size": len(change.content),
                    "version": change.version,
                    "executable": change.executable,
                }
                for change in changes
                if change.content is not None
            ],
            "deleted": [
                {"file_path": change.path, "version": change.version}
                for change in changes
                if base is not None and change.is_delete
            ],
        }
