"""The command line and how it fails."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _cannot_import(error: ModuleNotFoundError) -> str:
    """The one sentence for a package that is not installed. A module of our own that is missing is a bug: raised."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "agent", "orchestrator_stub"):
        raise error
    return (
        f"preview-orchestrator: {package} is not installed; install this package with its extra, "
        "as in pip install '.[orchestrator]'"
    )


try:
    from orchestrator_stub import commands, help_texts
    from orchestrator_stub.commands import EXIT_SETTINGS
    from orchestrator_stub.config import SettingsError
    from orchestrator_stub.relay.command import add_commands as add_nats
    from orchestrator_stub.write_back.command import add_command as add_write_back
    from orchestrator_stub.write_back.command import presets
except ModuleNotFoundError as missing:
    sys.exit(_cannot_import(missing))


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with a meaning: 0 done or asked to stop, 1 failed, 64 bad settings."""
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.run(arguments)
    except SettingsError as error:
        sys.stderr.write("".join(f"preview-orchestrator: {problem}\n" for problem in error.problems))
        code = EXIT_SETTINGS
    except ModuleNotFoundError as error:
        sys.exit(_cannot_import(error))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """Keeps the lines of a description; its subcommands' parsers are of this class too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="preview-orchestrator", description=help_texts.ABOUT, epilog=help_texts.EXIT_CODES)
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_dev(parsers)
    serve = parsers.add_parser("serve", help="run the control plane", description=help_texts.SERVE)
    serve.set_defaults(run=commands.serve)

    door = parsers.add_parser(
        "door", help="run the proxy that browsers reach previews through", description=help_texts.DOOR
    )
    door.set_defaults(run=commands.door)

    relay = parsers.add_parser(
        "relay", help="take events from the database to NATS", description=help_texts.RELAY
    )
    relay.set_defaults(run=commands.relay)
    add_nats(parsers)

    standing_in = parsers.add_parser(
        "stand-in", help="serve Supabase's URLs over a PostgreSQL of yours", description=help_texts.STAND_IN
    )
    standing_in.set_defaults(run=commands.stand_in)

    secrets = parsers.add_parser(
        "secrets", help="fill in the empty secrets of an environment file", description=help_texts.SECRETS
    )
    secrets.set_defaults(run=commands.secrets)

    _add_migrate(parsers)
    doctor = parsers.add_parser(
        "doctor", help="try each part that previews need", description=help_texts.DOCTOR
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object a line")
    doctor.set_defaults(run=commands.doctor)

    machines = parsers.add_parser("machines", help="list the machines, and whose session each has")
    machines.add_argument("--json", action="store_true", help="one JSON object a line")
    machines.set_defaults(run=commands.machines)

    modules = parsers.add_parser(
        "modules", help="build, list and drop dependency layers", description=help_texts.MODULES
    )
    parts = modules.add_subparsers(dest="what", required=True, metavar="COMMAND")
    build = parts.add_parser(
        "build", help="install from a lock file alone, without scripts, and share the result"
    )
    build.add_argument("source", help="a directory with a package.json, or a project's id")
    listed = parts.add_parser("list", help="every layer, whose it is, and when it was used last")
    listed.add_argument("--json", action="store_true", help="one JSON object a line")
    dropped = parts.add_parser("drop", help="forget layers; their objects follow within hours")
    dropped.add_argument("which", help="a key, or a project's id")
    modules.set_defaults(run=commands.modules)

    _add_rollout(parsers)

    tail = parsers.add_parser("tail", help="print a project's events as they happen")
    _add_project(tail)
    tail.add_argument("--json", action="store_true", help="the events whole, one JSON object a line")
    tail.set_defaults(run=commands.tail)

    _add_history(parsers)
    add_write_back(parsers, commands.project_and_database)
    return parser


def _add_dev(parsers: Any) -> None:
    dev = parsers.add_parser("dev", help="run it all on this machine", description=help_texts.DEV)
    dev.add_argument(
        "dir", nargs="?", type=Path, default=Path(),
        help="a project with a dev server, as Vite's, or a page alone (default: the current directory)",
    )  # fmt: skip
    dev.add_argument(
        "--port", type=_port, default=54321, metavar="N",
        help="of the editor page and the Supabase URL (default: 54321). 0: any that is free, for the preview too",
    )  # fmt: skip
    dev.add_argument(
        "--state", type=Path, default=Path(".preview-sync"),
        help="the directory of database, logs and copies of the project (default: .preview-sync)",
    )  # fmt: skip
    dev.add_argument(
        "--json", action="store_true", help="JSON lines on standard output, progress on standard error"
    )
    dev.add_argument("--once", action="store_true", help="start, time one edit, stop: a smoke test")
    dev.add_argument(
        "--no-watch", action="store_true", help="read DIR once, and do not follow what is saved in it"
    )
    dev.add_argument("--no-editor", action="store_true", help="neither build nor serve the editor page")
    dev.add_argument(
        "--include", action="append", default=[], metavar="PATTERN",
        help="save to the project what git's ignore rules leave out: .env.local, 'certs/' (repeatable)",
    )  # fmt: skip
    dev.add_argument(
        "--write-back", type=presets, default=(), metavar="PRESETS",
        help="take what tools in the container make into the project and DIR: lock,routes,prisma,format",
    )  # fmt: skip
    dev.add_argument(
        "--timeline", action="store_true", help="print what each part of the start took, as bars"
    )
    dev.add_argument("--database-url", help="a PostgreSQL to use instead of the embedded one (superuser)")
    dev.add_argument(
        "--transport", choices=("realtime", "nats"), default="realtime",
        help="by which way the agent hears events; nats starts a server of its own (default: realtime)",
    )  # fmt: skip
    dev.add_argument("--faults", action="store_true", help="let tests break Realtime on request")
    dev.set_defaults(run=commands.dev)


def _add_migrate(parsers: Any) -> None:
    migration = parsers.add_parser("migrate", help="apply supabase/migrations to a database")
    migration.add_argument("--database-url", help="default: DATABASE_URL")
    migration.add_argument(
        "--bootstrap", action="store_true", help="on a plain PostgreSQL: make what Supabase's has, first"
    )
    migration.add_argument(
        "--check", action="store_true", help="change nothing; say everything that is in the way"
    )
    migration.add_argument(
        "--adopt-files",
        action="store_true",
        help="take a table public.project_files over: moved to the schema preview, its rows adopted, itself kept",
    )
    migration.set_defaults(run=commands.migrate_database)


def _add_project(parser: argparse.ArgumentParser) -> None:
    """Which project a command is about, by its id or by a `dev` that runs."""
    parser.add_argument("project", help="the project's id, or `-` for that of the `dev` that runs here")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(".preview-sync"),
        help="state directory of a running `dev` (default: .preview-sync)",
    )


def _add_history(parsers: Any) -> None:
    """`log`, `show`, `diff` and `restore`: what happened to a project, and how to go back."""

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = parsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  preview-orchestrator {name} - {example}\n\n{help_texts.HISTORY}",
        )
        _add_project(parser)
        parser.add_argument("--database-url", help="default: DATABASE_URL, else that of a running `dev`")
        parser.set_defaults(run=commands.history, command=name)
        return parser

    log = command("log", "print a project's commits and turns, newest first", "--limit 5")
    log.add_argument(
        "--limit", type=int, default=20, metavar="N", help="at most so many commits (default: 20)"
    )
    log.add_argument("--json", action="store_true", help="one JSON object a line, with up to 100 paths")
    show = command("show", "print one commit and what it changed", "12")
    show.add_argument("revision", help="its number, or a checkpoint's name")
    diff = command(
        "diff", "print what changed between two revisions, as `git apply` reads it", "12 15 > changes.patch"
    )
    diff.add_argument(
        "start", metavar="from", help="a revision's number, or a checkpoint's name; 0: from nothing"
    )
    diff.add_argument("upto", metavar="to", nargs="?", help="the same (default: now)")
    restore = command("restore", "make a project as it was at a revision, in one new commit", "12")
    restore.add_argument("revision", help="its number, or a checkpoint's name")


def _add_rollout(parsers: Any) -> None:
    rollout = parsers.add_parser(
        "rollout",
        help="give sessions a new agent image, or the former one again",
        description=help_texts.ROLLOUT,
        epilog=help_texts.ROLLOUT_EXAMPLES,
    )
    rollout.add_argument("image", nargs="?", help="as AGENT_IMAGE names one (local driver: a directory)")
    rollout.add_argument(
        "--share", type=_share, default=1.0, help="of the sessions: 10%% or 0.1 (default: all)"
    )
    rollout.add_argument(
        "--idle", type=float, default=60.0, metavar="SECONDS",
        help="a session is idle without an open page and so long without a save (default: 60; 0: replace all now)",
    )  # fmt: skip
    rollout.add_argument(
        "--at-once", type=int, default=4, metavar="N", help="replaced at the same time (default: 4)"
    )
    rollout.add_argument("--database-url", help="default: DATABASE_URL")
    rollout.set_defaults(run=commands.rollout)


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError("a share is above 0 and at most 100%, as in 10% or 0.1")
    return share


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is 0 to 65535")
    return port


if __name__ == "__main__":
    main()
