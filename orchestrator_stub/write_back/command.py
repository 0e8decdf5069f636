"""The command `write-back`: says what a project's containers may give back, and shows what waits for a decision."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb

from orchestrator_stub.platform.database import Pool
from orchestrator_stub.write_back.presets import PRESETS, Rule, rules_of

WAITING: Final = "select kept_id, file_path, size_bytes from public.list_{}(%s)"


def add_command(commands: Any, find: Callable[[argparse.Namespace], tuple[UUID, str]]) -> None:
    """Add `write-back` to the command line. `find` says which project is meant, and where its database is."""
    parser = commands.add_parser(
        "write-back",
        help="say what a project's containers may give back: lock files, routes, formatted sources",
        description="Say which files that tools make in a project's containers go back into the project. Without an "
        "option: show it, and what waits for a decision. docs/write-back.md says what each preset trusts.",
        epilog="examples:\n  preview-orchestrator write-back - --preset lock --preset routes\n"
        "  preview-orchestrator write-back - --preset lock --authored 'src/components/**'\n"
        "  preview-orchestrator write-back - --take 6f1c…\n"
        "  preview-orchestrator write-back - --off",
    )
    parser.add_argument("project", help="the project's id, or `-` for that of the `dev` that runs here")
    parser.add_argument(
        "--preset", action="append", default=[], choices=sorted(PRESETS), help="a set of rules (repeatable)"
    )
    parser.add_argument(
        "--generated", action="append", default=[], metavar="GLOB", help="written at once (repeatable)"
    )
    parser.add_argument(
        "--authored", action="append", default=[], metavar="GLOB", help="proposed to members (repeatable)"
    )
    parser.add_argument("--off", action="store_true", help="take all rules away")
    decision = parser.add_mutually_exclusive_group()
    decision.add_argument("--show", type=UUID, metavar="ID", help="print what a tool made and what waits")
    decision.add_argument("--take", type=UUID, metavar="ID", help="write what waits into the project")
    decision.add_argument("--drop", type=UUID, metavar="ID", help="drop what waits: the project's stays")
    parser.add_argument("--force", action="store_true", help="--take over a newer version")
    parser.add_argument("--json", action="store_true", help="the rules that are in force, as one JSON array")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(".preview-sync"),
        help="state directory of a running `dev` (default: .preview-sync)",
    )
    parser.add_argument("--database-url", help="default: DATABASE_URL, else that of a running `dev`")

    def run(arguments: argparse.Namespace) -> int:
        try:
            run_write_back(*find(arguments), arguments, print)
        except psycopg.Error as error:
            said = error.diag.message_primary or " ".join(str(error).split())
            sys.stderr.write(f"preview-orchestrator: cannot write-back: {said}\n")
            return 1
        return 0

    parser.set_defaults(run=run)


def presets(text: str) -> tuple[str, ...]:
    """Read names of presets, apart by commas. Raises `argparse.ArgumentTypeError`."""
    names = tuple(text.split(","))
    if unknown := set(names) - PRESETS.keys():
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(sorted(PRESETS))}")
    return names


def wanted_rules(arguments: argparse.Namespace) -> list[Rule] | None:
    """The rules that the options name, authored globs first, since they are the more careful; None: they name none."""
    if arguments.off:
        return []
    rules: list[Rule] = [
        *({"glob": glob, "mode": "authored"} for glob in arguments.authored),
        *({"glob": glob, "mode": "generated"} for glob in arguments.generated),
        *rules_of(arguments.preset),
    ]
    return list({str(rule["glob"]): rule for rule in reversed(rules)}.values())[::-1] if rules else None


SET: Final = "select public.set_write_back(%s, %s)"


async def put_in_force(pool: Pool, project: UUID, rules: list[Rule]) -> None:
    """Put a project's rules in force. Raises `psycopg.Error`."""
    async with pool.connection() as connection:
        await connection.execute(SET, (project, Jsonb([dict(rule) for rule in rules])))


def run_write_back(
    project: UUID, dsn: str, arguments: argparse.Namespace, say: Callable[[str], object]
) -> None:
    """Change what the options say, and show what is in force. Raises `psycopg.Error`."""
    with psycopg.connect(dsn, autocommit=True, connect_timeout=10) as db:
        if arguments.show or arguments.take or arguments.drop:
            say(_decided(db, project, arguments))
            return
        rules = wanted_rules(arguments)
        if rules is not None:
            db.execute(SET, (project, Jsonb([dict(rule) for rule in rules])))
        rows = db.execute(
            "select glob, mode, max_bytes, deletes from public.list_write_back(%s)", (project,)
        ).fetchall()
        if arguments.json:
            names = ("glob", "mode", "max_bytes", "deletes")
            say(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
            return
        if not rows:
            say("write-back is off: nothing that a container makes goes back into the project")
        for glob, mode, max_bytes, deletes in rows:
            say(f"{mode:<9}  up to {max_bytes} bytes{', deletions too' if deletes else ''}  {glob}")
        waits = [
            f"{kind[:-1]:<9}  {kept_id}  {size} bytes  {path}"
            for kind in ("conflicts", "proposals")
            for kept_id, path, size in db.execute(WAITING.format(kind).encode(), (project,)).fetchall()
        ]
        for line in waits:
            say(line)
        if waits:
            say("decide with --show ID, --take ID (the tool's) or --drop ID (the project's stays)")


def _decided(db: psycopg.Connection[Any], project: UUID, arguments: argparse.Namespace) -> str:
    """Show, take or drop one conflict or proposal. Returns what is to be said. Raises `psycopg.Error`."""
    kept: UUID = arguments.show or arguments.take or arguments.drop
    found = db.execute("select content from public.list_conflicts(%s, %s)", (project, kept)).fetchone()
    if arguments.show:
        found = (
            found
            or db.execute("select content from public.list_proposals(%s, %s)", (project, kept)).fetchone()
        )
        if found is None:
            return f"nothing waits under {kept}"
        return "a deletion" if found[0] is None else str(found[0])
    if found is not None:
        statement, more = (
            "select public.resolve_conflict(%s, %s, %s)",
            ["kept" if arguments.take else "current"],
        )
    elif arguments.take:
        statement, more = "select public.accept_proposal(%s, %s, %s)", [arguments.force]
    else:
        statement, more = "select public.reject_proposal(%s, %s)", []
    row = db.execute(statement.encode(), (project, kept, *more)).fetchone()
    told: dict[str, Any] = row[0] if row else {}
    at = f" in revision {told['revision']}" if told.get("revision") else ""
    return f"{told['file_path']}: the tool's was {told['state']}{at}"
