"""A recorded piece of a project's life: where it began, what was said, what broke, and how it should end. Pure.

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
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from agent.errors import MalformedMessage, PathRefused
from agent.model import Change, Commit, Digest, RelPath, digest_of, parse_path, tree_hash
from agent.wire import SNAPSHOT_FORMAT, read_event

FAULTS = ("disconnect", "expire_token", "disk_full", "restart_agent")
FORMAT = 1

INLINE_LIMIT = 1_000_000
"""Bytes of content that a sync answer carries; above it a snapshot is the answer, as the orchestrator does."""


@dataclass(frozen=True, slots=True)
class Expect:
    """How the tree should be at the end. `files` None: the hash alone tells."""

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


@dataclass(frozen=True, slots=True)
class Scenario:
    """A whole scenario. `snapshot`: the files to begin with, or the name of a zip beside the scenario."""

    project_id: str
    epoch: str
    revision: int
    snapshot: Mapping[RelPath, bytes] | str
    steps: tuple[Step, ...]
    expect: Expect | None = None


def read_scenario(text: str) -> Scenario:
    """Parse a scenario. Raises `MalformedMessage` naming the line."""
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise MalformedMessage("scenario", "it is empty")
    header = _object(*lines[0])
    if header.get("scenario") != FORMAT:
        raise MalformedMessage("scenario, line 1", f"scenario is {header.get('scenario')!r}, not {FORMAT}")
    try:
        expect = header.get("expect")
        return Scenario(
            project_id=str(header["project_id"]),
            epoch=str(header["epoch"]),
            revision=int(header["revision"]),
            snapshot=_snapshot(header["snapshot"]),
            steps=tuple(_step(number, _object(number, line)) for number, line in lines[1:]),
            expect=None if expect is None else _expect(expect),
        )
    except (KeyError, TypeError, ValueError, PathRefused) as error:
        raise MalformedMessage("scenario, line 1", f"{type(error).__name__}: {error}") from None


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        parsed = orjson.loads(line)
    except ValueError as error:
        raise MalformedMessage(f"scenario, line {number}", f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise MalformedMessage(f"scenario, line {number}", "not an object")
    return parsed


def _snapshot(given: Any) -> Mapping[RelPath, bytes] | str:
    if isinstance(given, str):
        return given
    return {parse_path(path): text.encode() for path, text in given["files"].items()}


def _expect(given: Any) -> Expect:
    files = given.get("files")
    return Expect(
        given["tree_hash"],
        None if files is None else {parse_path(path): text for path, text in files.items()},
    )


def _step(number: int, given: dict[str, Any]) -> Step:
    where = f"scenario, line {number}"
    at_ms, event, fault = given.get("at_ms"), given.get("event"), given.get("fault")
    if not isinstance(at_ms, int) or at_ms < 0:
        raise MalformedMessage(where, "at_ms is not a whole number of at least 0")
    if (event is None) == (fault is None):
        raise MalformedMessage(where, "a step has either an event or a fault")
    if fault is not None:
        if fault not in FAULTS:
            raise MalformedMessage(where, f"fault {fault!r} is none of {', '.join(FAULTS)}")
        return Step(at_ms, fault=fault, lost=int(given.get("lost", 0)))
    if not isinstance(event, str) or not isinstance(given.get("payload"), dict):
        raise MalformedMessage(where, "an event has a name and a payload")
    try:
        contents = {
            parse_path(path): base64.b64decode(coded, validate=True)
            for path, coded in given.get("bytes", {}).items()
        }
    except (binascii.Error, AttributeError, PathRefused) as error:
        raise MalformedMessage(where, f"bytes: {error}") from None
    return Step(at_ms, event, given["payload"], contents)


@dataclass(frozen=True, slots=True)
class Row:
    """One path as the log has it; `content` None: deleted."""

    version: int
    content: bytes | None
    executable: bool
    revision: int

    @property
    def digest(self) -> Digest | None:
        return None if self.content is None else digest_of(self.content)


class Log:
    """The database of a replay: what was committed so far, and the answers that follow from it."""

    def __init__(self, project_id: str, epoch: str, revision: int, files: Mapping[RelPath, bytes]) -> None:
        self.project_id = project_id
        self.epoch = epoch
        self.revision = revision
        self.rows = {path: Row(1, content, False, revision) for path, content in files.items()}
        self._past: set[str] = set()

    def commit(self, step: Step) -> None:
        """Take a step's event as committed. What no database says (junk, no revision, an epoch that is over) is not.

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
        for change in read.changes:
            self._take(change, step.contents, read.revision)
        if not read.complete:
            for path, content in step.contents.items():
                self._take(Change(path, digest_of(content), None, content), {}, read.revision)

    def _take(self, change: Change, contents: Mapping[RelPath, bytes], revision: int) -> None:
        before = self.rows.get(change.path)
        version = change.version if change.version is not None else (before.version + 1 if before else 1)
        content = change.content
        if change.by_reference:
            content = contents.get(change.path)
            if content is None and before is not None and before.digest == change.digest:
                content = before.content
            if content is None or digest_of(content) != change.digest:
                reason = f"the bytes of {change.path} are not in it, or not the right ones"
                raise MalformedMessage("scenario", reason)
        self.rows[change.path] = Row(version, content, change.executable, revision)

    def files(self) -> dict[RelPath, bytes]:
        """The current tree."""
        return {path: row.content for path, row in self.rows.items() if row.content is not None}

    def head(self) -> dict[str, Any]:
        """As the status answer says it."""
        digests = {path: digest_of(content) for path, content in self.files().items()}
        return {"epoch": self.epoch, "revision": self.revision, "tree_hash": tree_hash(digests)}

    def answer(self, request: Mapping[str, Any], snapshot_url: str) -> dict[str, Any]:
        """The answer of POST …/sync."""
        epoch, revision = request.get("epoch"), int(request.get("revision") or 0)
        paths = {RelPath(path) for path in request.get("paths") or ()}
        full = request.get("reason") in ("tree_hash", "snapshot_rejected")
        if epoch != self.epoch or revision > self.revision or full:
            return {"kind": "snapshot", "snapshot_url": snapshot_url, "manifest": None}
        wanted = {path for path, row in self.rows.items() if row.revision > revision} | paths
        if not wanted:
            return {"kind": "current", "epoch": self.epoch, "revision": self.revision}
        if sum(len(row.content or b"") for path in wanted if (row := self.rows.get(path))) > INLINE_LIMIT:
            return {"kind": "snapshot", "snapshot_url": snapshot_url, "manifest": None}
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

    def manifest(self) -> dict[str, Any]:
        """Of a full snapshot, now."""
        return {
            "format": SNAPSHOT_FORMAT,
            "project_id": self.project_id,
            "epoch": self.epoch,
            "revision": self.revision,
            "base_revision": None,
            "created_at": None,
            "files": [
                {
                    "file_path": path,
                    "content_hash": row.digest,
                    "size": len(row.content),
                    "version": row.version,
                    "executable": row.executable,
                }
                for path, row in self.rows.items()
                if row.content is not None
            ],
            "deleted": [],
        }


@dataclass(frozen=True, slots=True)
class Mischief:
    """What the channel does to deliveries on top of the scenario's own faults. Probabilities in 0…1."""

    seed: int = 0
    shuffle: bool = False
    duplicate: float = 0.0
    drop: float = 0.0
    disconnect: int = 0
    crash: int = 0

    reach: int = 5
    """How many events later a shuffled or doubled one may come."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The step at `index` is in the log now."""

    step: Step


@dataclass(frozen=True, slots=True)
class Delivered:
    """The step's event reaches the agent."""

    step: Step


@dataclass(frozen=True, slots=True)
class Broken:
    """A fault happens: one of `FAULTS`, or `crash`."""

    fault: str


def play(steps: Sequence[Step], mischief: Mischief) -> Iterator[Committed | Delivered | Broken]:
    """The steps as they happen to an agent: commits in their order, deliveries as the channel would have them.

    An event is never delivered before it is committed, because the database never says what it has not done.
    """
    dice = random.Random(mischief.seed)  # noqa: S311 - a reproducible disorder is the point
    waiting: list[tuple[float, Step]] = []
    extra = _extra_faults(len(steps), mischief, dice)
    lost = 0
    for number, step in enumerate(steps):
        for fault in extra.get(number, ()):
            yield Broken(fault)
        if step.fault is not None:
            yield Broken(step.fault)
            lost = max(lost, step.lost)
            continue
        yield Committed(step)
        if lost:
            lost -= 1
        elif dice.random() >= mischief.drop:
            waiting.append((number + (dice.uniform(0, mischief.reach) if mischief.shuffle else 0), step))
            if dice.random() < mischief.duplicate:
                waiting.append((number + dice.uniform(0, mischief.reach), step))
        waiting.sort(key=lambda due: due[0])
        while waiting and waiting[0][0] <= number:
            yield Delivered(waiting.pop(0)[1])
    for _, step in waiting:
        yield Delivered(step)


def _extra_faults(steps: int, mischief: Mischief, dice: random.Random) -> dict[int, list[str]]:
    extra: dict[int, list[str]] = {}
    for fault, times in (("disconnect", mischief.disconnect), ("crash", mischief.crash)):
        for _ in range(times):
            extra.setdefault(dice.randrange(max(steps, 1)), []).append(fault)
    return extra
