"""Keeps outputs and replaced files, with their bytes, in SQLite until the orchestrator has answered.

One SQLite file in STATE_DIR: an output, its base and its bytes are one transaction, so a kill finds all or none. As the
ledger it is synced at checkpoints only: a SIGKILL loses nothing, a loss of power at most the newest. There is no file
until there are rules.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import orjson
from msgspec import structs

from agent.core.globs import Rule
from agent.core.model import Digest, parse_path
from agent.write_back.states import Output

FORMAT = 1
MOST_OUTPUTS = 1_000
MOST_BYTES = 64 * 2**20
"""On record at once. Past it the oldest of those that were refused go, then nothing new is taken."""

_SCHEMA = """
create table rules (one integer primary key check (one = 1), rules text not null) strict;
create table outputs (
  number integer primary key, path text not null, base integer not null, digest text, size integer not null,
  executable integer not null, epoch text, kept integer not null, offer text, refused text, content blob
) strict;
"""


class StoreFailed(Exception):
    """The record could not be written, or is full."""


_ACCESS = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
    }
    | {sqlite3.SQLITE_FULL, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_IOERR}
)
"""Failures that speak of access to the file and not of what is in it."""


class Store:
    """The record at `path`. Every method but `load` raises `StoreFailed`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sql: sqlite3.Connection | None = None
        self.unread: str | None = None
        """Why what is on record could not be read: nothing is written then, since it would go over that."""

    def load(self) -> tuple[tuple[Rule, ...], list[Output], int]:
        """Return the rules that held last, the outputs on record, and the last number.

        A damaged file is put aside; one that cannot be read now stays (`unread`).
        """
        if not self._path.exists():
            return (), [], 0
        try:
            sql = self._open()
            found = sql.execute("select rules from rules").fetchone()
            rules = tuple(Rule(**each) for each in orjson.loads(found[0])) if found else ()
            last = sql.execute("select coalesce(max(number), 0) from outputs").fetchone()[0]
            return rules, [_output(row) for row in sql.execute(_SELECT)], last
        except (sqlite3.Error, StoreFailed, ValueError, TypeError) as error:
            self.close()
            code = getattr(error, "sqlite_errorcode", None)
            if code is not None and code & 0xFF in _ACCESS:
                self.unread = f"the record of write-back cannot be read: {error}"
                return (), [], 0
            with contextlib.suppress(OSError):
                self._path.rename(self._path.with_suffix(".damaged"))
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(OSError):
                    Path(f"{self._path}{suffix}").unlink(missing_ok=True)
            return (), [], 0

    def set_rules(self, rules: Sequence[Rule]) -> None:
        """Remember what may be given back: a start knows it before the orchestrator is asked."""
        written = orjson.dumps([structs.asdict(rule) for rule in rules]).decode()
        self._write("insert or replace into rules values (1, ?)", [(written,)])

    def add(self, output: Output, content: bytes | None) -> None:
        """Record an output and its bytes."""
        self._make_room(len(content or b""))
        row = (
            output.number, output.path, output.base, output.digest, output.size, output.executable, output.epoch,
            output.kept, output.offer, None, content,
        )  # fmt: skip
        self._write("insert or replace into outputs values (?,?,?,?,?,?,?,?,?,?,?)", [row])

    def update(self, outputs: Iterable[Output]) -> None:
        """Record what else is known of outputs: their offer, and that they are on the disk no more."""
        rows = [(each.offer, each.kept, each.number) for each in outputs]
        self._write("update outputs set offer = ?, kept = ? where number = ?", rows)

    def remove(self, numbers: Iterable[int]) -> None:
        """Forget outputs that somebody else has."""
        self._write("delete from outputs where number = ?", [(number,) for number in numbers])

    def refuse(self, number: int, rule: str) -> None:
        """Keep the bytes of an output that nobody took and that is nowhere else, for a person, while there is room."""
        self._write("update outputs set refused = ?, offer = null where number = ?", [(rule, number)])

    def content(self, number: int) -> bytes | None:
        """Return an output's bytes; None for a deletion."""
        with self._failing() as sql:
            found = sql.execute("select content from outputs where number = ?", (number,)).fetchone()
        return found[0] if found else None

    @property
    def refused(self) -> int:
        """How many refused outputs are kept for a person."""
        with self._failing() as sql:
            count: int = sql.execute("select count(*) from outputs where refused is not null").fetchone()[0]
        return count

    def close(self) -> None:
        """Release the file."""
        if self._sql is not None:
            with contextlib.suppress(sqlite3.Error):
                self._sql.close()
            self._sql = None

    def _make_room(self, size: int) -> None:
        with self._failing() as sql:
            while True:
                many, much = sql.execute("select count(*), coalesce(sum(size), 0) from outputs").fetchone()
                if many < MOST_OUTPUTS and much + size <= MOST_BYTES:
                    return
                oldest = sql.execute("select min(number) from outputs where refused is not null").fetchone()[
                    0
                ]
                if oldest is None:
                    raise StoreFailed(f"{many} outputs of {much} bytes wait already")
                sql.execute("delete from outputs where number = ?", (oldest,))

    def _write(self, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
        with self._failing() as sql:
            sql.execute("begin immediate")
            try:
                sql.executemany(statement, rows)
                sql.execute("commit")
            except BaseException:
                if sql.in_transaction:
                    sql.execute("rollback")
                raise

    @contextlib.contextmanager
    def _failing(self) -> Iterator[sqlite3.Connection]:
        if self.unread is not None:
            raise StoreFailed(self.unread)
        try:
            yield self._sql or self._open()
        except (sqlite3.Error, OSError) as error:
            raise StoreFailed(f"cannot record an output: {error}") from error

    def _open(self) -> sqlite3.Connection:
        new = not self._path.exists()
        sql = sqlite3.connect(self._path, isolation_level=None, timeout=0, check_same_thread=False)
        try:
            sql.execute("pragma locking_mode = exclusive")
            sql.execute("pragma journal_mode = wal")
            sql.execute("pragma synchronous = normal")
            if new:
                sql.executescript(f"begin immediate; {_SCHEMA} pragma user_version = {FORMAT}; commit;")
            elif sql.execute("pragma user_version").fetchone()[0] != FORMAT:
                raise StoreFailed("the record is of another version")
        except BaseException:
            sql.close()
            raise
        self._sql = sql
        return sql


_SELECT = """
select number, path, base, digest, size, executable, epoch, kept, offer from outputs where refused is null
order by number
"""


def _output(row: tuple[object, ...]) -> Output:
    number, path, base, digest, size, executable, epoch, kept, offer = row
    return Output(
        int(str(number)), parse_path(path), int(str(base)), None if digest is None else Digest(str(digest)),
        int(str(size)), bool(executable), None if epoch is None else str(epoch), bool(kept),
        None if offer is None else str(offer),
    )  # fmt: skip
