"""Prints a project's history and goes back in it: the commands `log`, `show`, `diff` and `restore`.

Each is a call of the database's own RPCs (`list_commits`, `diff_project`, `restore_project`), so that what a person
sees here is what a product's page shows. A commit whose every version was forgotten is not in the log any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from orchestrator_stub.config import SettingsError

SHOWN_PATHS: Final = 3
"""Of a commit, in the form for people."""

PAGE: Final = 1000
"""Commits that one call gives."""

SIGNS: Final = {"create": "+", "update": "", "delete": "-"}

COMMITS: Final = "select * from public.list_commits(%(project)s, %(limit)s, %(before)s)"

CHECKPOINTS: Final = "select name, revision from public.list_checkpoints(%(project)s) where not automatic"

HEAD: Final = "select revision from public.project_heads where project_id = %(project)s"

OPEN: Final = """
select id as turn, label, begun_by as author, begun_at as at, files, bytes, expires_at < clock_timestamp() as lapsed
from preview.turns where project_id = %(project)s and state = 'open' order by begun_at desc
"""


@dataclass(frozen=True, slots=True)
class History:
    """One project of the database at `dsn`. Lines go to `write`; `terminal`: somebody reads them at one.

    Methods raise `psycopg.Error` when the database does not answer or refuses, `SettingsError` for a checkpoint or a
    commit that is not there.
    """

    dsn: str
    project: UUID
    write: Callable[[str], object]
    terminal: bool = False

    def log(self, limit: int, *, as_json: bool = False) -> None:
        """Open turns, then at most `limit` commits, newest first, a line each."""
        with self._connected() as db:
            turns = db.execute(OPEN.encode(), {"project": self.project}).fetchall()
            commits = self._commits(db, limit)
            names = self._checkpoints(db)
        for turn in turns:
            self._print("turn", turn, _turn, as_json=as_json)
        for commit in commits:
            commit["checkpoints"] = [
                name for name, revision in names.items() if revision == commit["revision"]
            ]
            self._print("commit", commit, _commit, as_json=as_json)

    def show(self, wanted: str) -> None:
        """One commit: its line, and what it changed."""
        with self._connected() as db:
            revision = self._revision(db, wanted)
            commits, head = self._commits(db, 1, before=revision + 1), self._head(db)
            if not 0 < revision <= head:
                raise SettingsError([f"there is no revision {revision}: the project is at revision {head}"])
            for commit in commits:
                if commit["revision"] == revision:
                    self.write(_commit({**commit, "checkpoints": []}))
            self._print_diff(db, revision - 1, revision)

    def diff(self, start: str, upto: str | None) -> None:
        """What changed from one revision to another, or to now, as `git apply` reads it."""
        with self._connected() as db:
            self._print_diff(
                db, self._revision(db, start), None if upto is None else self._revision(db, upto)
            )

    def restore(self, wanted: str) -> None:
        """Make the project as it was at a revision, in one new commit."""
        with self._connected() as db:
            revision = self._revision(db, wanted)
            row = db.execute(
                "select public.restore_project(%s, %s) as answer", (self.project, revision)
            ).fetchone()
        assert row is not None
        answer: dict[str, Any] = row["answer"]
        if answer["changed"] == 0:
            self.write(
                f"revision {answer['revision']} is already as revision {revision} was; nothing was changed"
            )
            return
        self.write(
            f"revision {answer['revision']} is as revision {revision} was: {_count(answer['changed'])} changed\n"
            f"to take that back: preview-orchestrator restore {self.project} {answer['revision'] - 1}"
        )

    def _connected(self) -> psycopg.Connection[dict[str, Any]]:
        return psycopg.connect(self.dsn, row_factory=dict_row)

    def _commits(
        self, db: psycopg.Connection[dict[str, Any]], limit: int, before: int | None = None
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while len(found) < limit:
            most = min(PAGE, limit - len(found))
            values = {"project": self.project, "limit": most, "before": before}
            page = db.execute(COMMITS.encode(), values).fetchall()
            found += map(_said, page)
            if len(page) < most:
                break
            before = found[-1]["revision"]
        return found

    def _checkpoints(self, db: psycopg.Connection[dict[str, Any]]) -> Mapping[str, int]:
        rows = db.execute(CHECKPOINTS.encode(), {"project": self.project}).fetchall()
        return {row["name"]: row["revision"] for row in rows}

    def _head(self, db: psycopg.Connection[dict[str, Any]]) -> int:
        row = db.execute(HEAD.encode(), {"project": self.project}).fetchone()
        return row["revision"] if row is not None else 0

    def _revision(self, db: psycopg.Connection[dict[str, Any]], wanted: str) -> int:
        """The revision that a person means: its number, or a checkpoint's name."""
        if wanted.isascii() and wanted.isdigit() and len(wanted) < 19:
            return int(wanted)
        names = self._checkpoints(db)
        if wanted not in names:
            raise SettingsError([f"{wanted!r} is neither a revision's number nor the name of a checkpoint"])
        return names[wanted]

    def _print_diff(self, db: psycopg.Connection[dict[str, Any]], start: int, upto: int | None) -> None:
        row = db.execute(
            "select public.diff_project(%s, %s, %s) as text", (self.project, start, upto)
        ).fetchone()
        assert row is not None
        for line in row["text"].split("\n")[:-1]:
            # In a file or a pipe it is for `git apply`, and so as it is.
            self.write(_printable(line) if self.terminal else line)

    def _print(
        self, kind: str, row: dict[str, Any], line: Callable[[dict[str, Any]], str], *, as_json: bool
    ) -> None:
        self.write(json.dumps({"kind": kind, **row}, default=str) if as_json else line(row))


def _said(row: dict[str, Any]) -> dict[str, Any]:
    """A commit under the names of this command."""
    return {
        "revision": row["revision"],
        "at": row["changed_at"],
        "author": row["changed_by"],
        "author_name": row["changed_by_name"],
        "files": row["files"],
        "bytes": row["bytes"],
        "paths": [f"{SIGNS[each['action']]}{each['file_path']}" for each in row["changes"]],
        "turn": row["turn_id"],
        "label": row["label"],
    }


def _turn(row: dict[str, Any]) -> str:
    state = "open, its lease has run out" if row["lapsed"] else "open"
    return f"turn {row['turn']} {state}: {_count(row['files'])}, {row['bytes']} bytes{_label(row)}"


def _commit(row: dict[str, Any]) -> str:
    paths = row["paths"][:SHOWN_PATHS]
    more = row["files"] - len(paths)
    named = ", ".join([*map(_printable, paths), *([f"and {more} more"] if more else [])])
    turn = f"  turn {row['turn']}{_label(row)}" if row["turn"] else ""
    kept = "".join(f"  checkpoint “{_printable(name)}”" for name in row["checkpoints"])
    who = _printable(row["author_name"] or str(row["author"] or "nobody")[:8])
    return (
        f"{row['revision']:>6}  {row['at']:%Y-%m-%d %H:%M:%S}  {who}  {_count(row['files'])}, {row['bytes']} bytes: "
        f"{named}{turn}{kept}"
    )


def _count(number: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}"


def _label(row: dict[str, Any]) -> str:
    return f" “{_printable(row['label'])}”" if row["label"] else ""


def _printable(text: str) -> str:
    """A label, a path or a line is somebody else's text: it must not move the cursor."""
    return "".join(
        letter if letter.isprintable() or letter == "\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
