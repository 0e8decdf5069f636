"""What travels, read into the model's nouns. Pure.

Everything here comes from outside: a form that cannot be understood raises `MalformedMessage`; a single path
that may not be written becomes a `Problem` of its commit and the rest of the commit stands. Unknown fields are
ignored.
"""

from __future__ import annotations

import base64
import binascii
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from agent.core.errors import MalformedMessage, PathRefused
from agent.core.model import (
    Change,
    Commit,
    Digest,
    Entry,
    Manifest,
    Problem,
    RelPath,
    SnapshotReady,
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


def read_event(
    event: str, payload: Mapping[str, object], received_at: float | None = None
) -> Commit | SnapshotReady | None:
    """The commit or offer that a broadcast carries; None for an event we do not know.

    Content that does not match its hash is dropped and the change becomes one by reference, so that the true
    bytes are fetched; a `hash_mismatch` problem says so.
    """
    if event == "snapshot:ready":
        manifest = payload.get("manifest")
        return SnapshotReady(
            snapshot_url=_text(payload, "snapshot_url", event),
            manifest=None if manifest is None else read_manifest(manifest),
            timestamp=_timestamp(payload, event),
        )
    if event not in COMMIT_EVENTS:
        return None
    if event == "bulk:apply":
        items: object = payload.get("files")
        if not isinstance(items, list):
            raise MalformedMessage(event, "files is not a list")
        changes, problems = read_changes(items, event)
    else:
        action = "update" if event == "file:update" else "delete"
        changes, problems = read_changes([{**payload, "action": action}], event)
    return Commit(
        event=event,
        changes=changes,
        revision=_number(payload, "revision", event),
        epoch=None if payload.get("epoch") is None else _epoch(payload, event),
        timestamp=_timestamp(payload, event),
        sender=_optional_text(payload, "sender", event),
        complete=payload.get("complete") is not False,
        problems=problems,
        trace=read_traceparent(payload.get("traceparent")),
        received_at=received_at,
    )


def read_changes(items: Iterable[object], what: str) -> tuple[tuple[Change, ...], tuple[Problem, ...]]:
    """The changes of a bulk or of a sync answer, and the paths that may not be written.

    Of several changes to one path the last stands.
    """
    changes: dict[RelPath, Change] = {}
    problems: list[Problem] = []
    for item in items:
        if not isinstance(item, dict):
            raise MalformedMessage(what, "a change is not an object")
        try:
            path = parse_path(item.get("file_path"))
        except PathRefused as refused:
            problems.append(Problem("path_refused", str(refused), refused.shown, refused.rule))
            continue
        change, problem = _change(path, item, what)
        changes.pop(path, None)
        changes[path] = change
        if problem is not None:
            problems.append(problem)
    return tuple(changes.values()), tuple(problems)


def _change(path: RelPath, item: Mapping[str, object], what: str) -> tuple[Change, Problem | None]:
    version = _number(item, "version", what)
    action = item.get("action")
    if action == "delete":
        return Change(path, None, version), None
    if action != "update":
        raise MalformedMessage(what, f"action is {reprlib.repr(action)}, not update or delete")
    claimed = _digest(item, "content_hash", what)
    executable = item.get("executable") is True
    content = _content(item, what)
    if content is None:
        if claimed is None:
            raise MalformedMessage(what, f"{path} has neither content nor content_hash")
        return Change(path, claimed, version, None, _number(item, "size", what), executable), None
    actual = digest_of(content)
    if claimed is None or claimed == actual:
        return Change(path, actual, version, content, len(content), executable), None
    problem = Problem("hash_mismatch", "the content received is not what its hash says; fetching it", path)
    return Change(path, claimed, version, None, None, executable), problem


def _content(item: Mapping[str, object], what: str) -> bytes | None:
    content = item.get("content")
    if content is None:
        return None
    if not isinstance(content, str):
        raise MalformedMessage(what, "content is not text")
    encoding = item.get("encoding", "utf-8")
    try:
        if encoding == "base64":
            return base64.b64decode(content, validate=True)
        if encoding in ("utf-8", None):
            return content.encode()
    except (binascii.Error, UnicodeEncodeError) as error:
        raise MalformedMessage(what, f"content cannot be decoded: {error}") from None
    raise MalformedMessage(what, f"encoding {reprlib.repr(encoding)} is unknown")


class _Format(Struct):
    format: object = None


class _File(Struct, gc=False, rename={"path": "file_path", "digest": "content_hash"}):
    """Read from the JSON as it is: by way of dictionaries tens of thousands take twice the memory."""

    path: str
    digest: Annotated[Digest, Meta(pattern=r"^[0-9a-f]{64}\Z")]
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
    file_path: str
    reason: str


class _Manifest(Struct):
    """The manifest's form in JSON."""

    project_id: Annotated[str, Meta(min_length=1)]
    epoch: Annotated[str, Meta(min_length=1, max_length=LONGEST_EPOCH)]
    revision: Count
    base_revision: Count | None = None
    created_at: str | None = None
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
    try:
        number = read(type=_Format).format
        if number != SNAPSHOT_FORMAT:
            raise MalformedMessage(
                what, f"format is {reprlib.repr(number)}; this agent reads {SNAPSHOT_FORMAT}"
            )
        told: _Manifest = read(type=_Manifest)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise MalformedMessage(what, str(error)) from None
    except RecursionError:
        raise MalformedMessage(what, "it is nested too deep") from None
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
    return Manifest(
        project_id=told.project_id,
        epoch=told.epoch,
        revision=told.revision,
        base_revision=told.base_revision,
        created_at=told.created_at,
        files=files,
        deleted={parse_path(each.file_path): each.version for each in told.deleted},
        build_seconds=told.build_seconds,
        problems=tuple(_unavailable(each.file_path, each.reason) for each in told.unavailable),
    )


def _unavailable(path: str, reason: str) -> Problem:
    """What is said of a file that the orchestrator left out, because it has not got its bytes."""
    said = UNAVAILABLE.get(reason, "its content cannot be had")
    return Problem("content_unavailable", said, reprlib.repr(path) if len(path) > 1024 else path, reason[:40])


@dataclass(frozen=True, slots=True)
class Current:
    """Sync's answer when nothing is missing."""

    epoch: str
    revision: int


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
    """Sync's answer as a snapshot to fetch, full or a delta (the manifest says)."""

    snapshot_url: str
    manifest: Manifest | None = None


SyncAnswer = Current | Changes | SnapshotOffer


@dataclass(frozen=True, slots=True)
class Head:
    """The status answer: where the database is. `action` is what the orchestrator asks of us, `run_revision` names the
    run settings in force; None: it has none to give."""

    epoch: str
    revision: int
    tree_hash: str | None = None
    action: str | None = None
    run_revision: int | None = None


def read_sync_answer(obj: object) -> SyncAnswer:
    """The answer of POST …/sync."""
    what = "sync answer"
    if not isinstance(obj, dict):
        raise MalformedMessage(what, "not an object")
    kind = obj.get("kind")
    if kind == "snapshot":
        manifest = obj.get("manifest")
        return SnapshotOffer(
            _text(obj, "snapshot_url", what), None if manifest is None else read_manifest(manifest)
        )
    epoch = _epoch(obj, what)
    revision = _required_number(obj, "revision", what)
    if kind == "current":
        return Current(epoch, revision)
    if kind == "changes":
        changes, problems = read_changes(_objects(obj, "changes", what), what)
        for each in _objects(obj, "unavailable", what):
            problems += (_unavailable(_text(each, "file_path", what), _text(each, "reason", what)),)
        return Changes(epoch, revision, _required_number(obj, "base_revision", what), changes, problems)
    raise MalformedMessage(what, f"kind {reprlib.repr(kind)} is unknown")


def read_head(obj: object) -> Head:
    """The answer of PUT …/status."""
    what = "status answer"
    if not isinstance(obj, dict):
        raise MalformedMessage(what, "not an object")
    return Head(
        _epoch(obj, what),
        _required_number(obj, "revision", what),
        _optional_text(obj, "tree_hash", what),
        _optional_text(obj, "action", what),
        _required_number(obj, "run_revision", what) if "run_revision" in obj else None,
    )


def _objects(obj: Mapping[str, object], key: str, what: str) -> list[dict[str, object]]:
    items = obj.get(key, [])
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise MalformedMessage(what, f"{key} is not a list of objects")
    return items


def _text(obj: Mapping[str, object], key: str, what: str) -> str:
    value = obj.get(key)
    if not isinstance(value, str) or not value:
        raise MalformedMessage(what, f"{key} is missing or not text")
    return value


def _epoch(obj: Mapping[str, object], what: str) -> str:
    value = _text(obj, "epoch", what)
    if len(value) > LONGEST_EPOCH:
        raise MalformedMessage(what, f"epoch has more than {LONGEST_EPOCH} characters")
    return value


def _optional_text(obj: Mapping[str, object], key: str, what: str) -> str | None:
    return None if obj.get(key) is None else _text(obj, key, what)


def _number(obj: Mapping[str, object], key: str, what: str) -> int | None:
    value = obj.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise MalformedMessage(what, f"{key} is not a whole number from 0 to 2^63 - 1")
    return value


def _required_number(obj: Mapping[str, object], key: str, what: str) -> int:
    value = _number(obj, key, what)
    if value is None:
        raise MalformedMessage(what, f"{key} is missing")
    return value


def _digest(obj: Mapping[str, object], key: str, what: str) -> Digest | None:
    value = obj.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) != 64 or value.strip("0123456789abcdef"):
        raise MalformedMessage(what, f"{key} is not a lower-case hex SHA-256")
    return Digest(value)


def _timestamp(obj: Mapping[str, object], what: str) -> float | None:
    value = obj.get("timestamp")
    if value is None:
        return None
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise MalformedMessage(what, "timestamp is not RFC 3339") from None
        if moment.tzinfo is not None:
            return moment.timestamp()
    raise MalformedMessage(what, "timestamp is not RFC 3339 with a zone")
