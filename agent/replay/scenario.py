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
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import orjson

from agent.core.errors import MalformedMessage, PathRefused
from agent.core.messages import SNAPSHOT_FORMAT, read_event
from agent.core.model import Change, Commit, Digest, RelPath, digest_of, parse_path, tree_hash

FAULTS = ("disconnect", "expire_token", "disk_full", "restart_agent")
FORMAT = 1

INLINE_LIMIT = 1_000_000
"""Bytes of content that a sync answer carries; above it a snapshot is the answer, as the orchestrator does."""


@dataclass(frozen=True, slots=True)
class Expect:
    """How the tree should be at the end. `files` None: only its hash is known."""

    tree_hash: str
    files: Mapping[RelPath, str] | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One event or one fault, `at_ms` milliseconds after the beginning."""

    at_ms: int
    event: str | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)
    contents: Mapping[RelPath, bytes] = field(default_factory=dict)
    fault: str | None = None
    lost: int = 0
    """Events after this fault that are not delivered."""
    line: int = 0
    """Where it stands in the file, for messages."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole scenario. `snapshot`: the files to begin with, or the name of a zip beside the scenario."""

    project_id: str
    epoch: str
    revision: int
    snapshot: Mapping[RelPath, bytes] | str
    steps: tuple[Step, ...]
    expect: Expect | None = None


def read_scenario(text: str, name: str = "scenario") -> Scenario:
    """Parse a scenario; `name` is how its author knows it. Raises `MalformedMessage` naming the line."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise MalformedMessage(name, "it is empty")
    reader = _Reader(name)
    scenario = reader.header(*lines[0])
    steps = [reader.step(number, line) for number, line in lines[1:]]
    for before, after in pairwise(steps):
        if after.at_ms < before.at_ms:
            where = f"{name}, line {after.line}"
            raise MalformedMessage(where, f"at_ms is {after.at_ms}, before that of the step above it")
    return replace(scenario, steps=tuple(steps))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Parses lines; an error names the line and what is wrong with it."""

    name: str

    def header(self, number: int, line: str) -> Scenario:
        where, given = self._object(number, line)
        if given.get("scenario") != FORMAT:
            found = given.get("scenario")
            raise MalformedMessage(where, f"scenario is {found!r}; a header with {FORMAT} is the first line")
        for key in ("project_id", "epoch"):
            if not isinstance(given.get(key), str) or not given[key]:
                raise MalformedMessage(where, f"{key} is missing or not text")
        return Scenario(
            project_id=given["project_id"],
            epoch=given["epoch"],
            revision=_whole(where, given, "revision"),
            snapshot=self._snapshot(where, given.get("snapshot")),
            steps=(),
            expect=None if given.get("expect") is None else self._expect(where, given["expect"]),
        )

    def step(self, number: int, line: str) -> Step:
        where, given = self._object(number, line)
        at_ms, event, fault = _whole(where, given, "at_ms"), given.get("event"), given.get("fault")
        if (event is None) == (fault is None):
            raise MalformedMessage(where, "a step has either an event or a fault")
        if fault is not None:
            if fault not in FAULTS:
                raise MalformedMessage(where, f"fault {fault!r} is none of {', '.join(FAULTS)}")
            lost = _whole(where, given, "lost") if "lost" in given else 0
            return Step(at_ms, fault=fault, lost=lost, line=number)
        if not isinstance(event, str) or not isinstance(given.get("payload"), dict):
            raise MalformedMessage(where, "an event has a name and a payload, an object")
        try:
            contents = {
                parse_path(path): base64.b64decode(coded, validate=True)
                for path, coded in given.get("bytes", {}).items()
            }
        except (binascii.Error, AttributeError, TypeError, ValueError, PathRefused) as error:
            raise MalformedMessage(where, f"bytes is not an object of paths and base64: {error}") from None
        return Step(at_ms, event, given["payload"], contents, line=number)

    def _object(self, number: int, line: str) -> tuple[str, dict[str, Any]]:
        where = f"{self.name}, line {number}"
        try:
            parsed = orjson.loads(line)
        except ValueError as error:
            raise MalformedMessage(where, f"not JSON: {error}") from None
        if not isinstance(parsed, dict):
            raise MalformedMessage(where, "not an object")
        return where, parsed

    def _snapshot(self, where: str, given: Any) -> Mapping[RelPath, bytes] | str:
        if isinstance(given, str) and given not in ("", ".", "..") and not {"/", "\\", "\0"} & set(given):
            return given
        if not isinstance(given, dict) or not isinstance(given.get("files"), dict):
            reason = "snapshot is neither the name of a zip beside the scenario nor an object with files"
            raise MalformedMessage(where, reason)
        return {path: text.encode() for path, text in self._files(where, "snapshot", given["files"]).items()}

    def _expect(self, where: str, given: Any) -> Expect:
        if not isinstance(given, dict) or not isinstance(given.get("tree_hash"), str):
            raise MalformedMessage(where, "expect has no tree_hash")
        if given.get("files") is None:
            return Expect(given["tree_hash"])
        files = self._files(where, "expect", given["files"])
        true = tree_hash({path: digest_of(text.encode()) for path, text in files.items()})
        if true != given["tree_hash"]:
            raise MalformedMessage(where, f"expect's tree_hash is not that of its files, which is {true}")
        return Expect(given["tree_hash"], files)

    def _files(self, where: str, what: str, given: Any) -> dict[RelPath, str]:
        if not isinstance(given, dict) or not all(isinstance(text, str) for text in given.values()):
            raise MalformedMessage(where, f"the files of {what} are not an object of paths and texts")
        try:
            return {parse_path(path): text for path, text in given.items()}
        except PathRefused as refused:
            raise MalformedMessage(where, f"in {what}: {refused}") from None


def _whole(where: str, given: Mapping[str, Any], key: str) -> int:
    value = given.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MalformedMessage(where, f"{key} is not a whole number of at least 0")
    return value


@dataclass(frozen=True, slots=True)
class Row:
    """One path in the log; `content` None: deleted."""

    version: int
    content: bytes | None
    executable: bool
    revision: int

    @property
    def digest(self) -> Digest | None:
        return None if self.content is None else digest_of(self.content)


class Log:
    """Stands for the database: holds what was committed so far, and answers catch-ups from it."""

    def __init__(self, project_id: str, epoch: str, revision: int, files: Mapping[RelPath, bytes]) -> None:
        self.project_id = project_id
        self.epoch = epoch
        self.revision = revision
        self.rows = {path: Row(1, content, False, revision) for path, content in files.items()}
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
        before = self.rows.get(change.path)
        version = change.version if change.version is not None else (before.version + 1 if before else 1)
        content = change.content
        if change.by_reference:
            content = contents.get(change.path)
            if content is None and before is not None and before.digest == change.digest:
                content = before.content
            if content is None or digest_of(content) != change.digest:
                reason = f"the bytes of {change.path} are missing, or do not have the hash {change.digest}"
                raise MalformedMessage(where, reason)
        self.rows[change.path] = Row(version, content, change.executable, self.revision)

    def files(self) -> dict[RelPath, bytes]:
        """Return the current tree."""
        return {path: row.content for path, row in self.rows.items() if row.content is not None}

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
        if sum(len(row.content or b"") for path in wanted if (row := self.rows.get(path))) > INLINE_LIMIT:
            return offer
        return {
            "kind": "changes",
            "epoch": self.epoch,
            "revision": self.revision,
            "base_revision": revision,
            "changes": [self._change(path) for path in sorted(wanted)],
        }

    def _change(self, path: RelPath) -> dict[str, Any]:
        row = self.rows.get(path)
        if row is None or row.content is None:
            return {"action": "delete", "file_path": path, "version": row.version if row else 0}
        return {
            "action": "update",
            "file_path": path,
            "content": base64.b64encode(row.content).decode(),
            "encoding": "base64",
            "content_hash": row.digest,
            "version": row.version,
            "executable": row.executable,
        }

    def manifest(self, base: int | None = None) -> dict[str, Any]:
        """Return the manifest of a full snapshot; with `base`, of a delta for a tree at or above that revision."""
        rows = {path: row for path, row in self.rows.items() if base is None or row.revision > base}
        return {
            "format": SNAPSHOT_FORMAT,
            "project_id": self.project_id,
            "epoch": self.epoch,
            "revision": self.revision,
            "base_revision": base,
            "created_at": None,
            "files": [
                {
                    "file_path": path,
                    "content_hash": row.digest,
                    "size": len(row.content),
                    "version": row.version,
                    "executable": row.executable,
                }
                for path, row in rows.items()
                if row.content is not None
            ],
            "deleted": [
                {"file_path": path, "version": row.version}
                for path, row in rows.items()
                if base is not None and row.content is None
            ],
        }
