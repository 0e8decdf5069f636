"""The command line and how it fails."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID


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
    import httpx
    import psycopg

    from orchestrator_stub import help_texts
    from orchestrator_stub.config import Settings, SettingsError, StandInSettings
    from orchestrator_stub.platform.migrations import (
        MigrationError,
        MigrationRefused,
        bootstrap,
        check,
        migrate,
    )
    from orchestrator_stub.relay.command import add_commands as add_nats
    from orchestrator_stub.write_back.command import add_command as add_write_back
    from orchestrator_stub.write_back.command import presets
except ModuleNotFoundError as missing:
    sys.exit(_cannot_import(missing))

EXIT_FAILED = 1
EXIT_SETTINGS = 64
"""As the agent's: bad settings (sysexits EX_USAGE)."""


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_dev(commands)
    serve = commands.add_parser("serve", help="run the control plane", description=help_texts.SERVE)
    serve.set_defaults(run=_serve)

    door = commands.add_parser(
        "door", help="run the proxy that browsers reach previews through", description=help_texts.DOOR
    )
    door.set_defaults(run=_door)

    relay = commands.add_parser(
        "relay", help="take events from the database to NATS", description=help_texts.RELAY
    )
    relay.set_defaults(run=_relay)
    add_nats(commands)

    standing_in = commands.add_parser(
        "stand-in", help="serve Supabase's URLs over a PostgreSQL of yours", description=help_texts.STAND_IN
    )
    standing_in.set_defaults(run=_stand_in)

    secrets = commands.add_parser(
        "secrets", help="fill in the empty secrets of an environment file", description=help_texts.SECRETS
    )
    secrets.set_defaults(run=_secrets)

    _add_migrate(commands)
    doctor = commands.add_parser(
        "doctor", help="try each part that previews need", description=help_texts.DOCTOR
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object a line")
    doctor.set_defaults(run=_doctor)

    machines = commands.add_parser("machines", help="list the machines, and whose session each has")
    machines.add_argument("--json", action="store_true", help="one JSON object a line")
    machines.set_defaults(run=_machines)

    modules = commands.add_parser(
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
    modules.set_defaults(run=_modules)

    _add_rollout(commands)

    tail = commands.add_parser("tail", help="print a project's events as they happen")
    _add_project(tail)
    tail.add_argument("--json", action="store_true", help="the events whole, one JSON object a line")
    tail.set_defaults(run=_tail)

    _add_history(commands)
    add_write_back(commands, _project_and_database)
    return parser


def _add_dev(commands: Any) -> None:
    dev = commands.add_parser("dev", help="run it all on this machine", description=help_texts.DEV)
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
    dev.set_defaults(run=_dev)


def _add_migrate(commands: Any) -> None:
    migration = commands.add_parser("migrate", help="apply supabase/migrations to a database")
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
    migration.set_defaults(run=_migrate)


def _add_project(parser: argparse.ArgumentParser) -> None:
    """Which project a command is about, by its id or by a `dev` that runs."""
    parser.add_argument("project", help="the project's id, or `-` for that of the `dev` that runs here")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(".preview-sync"),
        help="state directory of a running `dev` (default: .preview-sync)",
    )


def _add_history(commands: Any) -> None:
    """`log`, `show`, `diff` and `restore`: what happened to a project, and how to go back."""

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  preview-orchestrator {name} - {example}\n\n{help_texts.HISTORY}",
        )
        _add_project(parser)
        parser.add_argument("--database-url", help="default: DATABASE_URL, else that of a running `dev`")
        parser.set_defaults(run=_history, command=name)
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


def _add_rollout(commands: Any) -> None:
    rollout = commands.add_parser(
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
    rollout.set_defaults(run=_rollout)


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


def _dev(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.devstack.stack import run_dev
    from orchestrator_stub.devstack.terminal import CannotStart, DevOptions

    options = DevOptions(
        directory=arguments.dir,
        state=arguments.state,
        port=arguments.port,
        as_json=arguments.json,
        once=arguments.once,
        watch=not arguments.no_watch,
        editor=not (arguments.no_editor or arguments.once),
        database_url=arguments.database_url,
        include=tuple(arguments.include),
        write_back=arguments.write_back,
        faults=arguments.faults,
        transport=arguments.transport,
        timeline=arguments.timeline,
    )
    try:
        return asyncio.run(run_dev(options))
    except CannotStart as error:
        sys.stderr.write(f"preview-orchestrator: {error}\n")
    except httpx.HTTPError as error:
        sys.stderr.write(f"preview-orchestrator: the local stack stopped answering: {error!r}\n")
    return EXIT_FAILED


def _serve(_: argparse.Namespace) -> int:
    from orchestrator_stub.server import run_serve

    return _until_stopped(run_serve(Settings.from_environment()))


def _door(_: argparse.Namespace) -> int:
    from orchestrator_stub.config import DoorSettings
    from orchestrator_stub.server import run_door

    return _until_stopped(run_door(DoorSettings.from_environment()))


def _relay(_: argparse.Namespace) -> int:
    from orchestrator_stub.config import RelaySettings
    from orchestrator_stub.server import run_relay

    return _until_stopped(run_relay(RelaySettings.from_environment()))


def _stand_in(_: argparse.Namespace) -> int:
    from orchestrator_stub.devstack.stand_in import run_stand_in

    return _until_stopped(run_stand_in(StandInSettings.from_environment()))


def _until_stopped(serving: Coroutine[Any, Any, int]) -> int:
    """Run a process that serves; what keeps it from its start is one line."""
    from orchestrator_stub.server import CannotServe

    try:
        return asyncio.run(serving)
    except CannotServe as error:
        sys.stderr.write(f"preview-orchestrator: {error}\n")
        return EXIT_FAILED


def _secrets(_: argparse.Namespace) -> int:
    from orchestrator_stub.local_supabase.secrets import filled_in

    try:
        sys.stdout.write(filled_in(sys.stdin.read()))
    except ValueError as error:
        sys.stderr.write(f"preview-orchestrator: {error}\n")
        return EXIT_FAILED
    return 0


def _migrate(arguments: argparse.Namespace) -> int:
    dsn = arguments.database_url or Settings.database_url_from_environment()

    async def run() -> list[str]:
        if arguments.check:
            return await check(dsn, adopt_files=arguments.adopt_files)
        if arguments.bootstrap:
            await bootstrap(dsn)
        return await migrate(dsn, adopt_files=arguments.adopt_files)

    try:
        applied = asyncio.run(run())
    except MigrationRefused as error:
        sys.stderr.write("".join(f"preview-orchestrator: {problem}\n" for problem in error.problems))
        return EXIT_FAILED
    except (MigrationError, psycopg.Error, OSError) as error:
        sys.stderr.write(f"preview-orchestrator: cannot migrate: {' '.join(str(error).split())}\n")
        return EXIT_FAILED
    done = "nothing is in the way of" if arguments.check else "applied"
    sys.stdout.write("".join(f"{done} {version}\n" for version in applied) or "nothing to apply\n")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.doctor.examination import run_doctor

    return 0 if asyncio.run(run_doctor(print, as_json=arguments.json)) else EXIT_FAILED


def _machines(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.machines.driver import MachineError
    from orchestrator_stub.server import CannotServe, run_machines
    from orchestrator_stub.sessions.store import Unmigrated

    settings = Settings.from_environment()
    try:
        asyncio.run(run_machines(settings, print, as_json=arguments.json))
    except (CannotServe, MachineError, Unmigrated, psycopg.Error) as error:
        sys.stderr.write(f"preview-orchestrator: cannot list the machines: {' '.join(str(error).split())}\n")
        return EXIT_FAILED
    return 0


def _rollout(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.sessions.rollout import Stopped, run_rollout

    dsn = arguments.database_url or Settings.database_url_from_environment()

    def say(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    try:
        asyncio.run(
            run_rollout(
                dsn,
                arguments.image,
                say,
                share=arguments.share,
                idle=arguments.idle,
                at_once=max(1, arguments.at_once),
            )
        )
    except Stopped as error:
        sys.stderr.write(f"preview-orchestrator: the rollout stopped: {error}\n")
        return EXIT_FAILED
    except psycopg.Error as error:
        sys.stderr.write(f"preview-orchestrator: cannot roll out: {' '.join(str(error).split())}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nNew sessions go on getting the image; the same command goes on with running ones.\n"
        )
        raise
    return 0


def _modules(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.modules import operator
    from orchestrator_stub.platform.storage import StorageFailure

    settings = Settings.from_environment()
    try:
        match arguments.what:
            case "build":
                asyncio.run(operator.build(settings, arguments.source, print))
            case "list":
                asyncio.run(operator.show(settings, print, as_json=arguments.json))
            case _:
                asyncio.run(operator.drop(settings, arguments.which, print))
    except (operator.CannotBuild, StorageFailure, psycopg.Error, OSError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        sys.stderr.write("".join(f"preview-orchestrator: {line}\n" for line in lines))
        return EXIT_FAILED
    return 0


def _tail(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.devstack.tail import run_tail

    return asyncio.run(run_tail(arguments.project, arguments.state, as_json=arguments.json))


def _history(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.snapshots.history import History

    project, dsn = _project_and_database(arguments)
    history = History(dsn, project, print, terminal=sys.stdout.isatty())
    try:
        match arguments.command:
            case "log":
                history.log(max(0, arguments.limit), as_json=arguments.json)
            case "show":
                history.show(arguments.revision)
            case "diff":
                history.diff(arguments.start, arguments.upto)
            case "restore":
                history.restore(arguments.revision)
    except psycopg.Error as error:
        refused = error.diag.message_primary
        said = (
            f"{refused} {error.diag.message_hint or ''}".strip() if refused else " ".join(str(error).split())
        )
        sys.stderr.write(f"preview-orchestrator: cannot {arguments.command}: {said}\n")
        return EXIT_FAILED
    return 0


def _project_and_database(arguments: argparse.Namespace) -> tuple[UUID, str]:
    """Which project is meant, and where its database is. Raises `SettingsError`."""
    from orchestrator_stub.devstack.state_directory import running_dev

    dev: dict[str, Any] = {}
    dsn = arguments.database_url or os.environ.get("DATABASE_URL")
    if arguments.project == "-" or not dsn:
        with suppress(OSError, ValueError):
            dev = running_dev(arguments.state)
    try:
        project = UUID(dev.get("project_id", "") if arguments.project == "-" else arguments.project)
    except (ValueError, AttributeError):
        where = (
            f"no `preview-orchestrator dev` runs in {arguments.state}"
            if arguments.project == "-"
            else "it is no UUID"
        )
        raise SettingsError(
            [f"PROJECT must be a project's id, or `-` beside a running dev: {where}"]
        ) from None
    if arguments.project == "-":
        dsn = arguments.database_url or dev["database_url"]
    dsn = dsn or dev.get("database_url")
    return project, dsn or Settings.database_url_from_environment()


if __name__ == "__main__":
    main()
