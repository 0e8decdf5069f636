"""The tables of docs/measured.md and README, from a run's JSON: text in, text out.

What is quoted is listed here, and every figure of it is looked up; README has the few rows marked `first`. A row that
the run had to refuse says so in the table; those that it does not have are counted under it, by measurement.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.harness.results import figure

BEGIN = "<!-- measured: made by `make bench-readme` from bench/results/latest.json, not by hand -->"
END = "<!-- /measured -->"


@dataclass(frozen=True, slots=True)
class Quoted:
    """One row of the table: what readers see, and which row of the run it is. `peer` None: it has none."""

    what: str
    module: str
    name: str
    peer: str | None = None
    against: str = ""
    first: bool = False
    """Also in README: what somebody wants to know who has not seen the project before."""


_MIRRORS = ("inotifywait + cp", "inotifywait + rsync", "lsyncd", "unison", "syncthing")

QUOTED = (
    *(
        Quoted("one event, editor's socket to the file, p50", "mirror", "event to file, p50", peer,
               first=peer == "lsyncd")
        for peer in _MIRRORS
    ),
    Quoted("the same, p99", "mirror", "event to file, p99", "lsyncd"),
    *(
        Quoted("one save through PostgreSQL, p50", "mirror", "save in PostgreSQL to file, p50", peer,
               first=peer == "lsyncd")
        for peer in ("inotifywait + cp", "lsyncd", "syncthing")
    ),
    *(
        Quoted("500 files at once, to the last rename", "mirror", "burst of 500 files, events", peer,
               first=peer == "lsyncd")
        for peer in _MIRRORS
    ),
    Quoted("500 files in one transaction of PostgreSQL", "mirror", "500 files saved in one transaction", "lsyncd"),
    Quoted("an event on the wire to its file, p50", "sync", "event to disk, p50", "websocket round trip",
           "a bare websocket round trip"),
    Quoted("hydrating 2,000 files, 20 MB", "hydrate", "hydrate 2,000 files, 20 MB", "bsdtar", "curl into bsdtar",
           first=True),
    Quoted("hydrating 20,000 files, 200 MB", "hydrate", "hydrate 20,000 files, 200 MB", "bsdtar",
           "curl into bsdtar"),
    Quoted("hydrating 50 incompressible files of 4 MB", "hydrate", "hydrate 50 x 4 MB incompressible", "bsdtar",
           "curl into bsdtar"),
    Quoted("memory that hydrating 20,000 files takes, until they are in place", "hydrate",
           "  memory, hydrated: 20,000 files in place"),
    Quoted("one 1 KB change applied: JSON, SHA-256, stage, rename", "apply", "apply 1 KB", "C temp+rename",
           "a C program's temp file and rename", first=True),
    Quoted("the same with 10 KB", "apply", "apply 10 KB", "C temp+rename", "a C program's temp file and rename"),
    Quoted("the same with 100 KB", "apply", "apply 100 KB", "C temp+rename", "a C program's temp file and rename"),
    Quoted("the same with 100 KB, where no disk holds C's rename up", "apply", "apply 100 KB, ext4 in memory",
           "C temp+rename", "a C program's temp file and rename"),
    Quoted("receive and decode 1 KB broadcasts", "link", "receive + decode, 1 KB broadcasts", "realtime",
           "the official Python client", first=True),
    Quoted("a 2 KB save in the database: version, revision, broadcast", "database",
           "database: upsert 2 KB, 1 connection", "bare insert", "a bare insert of the row", first=True),
    Quoted("a save in a file of 388 KB, with what changed as splices", "history", "history: a save of 388 KB",
           "without splices", "the same without splices"),
    Quoted("what travels of a newer version in a lock file of 388 KB", "history",
           "history: bytes of a version bumped, 388 KB"),
    Quoted("10,000 versions of a file of 20 KB, in the table", "history", "history: 10,000 versions of 20 KB"),
    Quoted("a whole tree to Vite's first page", "start", "tree whole to first page", "vite by hand",
           "Vite by hand", first=True),
    Quoted("a session's `sync`, nothing missing", "control", "sync answering `current`", "a bare route",
           "a bare route"),
    Quoted("a save on the screen, from its rename", "screen", "screen: rename to painted, p50", "vite alone",
           "Vite alone, from a direct write"),
    Quoted("a turn of 40 files on the screen", "screen", "screen: turn of 40 files to painted", "vite, git checkout",
           "Vite alone, from `git checkout`"),
    Quoted("a page of 230 modules through the door", "door", "door: a page of 230 modules", "directly", "directly"),
    Quoted("what the door adds to a hot update's round trip", "door", "door: round trip of a hot update, added"),
    Quoted("an open socket at the door, memory", "door", "door: an open socket"),
    Quoted("a sleeping session's page of now, from the wake", "door", "door: wake to the page of now"),
    Quoted("the whole agent at rest, memory", "idle", "whole agent at rest, resident", first=True),
    Quoted("the whole agent at rest, processor", "idle", "whole agent at rest, processor", first=True),
    Quoted("the same over NATS, memory", "idle", "the same over NATS, resident"),
    Quoted("what a relay takes to NATS in a second of its processor", "relay", "relay, 1 KB events"),
    Quoted("a save over NATS, from the RPC's return, later than over Realtime", "relay",
           "a save over NATS, later than Realtime"),
)  # fmt: skip
SCREEN = (
    Quoted("one file, rename to painted", "screen", "screen: rename to painted, p50", "vite alone",
           "Vite alone, from a direct write"),
    Quoted("one save, database to painted", "screen", "screen: database to painted, p50"),
    Quoted("told by the session API, after the second frame", "screen", "screen: told after the second frame, p50"),
    *(
        each
        for files in (40, 200)
        for each in (
            Quoted(f"a turn of {files} files, database to painted", "screen",
                   f"screen: turn of {files} files to painted", "vite, git checkout",
                   "Vite alone, from `git checkout`"),
            Quoted("wrong states, refused requests and page errors in all of them", "screen",
                   f"screen: turn of {files} files, what went wrong"),
            Quoted("of them kept the page's state", "screen", f"screen: turn of {files} files, state kept"),
        )
    ),
    Quoted("40 single saves, the page before its components: right within 2 s", "screen",
           "screen: 40 single saves, page first, right within 2 s"),
    Quoted("Vite's start with the hook", "screen", "screen: Vite's start with the hook", "vite alone"),
    Quoted("the agent with an open page, processor", "screen", "screen: agent with an open page, processor"),
    Quoted("growth under 2,000 forged errors a second", "screen",
           "screen: growth under 2,000 forged errors a second"),
)  # fmt: skip
"""What docs/screen.md shows."""

FIRST = tuple(quoted for quoted in QUOTED if quoted.first)


def rows_of(run: Mapping[str, Any], module: str) -> list[dict[str, Any]]:
    """The rows of one measurement; none when it was not made."""
    return list(run["results"].get(module, {}).get("rows", ()))


def found(run: Mapping[str, Any], quoted: Quoted) -> dict[str, Any] | None:
    """The run's row."""
    for row in rows_of(run, quoted.module):
        if row["name"] == quoted.name and row["peer"] == quoted.peer:
            return row
    return None


def amount(value: float, unit: str) -> str:
    """A figure with its unit, three figures of it."""
    if unit == "µs" and value >= 1000:
        value, unit = value / 1000, "ms"
    if unit == "ms" and value >= 1000:
        value, unit = value / 1000, "s"
    digits = f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {unit}"


def _wanted(row: Mapping[str, Any]) -> str:
    if row["at_least"] is not None:
        bound = f"≥ {row['at_least']:g}"
    elif row["at_most"] is not None:
        bound = f"≤ {row['at_most']:g}"
    else:
        return ""
    return (
        bound if row["result"] == "met" else f"{bound}: **not met**" if row["result"] == "NOT MET" else bound
    )


def _line(quoted: Quoted, row: Mapping[str, Any]) -> str:
    against = quoted.against or quoted.peer or ""
    if failure := row.get("failure"):
        return f"| {quoted.what} | {against} | not compared: {failure} | {_wanted(row)} |"
    if row["ours"] is None:
        return f"| {quoted.what} | {against} | refused: too noisy | {_wanted(row)} |"
    if row["ratio"] is None:
        return f"| {quoted.what} | | {amount(row['ours'], row['unit'])} | {_wanted(row)} |"
    low, high = (figure(value) for value in row["interval"])
    of = "speed" if row["sense"] == "speed" else row["sense"]
    ratio = f"{figure(row['ratio'])} × its {of} ({low}–{high}), {amount(row['ours'], row['unit'])}"
    return f"| {quoted.what} | {against} | {ratio} | {_wanted(row)} |"


def _lines(run: Mapping[str, Any], rows: Sequence[Quoted], plot: str) -> Iterator[str]:
    machine = run["machine"]
    yield run.get("note") or (
        f"One run of `make bench-save` on {run['at'][:10]}: {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['system']}, {run['seconds'] / 60:.0f} minutes."
    )
    yield ""
    yield "| what | against | ratio (95 %), ours | wanted |"
    yield "|---|---|---|---|"
    absent: Counter[str] = Counter()
    for quoted in rows:
        if row := found(run, quoted):
            yield _line(quoted, row)
        else:
            absent[quoted.module] += 1
    if absent:
        yield ""
        counted = ", ".join(f"{count} of `{module}`" for module, count in absent.items())
        yield f"Rows that this table has room for and this run does not have: {counted}."
    if plot and len(rows) > sum(absent.values()):
        yield ""
        yield plot


def table(run: Mapping[str, Any], rows: Sequence[Quoted] = QUOTED, plot: str = "") -> str:
    """The table with the sentence above it, and a picture below it, if any of the rows was measured."""
    return "\n".join(_lines(run, rows, plot))


def with_table(page: str, run: Mapping[str, Any], rows: Sequence[Quoted] = QUOTED, plot: str = "") -> str:
    """A page with this run's table between the two marks. Raises `ValueError` when they are not there."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"there is no place for the table: put {BEGIN} and {END} into the page")
    return f"{before}{BEGIN}\n{table(run, rows, plot)}\n{END}{after}"
