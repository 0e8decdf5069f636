"""Prints a project's commits, newest first, each with the turn that it was, and the turns that are still open.

Read from the versions that are kept: a commit whose every version was pruned is not there any more. The database
forgets which turn a commit was a day after the turn's end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

SHOWN_PATHS: Final = 3
"""Of a commit, in the form for people."""

ALL_PATHS: Final = 2**31 - 1

COMMITS: Final = """
select f.revision, min(f.created_at) as at, f.created_by as author, count(*)::int as files,
  (array_agg(case when f.is_deleted then '-' else '' end || f.file_path order by f.file_path))[:%(paths)s] as paths,
  t.id as turn, t.label
from public.project_files f
left join preview.turns t on t.project_id = f.project_id and t.revision = f.revision
where f.project_id = %(project)s
group by f.revision, f.created_by, t.id, t.label
order by f.revision desc limit %(limit)s
"""

OPEN: Final = """
select id as turn, label, begun_by as author, begun_at as at, files, bytes, expires_at < clock_timestamp() as lapsed
from preview.turns where project_id = %(project)s and state = 'open' order by begun_at desc
"""


def print_log(
    dsn: str, project: UUID, limit: int, write: Callable[[str], object], *, as_json: bool = False
) -> None:
    """Open turns, then commits, a line each. Raises `psycopg.Error`."""
    values = {"project": project, "limit": limit, "paths": ALL_PATHS if as_json else SHOWN_PATHS}
    with psycopg.connect(dsn, row_factory=dict_row) as db:
        turns = db.execute(OPEN.encode(), values).fetchall()
        commits = db.execute(COMMITS.encode(), values).fetchall()
    for kind, rows, line in (("turn", turns, _turn), ("commit", commits, _commit)):
        for row in rows:
            write(json.dumps({"kind": kind, **row}, default=str) if as_json else line(row))


def _turn(row: dict[str, Any]) -> str:
    state = "open, its lease has run out" if row["lapsed"] else "open"
    return f"turn {row['turn']} {state}: {_count(row['files'])}, {row['bytes']} bytes{_label(row)}"


def _commit(row: dict[str, Any]) -> str:
    more = row["files"] - len(row["paths"])
    paths = ", ".join([*map(_printable, row["paths"]), *([f"and {more} more"] if more else [])])
    turn = f"  turn {row['turn']}{_label(row)}" if row["turn"] else ""
    return f"{row['revision']:>6}  {row['at']:%Y-%m-%d %H:%M:%S}  {_count(row['files'])}: {paths}{turn}"


def _count(number: int) -> str:
    return f"{number} file{'' if number == 1 else 's'}"


def _label(row: dict[str, Any]) -> str:
    return f" “{_printable(row['label'])}”" if row["label"] else ""


def _printable(text: str) -> str:
    """A label or a path is somebody else's text: it must not move the cursor."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
