"""Record what the agent wrote and how far it has followed the project, so that a restart goes on from there.

One SQLite file outside the project. A commit is one transaction in write-ahead mode: a SIGKILL between any two
system calls leaves the ledger before it or after it, never between. The ledger may lag behind the disk (work is
done again), it never runs ahead of it: `record` is called with what *is* on disk. Paths about to appear for the
first time are named by `intend` before they are written, so that a file whose record was lost is still known to be
ours.

A loss of power can cost more than a SIGKILL, because files are not synced one by one (it would make hydration six
times slower). Therefore what is loaded is not believed: `ProjectDir.audit_steps` compares it with the disk.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from immutables import Map

from agent.core.errors import PathRefused, RootUnusable, Unavailable
from agent.core.model import Cursor, Digest, Entry, ProblemKind, RelPath, Tree, Write, parse_path
from agent.fs.inspect import FileStat
from agent.fs.places import open_directory
from agent.fs.transaction import Done

FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCHEMA = """
create table cursor (
  one integer primary key check (one = 1), epoch text, revision integer not null, islands text not null
) strict;
create table files (
  path text primary key, version integer not null, digest text, size integer not null, executable integer not null,
  revision integer not null, provisional integer not null,
  inode integer, bytes integer, mtime_ns integer, ctime_ns integer
) strict, without rowid;
create table directories (path text primary key) strict, without rowid;
create table intended (path text primary key) strict, without rowid;
"""


@dataclass(frozen=True, slots=True)
class LedgerState:
    """What the ledger holds.

    `stats`: each file's stat when it was written. `directories`: those the agent made. `intended`: paths that may
    have been written although no record followed.
    """

    tree: Tree
    stats: dict[RelPath, FileStat]
    directories: frozenset[RelPath] = frozenset()
    intended: frozenset[RelPath] = frozenset()

    @property
    def leftovers(self) -> frozenset[RelPath]:
        """Files that an interrupted batch may have put there and the tree does not have: to be discarded.

        A tombstone is no file: a path deleted once and being written anew when the kill came is a leftover too.
        """
        entries = self.tree.entries
        return frozenset(p for p in self.intended if (entry := entries.get(p)) is None or not entry.is_file)


class LedgerFailed(Unavailable):
    """The ledger could not be written now. `kind`: the problem that this is; `lost`: its file is damaged and thrown
    away, so that only a whole tree makes a ledger again.
    """

    def __init__(self, what: str, error: Exception) -> None:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF
        self.kind: ProblemKind = _KINDS.get(code, "io_error")
        self.lost = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        super().__init__("the ledger", f"cannot {what}: {error}")


_KINDS: Mapping[int, ProblemKind] = {
    sqlite3.SQLITE_FULL: "disk_full",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_PERM: "permission_denied",
    sqlite3.SQLITE_AUTH: "permission_denied",
}
"""By SQLite's code; every other error of its file is the disk's (`io_error`)."""


class Ledger:
    """The durable record. One owner at a time: a second one is refused when it opens.

    Raises `RootUnusable` when the state directory cannot be used at the start, and `LedgerFailed` when a record could
    not be written now (disk full): what was not written is kept and goes with the next one, so no gap can arise.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sql: sqlite3.Connection | None = None
        self._unwritten: dict[RelPath, Done] = {}
        self._made: dict[RelPath, bool] = {}
        self._intentions = False
        self._anew = False
        """What is unwritten is a whole tree, which takes the place of everything recorded."""
        self._was_open = False

    def load(self) -> LedgerState | None:
        """What an earlier run recorded; None when there is nothing, or nothing that can be believed.

        A torn or foreign file is thrown away, so that the next `replace` or `record` starts a new ledger.
        """
        state = None
        self._check_directory()
        if self._path.exists():
            try:
                state = self._read(self._open())
            except (sqlite3.DatabaseError, ValueError, PathRefused) as error:
                if isinstance(error, sqlite3.Error) and _is_access(error):
                    self.close()
                    raise RootUnusable(f"cannot read the ledger {self._path}: {error}") from error
        if state is None:
            self._discard()
        return state

    def intend(self, paths: Collection[RelPath]) -> None:
        """Say which paths are about to appear for the first time. Settled by the next `record` or `replace`.

        Raises `LedgerFailed`; nothing must be written then.
        """
        if not paths:
            return
        with self._transaction("note intentions") as sql:
            sql.executemany("insert or ignore into intended values (?)", ((path,) for path in paths))
        self._intentions = True

    def note(
        self, done: Iterable[Done], *, made: Iterable[RelPath] = (), gone: Iterable[RelPath] = ()
    ) -> None:
        """Keep what is now true for the next `record`. Until then a kill costs work: it is found out again.

        `made` and `gone` are directories that the agent made and removed (`TransactionResult.made`, `.gone`).
        """
        for each in done:
            self._unwritten[each.operation.path] = each
        self._made.update(dict.fromkeys(made, True))
        self._made.update(dict.fromkeys(gone, False))

    def record(
        self,
        done: Iterable[Done],
        cursor: Cursor,
        *,
        made: Iterable[RelPath] = (),
        gone: Iterable[RelPath] = (),
    ) -> None:
        """Record what is now true, noted before or given here, and the cursor that follows, in one transaction."""
        self.note(done, made=made, gone=gone)
        with self._transaction("record") as sql:
            if self._anew:
                sql.execute("delete from files")
                sql.execute("delete from directories")
            sql.executemany(
                "insert or replace into files values (?,?,?,?,?,?,?,?,?,?,?)",
                (_row(d.operation.path, d.operation.entry, d.stat) for d in self._unwritten.values()),
            )
            for path, present in self._made.items():
                if present:
                    sql.execute("insert or ignore into directories values (?)", (path,))
                else:
                    sql.execute("delete from directories where path = ?", (path,))
            self._settle(sql, cursor)
        self._settled()

    def replace(
        self, tree: Tree, stats: Mapping[RelPath, FileStat], directories: Iterable[RelPath] = ()
    ) -> None:
        """Record a whole tree in place of everything recorded before.

        When that fails the tree is kept and takes their place with the next `record`.
        """
        try:
            with self._transaction("record the tree") as sql:
                sql.execute("delete from files")
                sql.execute("delete from directories")
                sql.executemany(
                    "insert into files values (?,?,?,?,?,?,?,?,?,?,?)",
                    (_row(path, entry, stats.get(path)) for path, entry in tree.entries.items()),
                )
                sql.executemany(
                    "insert or ignore into directories values (?)", ((path,) for path in directories)
                )
                self._settle(sql, tree.cursor)
        except LedgerFailed:
            self._anew = True
            self._unwritten = {p: Done(Write(p, e), stats.get(p)) for p, e in tree.entries.items()}
            self._made = dict.fromkeys(directories, True)
            raise
        self._settled()

    def close(self) -> None:
        """Fold the write-ahead file into the ledger and release it."""
        if self._sql is not None:
            with suppress(sqlite3.Error):
                self._sql.close()
            self._sql = None

    def _settle(self, sql: sqlite3.Connection, cursor: Cursor) -> None:
        if self._intentions:
            sql.execute("delete from intended")
        sql.execute(
            "insert or replace into cursor values (1,?,?,?)",
            (cursor.epoch, cursor.revision, json.dumps(sorted(cursor.islands))),
        )

    def _settled(self) -> None:
        self._unwritten.clear()
        self._made.clear()
        self._intentions = self._anew = False

    @contextmanager
    def _transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        try:
            sql = self._sql or self._create()
            sql.execute("begin immediate")
            try:
                yield sql
                sql.execute("commit")
            except BaseException:
                if sql.in_transaction:
                    sql.execute("rollback")
                raise
        except sqlite3.Error as error:
            failed = LedgerFailed(what, error)
            if failed.lost:
                with suppress(RootUnusable):
                    self._discard()
            raise failed from error
        except RootUnusable as error:
            if not self._was_open:
                raise
            raise LedgerFailed(what, error) from error

    def _open(self) -> sqlite3.Connection:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._check_directory()
            sql = sqlite3.connect(self._path, isolation_level=None, timeout=0, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise RootUnusable(f"cannot open the ledger {self._path}: {error}") from error
        self._sql, self._was_open = sql, True
        # Exclusive: one owner, and no shared memory file to be left behind by a kill.
        sql.execute("pragma locking_mode = exclusive")
        # Synced at checkpoints only: a SIGKILL loses nothing, a loss of power at most the newest records.
        sql.execute("pragma journal_mode = wal")
        sql.execute("pragma synchronous = normal")
        return sql

    def _check_directory(self) -> None:
        """Raise `RootUnusable` if another directory stands there, or a link to one."""
        try:
            os.close(open_directory(self._path.parent))
        except FileNotFoundError:
            return
        except OSError as error:
            raise RootUnusable(
                f"cannot use the state directory {self._path.parent}: {error.strerror}"
            ) from error

    def _create(self) -> sqlite3.Connection:
        try:
            sql = self._open()
            sql.executescript(f"begin immediate; {_SCHEMA} pragma user_version = {FORMAT}; commit;")
        except sqlite3.Error:
            self.close()
            raise
        return sql

    def _discard(self) -> None:
        self.close()
        for suffix in ("", "-wal", "-shm", "-journal"):
            try:
                Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            except OSError as error:
                raise RootUnusable(f"cannot replace the ledger {self._path}: {error}") from error

    def _read(self, sql: sqlite3.Connection) -> LedgerState | None:
        """The recorded state. Raises `sqlite3.DatabaseError`, `ValueError` or `PathRefused` for a damaged one."""
        if sql.execute("pragma user_version").fetchone()[0] != FORMAT:
            return None
        if sql.execute("pragma quick_check(1)").fetchone()[0] != "ok":
            return None
        cursor = sql.execute("select epoch, revision, islands from cursor").fetchone()
        intended = frozenset(parse_path(path) for (path,) in sql.execute("select path from intended"))
        self._intentions = bool(intended)
        if cursor is None and not intended:
            return None
        entries: dict[RelPath, Entry] = {}
        stats: dict[RelPath, FileStat] = {}
        for row in sql.execute("select * from files"):
            path = parse_path(row[0])
            digest = row[2]
            if digest is not None and not _DIGEST.fullmatch(digest):
                raise ValueError(f"the ledger's digest of {path!r} is none")
            entries[path] = Entry(
                version=row[1],
                digest=None if digest is None else Digest(digest),
                size=row[3],
                executable=bool(row[4]),
                revision=row[5],
                provisional=bool(row[6]),
            )
            if digest is not None and None not in row[7:]:
                stats[path] = FileStat.from_columns(row[7:])
        epoch, revision, islands = cursor or (None, 0, "[]")
        position = Cursor(epoch, revision, frozenset(int(each) for each in json.loads(islands)))
        directories = frozenset(parse_path(path) for (path,) in sql.execute("select path from directories"))
        return LedgerState(Tree(position, Map(entries)), stats, directories, intended)


def _row(path: RelPath, entry: Entry, stat: FileStat | None) -> tuple[object, ...]:
    columns: tuple[object, ...] = (None,) * 4 if stat is None else stat.columns
    return (
        path,
        entry.version,
        entry.digest,
        entry.size,
        entry.executable,
        entry.revision,
        entry.provisional,
        *columns,
    )


def _is_access(error: sqlite3.Error) -> bool:
    """Whether an error speaks of access to the file (in use, not permitted, no space), not of its content."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    return code & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_NOMEM,
    )
