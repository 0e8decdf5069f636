"""The nouns of the agent, all of them data: paths, entries, trees, changes, operations, problems. Pure.

A *tree* is what the agent believes is on disk; a *change* is what the database says happened to one path; an
*operation* is one thing to do to the disk, decided before anything is done. A *problem* is something wrong that a
person should see; its kinds are closed, so that the type checker refuses one that has no remedy and no owner.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NewType, get_args

from immutables import Map
from msgspec import Struct, field

from agent.core.errors import PathRefused

SupervisorProblem = Literal[
    "dev_server_backoff", "dev_server_failed", "hmr_unreachable", "install_failed", "lock_unusable",
    "nothing_to_serve", "port_taken", "preview_error",
]  # fmt: skip
ScreenProblem = Literal["preview_unobserved"]
LinkProblem = Literal["token_refused"]
RunSettingsProblem = Literal["run_settings_unavailable"]
SessionApiProblem = Literal["request_too_large", "session_api_refused", "session_api_unreachable"]
CatchUpProblem = Literal["mass_delete", "snapshot_expired", "snapshot_rejected", "snapshot_unavailable"]
EngineProblem = Literal["content_unavailable", "drift", "hash_mismatch", "head_behind", "path_refused"]
ShadowProblem = Literal["live_unreadable", "shadow_difference"]
WriteBackProblem = Literal["write_back_conflict"]
EnvironmentProblem = Literal["disk_full", "io_error", "permission_denied", "read_only", "too_many_open_files"]
WorkspaceProblem = Literal[EnvironmentProblem, "path_unusable", "undo_failed"]
ProblemKind = Literal[
    SupervisorProblem,
    ScreenProblem,
    LinkProblem,
    RunSettingsProblem,
    SessionApiProblem,
    CatchUpProblem,
    EngineProblem,
    ShadowProblem,
    WorkspaceProblem,
    WriteBackProblem,
]
ProblemOwner = Literal[
    "devserver.screen",
    "devserver.supervisor",
    "link.loop",
    "link.run_settings",
    "session_api",
    "sync.catchup",
    "sync.engine",
    "sync.shadow",
    "sync.workspace",
    "write_back.flow",
]
"""The modules that open and close problems."""

ENVIRONMENT_PROBLEMS: Final[tuple[EnvironmentProblem, ...]] = get_args(EnvironmentProblem)
"""Kinds that speak of the machine, not of a path: one transaction that is done shows that they are over."""

_OWNED: Final[Mapping[ProblemOwner, object]] = {
    "devserver.supervisor": SupervisorProblem,
    "devserver.screen": ScreenProblem,
    "link.loop": LinkProblem,
    "link.run_settings": RunSettingsProblem,
    "session_api": SessionApiProblem,
    "sync.catchup": CatchUpProblem,
    "sync.engine": EngineProblem,
    "sync.shadow": ShadowProblem,
    "sync.workspace": WorkspaceProblem,
    "write_back.flow": WriteBackProblem,
}
PROBLEM_OWNERS: Final[Mapping[ProblemKind, ProblemOwner]] = {
    kind: owner for owner, kinds in _OWNED.items() for kind in get_args(kinds)
}
"""The one module that opens and closes each kind. A kind with two owners is closed by one of them while the other still
has it: a heartbeat that was answered once hid a catch-up that was not."""

REMEDIES: Final[Mapping[ProblemKind, str]] = {
    "content_unavailable": "upload the file's bytes again, or save it again; all else of the project is there",
    "dev_server_backoff": "it is started again by itself; its last output, in /status, says why it ended",
    "dev_server_failed": "read its last output in /status and fix the file it names; saving that starts it again",
    "disk_full": "free space or inodes where PROJECT_DIR and STATE_DIR are; it is tried again by itself",
    "drift": "something in the container changed a file; DRIFT_POLICY=restore puts it back",
    "hash_mismatch": "fetched again by itself; if it goes on, see whether a proxy changes what passes through it",
    "head_behind": "the database lost commits (a failover?); the preview goes back to what it has, by itself",
    "hmr_unreachable": "the page is served and its HMR socket is not; look at server.hmr in the Vite config",
    "install_failed": "fix package.json or its lock file, see the log's tail; the old preview stays until then",
    "io_error": "look at the disk and the kernel's log (dmesg); it is tried again by itself",
    "live_unreadable": "let the agent's user read PROJECT_DIR; nothing is compared until then",
    "lock_unusable": "make the lock file again with the project's package manager; until then versions may differ",
    "mass_delete": "a snapshot would delete most files; look at the project in the database, a second one decides",
    "nothing_to_serve": "add what the sentence names, or say in DEV_ROOT or DEV_COMMAND what to preview",
    "path_refused": "rename the file in the project; its path is never written, the others are",
    "path_unusable": "rename the file, or remove what is in its way or forbids it; then it is written by itself",
    "permission_denied": "let the agent's user write in STAGING_DIR and STATE_DIR",
    "preview_unobserved": "only what people see is unknown: see docs/screen.md for the servers that are observed",
    "port_taken": "stop what listens on the dev server's port, or set DEV_PORT",
    "preview_error": "the dev server is up and its page is not right; fix what the detail names, saving it shows it",
    "read_only": "mount the project's file system writable; it is tried again by itself",
    "request_too_large": "something before the orchestrator reads less than BODY_LIMIT; raise its limit",
    "run_settings_unavailable": "see whether the orchestrator answers and has RUN_SETTINGS_KEYS; asked again by itself",
    "session_api_refused": "the session is over or its key was rotated away; start a new session",
    "session_api_unreachable": "see whether SESSION_API_URL and the orchestrator answer; live events go on meanwhile",
    "shadow_difference": "the two flows disagree about a file; see which is right before SYNC_MODE=live",
    "snapshot_expired": "a fresh URL is asked for by itself; without SESSION_API_URL start with a new SNAPSHOT_URL",
    "snapshot_rejected": "it is built anew by itself; if it goes on, look at the orchestrator's log for the rule",
    "snapshot_unavailable": "see whether the storage of snapshots answers; it is fetched again by itself",
    "token_refused": "the session is over or its key was rotated away; start a new session",
    "too_many_open_files": "raise the limit of open files (ulimit -n); it is tried again by itself",
    "write_back_conflict": "the project has a person's version, and the tool's among its conflicts; take either there",
    "undo_failed": "the file may be of another moment than the rest; it is asked for again, see the disk's health",
}
"""One line for a person at the machine, for every kind."""


_FORM = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL
)
"""W3C Trace Context, 3.2. A version after 00 may have more behind another dash."""


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The span that caused an event. Lower-case hex: 32 digits of the trace, 16 of the span, 2 of flags."""

    trace_id: str
    span_id: str
    flags: str = "00"

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"


def read_traceparent(value: object) -> TraceParent | None:
    """The parent that `value` names. None when there is none, or it is not a valid one: a trace is never worth an
    event.
    """
    found = _FORM.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    return TraceParent(trace_id, span_id, flags) if more is None or version != "00" else None


RelPath = NewType("RelPath", str)
"""A path that passed `parse_path`: relative, `/`-separated, NFC, no tricks."""

Digest = NewType("Digest", str)
"""Lower-case hex SHA-256 of a file's bytes."""

MAX_PATH_BYTES = 1024
MAX_SEGMENT_BYTES = 255
MAX_SEGMENTS = 64
"""Deeper than any project, and tools that recurse bear it. The database has the same three, see tests/contract."""
PROTECTED = frozenset({"node_modules", ".git", ".preview-sync"})
"""Nothing below these is ever written, wherever in the tree they stand (protocol: file_path)."""


def parse_path(raw: object) -> RelPath:
    """Admit a path from outside.

    Raises `PathRefused` with one of the rules `not_text, empty, not_utf8, too_long, control, backslash,
    absolute, empty_segment, dot_segment, segment_too_long, protected, too_deep, not_nfc`.
    """
    if not isinstance(raw, str):
        raise PathRefused(raw, "not_text")
    if not raw:
        raise PathRefused(raw, "empty")
    try:
        size = len(raw.encode())
    except UnicodeEncodeError:
        raise PathRefused(raw, "not_utf8") from None
    if size > MAX_PATH_BYTES:
        raise PathRefused(raw, "too_long")
    if not raw.isprintable() and any(unicodedata.category(c) == "Cc" for c in raw):
        raise PathRefused(raw, "control")
    if "\\" in raw:
        raise PathRefused(raw, "backslash")
    if raw[0] == "/":
        raise PathRefused(raw, "absolute")
    for segment in raw.split("/"):
        if not segment:
            raise PathRefused(raw, "empty_segment")
        if segment in (".", ".."):
            raise PathRefused(raw, "dot_segment")
        if segment in PROTECTED:
            raise PathRefused(raw, "protected")
        if size > MAX_SEGMENT_BYTES and len(segment.encode()) > MAX_SEGMENT_BYTES:
            raise PathRefused(raw, "segment_too_long")
    if raw.count("/") >= MAX_SEGMENTS:
        raise PathRefused(raw, "too_deep")
    if not unicodedata.is_normalized("NFC", raw):
        raise PathRefused(raw, "not_nfc")
    return RelPath(raw)


def parents(path: RelPath) -> Iterable[RelPath]:
    """Every directory above `path`, nearest last: `a/b/c` gives `a`, `a/b`."""
    at = path.find("/")
    while at != -1:
        yield RelPath(path[:at])
        at = path.find("/", at + 1)


def digest_of(content: bytes) -> Digest:
    """SHA-256 of `content`, as the protocol writes it."""
    return Digest(hashlib.sha256(content).hexdigest())


class Entry(Struct, frozen=True, gc=False):
    """One path of a tree. `digest` None is a tombstone: the path was deleted at `version`.

    `size` in bytes. `revision`: the commit that made it so, or a later one by which it was known to hold; 0 when
    the sender counts none. `provisional`: what is on disk is not confirmed by the database (an optimistic write,
    or another process's); `version` is then that of the last confirmed content.
    """

    version: int
    digest: Digest | None
    size: int = 0
    executable: bool = False
    revision: int = 0
    provisional: bool = False

    @property
    def is_file(self) -> bool:
        return self.digest is not None


class Cursor(Struct, frozen=True, gc=False):
    """How far the tree has followed its project.

    `revision`: everything up to and including it is applied. `islands`: revisions above it that were applied
    while something below was missing. `epoch` None: the history is not known yet (a plain zip).
    """

    epoch: str | None = None
    revision: int = 0
    islands: frozenset[int] = frozenset()

    def with_revision(self, revision: int) -> Cursor:
        """The cursor after `revision` is applied, islands joined where they touch."""
        if revision <= self.revision or revision in self.islands:
            return self
        if revision != self.revision + 1:
            return Cursor(self.epoch, self.revision, self.islands | {revision})
        head = revision
        while head + 1 in self.islands:
            head += 1
        return Cursor(self.epoch, head, frozenset(r for r in self.islands if r > head))

    def at_least(self, revision: int) -> Cursor:
        """The cursor after catch-up answered for everything up to `revision`."""
        head = max(self.revision, revision)
        while head + 1 in self.islands:
            head += 1
        return Cursor(self.epoch, head, frozenset(r for r in self.islands if r > head))


class Tree(Struct, frozen=True, gc=False):
    """What is on disk, as far as the agent put it there, and how far it has followed the project."""

    cursor: Cursor = Cursor()
    entries: Map[RelPath, Entry] = field(default_factory=Map)

    def files(self) -> dict[RelPath, Entry]:
        """The current files, tombstones left out."""
        return {path: entry for path, entry in self.entries.items() if entry.is_file}

    def hash(self) -> str:
        """The protocol's `tree_hash`, comparable with the server's."""
        return _hash_of(self.entries)


def _hash_of(entries: Mapping[RelPath, Entry]) -> str:
    return tree_hash({path: each.digest for path, each in entries.items() if each.digest is not None})


def tree_hash(digests: Mapping[RelPath, Digest]) -> str:
    """SHA-256 over `{path}\\0{digest}\\n` of all current files, sorted by the path's UTF-8 bytes."""
    whole = hashlib.sha256()
    for path in sorted(digests, key=str.encode):
        whole.update(f"{path}\0{digests[path]}\n".encode())
    return whole.hexdigest()


class Patch(Struct, frozen=True, gc=False):
    """What makes a file's bytes of those whose digest is `base`.

    `splices`: where in the base, how many bytes of it go, what comes there; in bytes, ascending, not overlapping.
    """

    base: Digest
    splices: tuple[tuple[int, int, bytes], ...]

    def applied_to(self, base: bytes) -> bytes | None:
        """Return what the splices make of `base`; None when they do not fit."""
        parts: list[bytes] = []
        at = 0
        for offset, removed, insert in self.splices:
            if not at <= offset <= offset + removed <= len(base):
                return None
            parts += (base[at:offset], insert)
            at = offset + removed
        return b"".join((*parts, base[at:]))


class Change(Struct, frozen=True, gc=False):
    """What the database says became of one path. `digest` None: deleted.

    `content` None on an update: by reference, the bytes must be fetched, or made with `patch`. `version` None: the
    sender does not count versions (the seed's plain form).
    """

    path: RelPath
    digest: Digest | None
    version: int | None = None
    content: bytes | None = None
    size: int | None = None
    executable: bool = False
    patch: Patch | None = None

    @property
    def is_delete(self) -> bool:
        return self.digest is None

    @property
    def by_reference(self) -> bool:
        return self.digest is not None and self.content is None


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong that a person should see: `kind` is the metric's label, `rule` its refinement.

    `waiting`: it is tried again by itself.
    """

    kind: ProblemKind
    detail: str
    path: str | None = None
    rule: str | None = None
    waiting: bool = False


class Commit(Struct, frozen=True, gc=False):
    """One transaction of the project: `file:update`, `file:delete` or `bulk:apply`.

    `revision` and `epoch` None: the seed's plain form. `complete` False: a doorbell without its changes.
    `timestamp`: Unix seconds of the commit, by the database's clock; `received_at`: of its frame, by ours.
    `problems`: per-path refusals found while reading it. `trace`: the writer's span.
    """

    event: str
    changes: tuple[Change, ...]
    revision: int | None = None
    epoch: str | None = None
    timestamp: float | None = None
    complete: bool = True
    problems: tuple[Problem, ...] = ()
    trace: TraceParent | None = None
    received_at: float | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a snapshot contains, and where in the project's history it stands.

    `files`: what each is to be, at the manifest's own revision: the very entries that the tree gets, since there may be
    tens of thousands.
    `base_revision` set: a delta, valid only on a tree at or above that revision. `deleted`: path → version.
    `problems`: the files that the orchestrator left out, since it has not got their bytes.
    `build_seconds`: how long the orchestrator took, when it says so.
    """

    project_id: str
    epoch: str
    revision: int
    files: Mapping[RelPath, Entry]
    deleted: Mapping[RelPath, int]
    base_revision: int | None = None
    build_seconds: float | None = None
    problems: tuple[Problem, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def hash(self) -> str:
        """The `tree_hash` of a tree that holds just this."""
        return _hash_of(self.files)


class Write(Struct, frozen=True, gc=False):
    """Make `path` hold exactly `entry`. The bytes are `content`, or are already in staging as `staged`."""

    path: RelPath
    entry: Entry
    content: bytes | None = None
    staged: str | None = None


class Remove(Struct, frozen=True, gc=False):
    """Make `path` not exist. `entry` is the tombstone to remember."""

    path: RelPath
    entry: Entry


Operation = Write | Remove
