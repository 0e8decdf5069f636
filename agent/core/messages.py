"""What travels, read into the model's nouns. Pure.

Everything here comes from outside: a form that cannot be understood raises `MalformedMessage`; a single path
that may not be written becomes a `Problem` of its commit and the rest of the commit stands. Unknown fields are
ignored.
"""

from __future__ import annotations

import base64
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from agent.core.errors import MalformedMessage, PathRefused
from agent.core.model import (
    Change,
    Commit,
    Digest,
    Entry,
    Manifest,
    Patch,
    Problem,
    RelPath,
    digest_of,
    parse_path,
    read_traceparent,
)

COMMIT_EVENTS = frozenset({"file:update", "file:delete", "bulk:apply"})
SNAPSHOT_FORMAT = 1
MANIFEST_PATH = ".preview-sync/manifest.json"

MOST = 2**63 - 1
"""Of a revision, a version, a size: what a bigint of the database holds, and a column of the ledger."""

LONGEST_EPOCH = 255
"""Characters. It travels with every question and every heartbeat, whose bodies are bounded."""

Count = Annotated[int, Meta(ge=0, le=MOST)]
Text = Annotated[str, Meta(min_length=1)]
Epoch = Annotated[str, Meta(min_length=1, max_length=LONGEST_EPOCH)]
Sha256 = Annotated[Digest, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Moment = Annotated[datetime, Meta(tz=True)]
"""RFC 3339 with a zone."""


def _understood(read: Callable[..., Any], form: Any, what: str) -> Any:
    """Return what `read(type=form)` does, one of msgspec's readers. Raises `MalformedMessage` for any other form."""
    try:
        return read(type=form)
    except RecursionError:
        raise MalformedMessage(what, "it is nested too deep") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise MalformedMessage(what, str(error)) from None


# --- events


class _Commit(Struct):
    """What an event of a commit says beside its changes. `files`: those of a bulk."""

    revision: Count | None = None
    epoch: Epoch | None = None
    timestamp: Moment | None = None
    complete: object = True
    traceparent: object = None
    files: list[dict[str, object]] | None = None


class _Item(Struct):
    action: Literal["update", "delete"]
    version: Count | None = None
    content_hash: Sha256 | None = None
    content: str | None = None
    encoding: Literal["utf-8", "base64"] | None = None
    size: Count | None = None
    executable: object = False
    base_hash: Sha256 | None = None
    splices: list[tuple[Count, Count, str]] | None = None


class _Offer(Struct):
    """A snapshot, in an event or as the answer of a sync."""

    snapshot_url: Text
    manifest: object = None
    timestamp: Moment | None = None
    reason: object = None

    def read(self) -> SnapshotOffer:
        manifest = None if self.manifest is None else read_manifest(self.manifest)
        return SnapshotOffer(self.snapshot_url, manifest, _unix(self.timestamp), self.reason == "ahead")


def read_event(
    event: str, payload: Mapping[str, object], received_at: float | None = None
) -> Commit | SnapshotOffer | None:
    """The commit or offer that a broadcast carries; None for an event we do not know.

    Content that does not match its hash is dropped and the change becomes one by reference, so that the true
    bytes are fetched; a `hash_mismatch` problem says so.
    """
    read = partial(msgspec.convert, payload)
    if event == "snapshot:ready":
        offer: _Offer = _understood(read, _Offer, event)
        return offer.read()
    if event not in COMMIT_EVENTS:
        return None
    told: _Commit = _understood(read, _Commit, event)
    items: list[dict[str, object]] | None = told.files
    if event != "bulk:apply":
        items = [{**payload, "action": "update" if event == "file:update" else "delete"}]
    elif items is None:
        raise MalformedMessage(event, "files is missing")
    changes, problems = read_changes(items, event)
    return Commit(
        event=event,
        changes=changes,
        revision=told.revision,
        epoch=told.epoch,
        timestamp=_unix(told.timestamp),
        complete=told.complete is not False,
        problems=problems,
        trace=read_traceparent(told.traceparent),
        received_at=received_at,
    )


def _unix(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def read_changes(
    items: Iterable[Mapping[str, object]], what: str
) -> tuple[tuple[Change, ...], tuple[Problem, ...]]:
    """The changes of a bulk or of a sync answer, and the paths that may not be written.

    Of several changes to one path the last stands.
    """
    changes: dict[RelPath, Change] = {}
    problems: list[Problem] = []
    for item in items:
        try:
            path = parse_path(item.get("file_path"))
        except PathRefused as refused:
            problems.append(Problem("path_refused", str(refused), refused.shown, refused.rule))
            continue
        change, problem = _read_change(path, item, what)
        changes.pop(path, None)
        changes[path] = change
        if problem is not None:
            problems.append(problem)
    return tuple(changes.values()), tuple(problems)


def _read_change(path: RelPath, item: Mapping[str, object], what: str) -> tuple[Change, Problem | None]:
    told: _Item = _understood(partial(msgspec.convert, item), _Item, what)
    if told.action == "delete":
        return Change(path, None, told.version), None
    claimed, executable = told.content_hash, told.executable is True
    if told.content is None:
        if claimed is None:
            raise MalformedMessage(what, f"{path} has neither content nor content_hash")
        return Change(path, claimed, told.version, None, told.size, executable, _read_patch(told, what)), None
    try:
        coded = told.encoding == "base64"
        content = base64.b64decode(told.content, validate=True) if coded else told.content.encode()
    except ValueError as error:
        raise MalformedMessage(what, f"content cannot be decoded: {error}") from None
    actual = digest_of(content)
    if claimed is None or claimed == actual:
        return Change(path, actual, told.version, content, len(content), executable), None
    problem = Problem("hash_mismatch", "the content received is not what its hash says; fetching it", path)
    return Change(path, claimed, told.version, None, None, executable), problem


def _read_patch(told: _Item, what: str) -> Patch | None:
    if told.base_hash is None or told.splices is None:
        return None
    try:
        return Patch(told.base_hash, tuple([(at, cut, insert.encode()) for at, cut, insert in told.splices]))
    except UnicodeEncodeError as error:
        raise MalformedMessage(what, f"a splice cannot be encoded: {error}") from None


# --- manifests


class _Format(Struct):
    format: object = None


class _File(Struct, gc=False, rename={"path": "file_path", "digest": "content_hash"}):
    """Read from the JSON as it is: by way of dictionaries tens of thousands take twice the memory."""

    path: str
    digest: Sha256
    size: Count
    version: Count
    executable: bool = False


UNAVAILABLE: Mapping[str, str] = {
    "lost": "its object in Storage is gone; upload it again, or save the file again",
    "wrong_bytes": "its object in Storage holds other bytes than its hash says; delete that and upload it again",
    "no_room": "with it the project's archive is larger than Storage takes; make it smaller, or raise Storage's limit",
    "too_deep": "it lies deeper than 64 segments; move it in the project",
}


class _Deleted(Struct, gc=False):
    file_path: str
    version: Count


class _Unavailable(Struct, gc=False):
    file_path: Text
    reason: Text

    def problem(self) -> Problem:
        """What is said of a file that the orchestrator left out, because it has not got its bytes."""
        said = UNAVAILABLE.get(self.reason, "its content cannot be had")
        path = self.file_path if len(self.file_path) <= 1024 else reprlib.repr(self.file_path)
        return Problem("content_unavailable", said, path, self.reason[:40])


class _Manifest(Struct):
    """The manifest's form in JSON."""

    project_id: Text
    epoch: Epoch
    revision: Count
    base_revision: Count | None = None
    files: list[_File] = []
    deleted: list[_Deleted] = []
    unavailable: list[_Unavailable] = []
    build_seconds: float | None = None


def read_manifest(obj: object) -> Manifest:
    """The snapshot's manifest. A hostile path anywhere in it refuses the whole (`PathRefused`)."""
    return _manifest(partial(msgspec.convert, obj))


def decode_manifest(data: bytes | bytearray) -> Manifest:
    """The snapshot's manifest, from JSON. Raises as `read_manifest` does."""
    return _manifest(partial(msgspec.json.decode, data))


def _manifest(read: Callable[..., Any]) -> Manifest:
    what = "manifest"
    number = _understood(read, _Format, what).format
    if number != SNAPSHOT_FORMAT:
        raise MalformedMessage(what, f"format is {reprlib.repr(number)}; this agent reads {SNAPSHOT_FORMAT}")
    told: _Manifest = _understood(read, _Manifest, what)
    files: dict[RelPath, Entry] = {}
    listed = len(told.files)
    told.files.reverse()
    while told.files:
        # Freed one by one, so that they are never in memory twice.
        file = told.files.pop()
        files[parse_path(file.path)] = Entry(
            file.version, file.digest, file.size, file.executable, told.revision
        )
    if len(files) != listed:
        raise MalformedMessage(what, "a path is listed twice")
    deleted = {parse_path(each.file_path): each.version for each in told.deleted}
    left_out = tuple(each.problem() for each in told.unavailable)
    return Manifest(
        told.project_id,
        told.epoch,
        told.revision,
        files,
        deleted,
        told.base_revision,
        told.build_seconds,
        left_out,
    )


# --- answers


class Current(Struct, frozen=True, tag_field="kind", tag="current"):
    """Sync's answer when nothing is missing."""

    epoch: Epoch
    revision: Count


class _Changes(Struct, tag_field="kind", tag="changes"):
    epoch: Epoch
    revision: Count
    base_revision: Count
    changes: list[dict[str, object]] = []
    unavailable: list[_Unavailable] = []


class _Snapshot(_Offer, tag_field="kind", tag="snapshot"):
    pass


@dataclass(frozen=True, slots=True)
class Changes:
    """Sync's answer as changes: the latest per path above `base_revision`, up to and with `revision`."""

    epoch: str
    revision: int
    base_revision: int
    changes: tuple[Change, ...]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotOffer:
    """A snapshot to fetch, full or a delta (the manifest says): sync's answer, or `snapshot:ready` with its time.

    `ahead`: the question named a revision that the database does not have: it has lost commits.
    """

    snapshot_url: str
    manifest: Manifest | None = None
    timestamp: float | None = None
    ahead: bool = False


SyncAnswer = Current | Changes | SnapshotOffer


class Head(Struct, frozen=True):
    """The status answer: where the database is. `action` is what the orchestrator asks of us, `run_revision` names the
    run settings in force; None: it has none to give."""

    epoch: Epoch
    revision: Count
    tree_hash: Text | None = None
    action: Text | None = None
    run_revision: Count | None = None


def read_sync_answer(obj: object) -> SyncAnswer:
    """The answer of POST …/sync."""
    what = "sync answer"
    told = _understood(partial(msgspec.convert, obj), Current | _Changes | _Snapshot, what)
    if isinstance(told, _Changes):
        changes, problems = read_changes(told.changes, what)
        problems += tuple(each.problem() for each in told.unavailable)
        return Changes(told.epoch, told.revision, told.base_revision, changes, problems)
    if isinstance(told, _Snapshot):
        return told.read()
    assert isinstance(told, Current)
    return told


def read_head(obj: object) -> Head:
    """The answer of PUT …/status."""
    head: Head = _understood(partial(msgspec.convert, obj), Head, "status answer")
    return head
