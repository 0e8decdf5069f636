"""Runs each command of `preview-orchestrator`: what goes wrong is one line on standard error and an exit code.

What only one command needs is imported when it runs: an extra that is not installed keeps the others from nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
import psycopg

from orchestrator_stub.config import Settings, SettingsError, StandInSettings
from orchestrator_stub.platform.migrations import (
    MigrationError,
    MigrationRefused,
    bootstrap,
    check,
    migrate,
)

EXIT_FAILED = 1
EXIT_SETTINGS = 64
"""As the agent's: bad settings (sysexits EX_USAGE)."""


def dev(arguments: argparse.Namespace) -> int:
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


def serve(_: argparse.Namespace) -> int:
    from orchestrator_stub.server.processes import run_serve

    return _until_stopped(run_serve(Settings.from_environment()))


def door(_: argparse.Namespace) -> int:
    from orchestrator_stub.config import DoorSettings
    from orchestrator_stub.server.processes import run_door

    return _until_stopped(run_door(DoorSettings.from_environment()))


def relay(_: argparse.Namespace) -> int:
    from orchestrator_stub.config import RelaySettings
    from orchestrator_stub.server.processes import run_relay

    return _until_stopped(run_relay(RelaySettings.from_environment()))


def stand_in(_: argparse.Namespace) -> int:
    from orchestrator_stub.devstack.stand_in import run_stand_in

    return _until_stopped(run_stand_in(StandInSettings.from_environment()))


def _until_stopped(serving: Coroutine[Any, Any, int]) -> int:
    """Run a process that serves; what keeps it from its start is one line."""
    from orchestrator_stub.process import CannotServe

    try:
        return asyncio.run(serving)
    except CannotServe as error:
        sys.stderr.write(f"preview-orchestrator: {error}\n")
        return EXIT_FAILED


def secrets(_: argparse.Namespace) -> int:
    from orchestrator_stub.local_supabase.secrets import filled_in

    try:
        sys.stdout.write(filled_in(sys.stdin.read()))
    except ValueError as error:
        sys.stderr.write(f"preview-orchestrator: {error}\n")
        return EXIT_FAILED
    return 0


def migrate_database(arguments: argparse.Namespace) -> int:
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


def doctor(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.doctor.examination import run_doctor

    return 0 if asyncio.run(run_doctor(print, as_json=arguments.json)) else EXIT_FAILED


def machines(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.machines.driver import MachineError
    from orchestrator_stub.process import CannotServe
    from orchestrator_stub.server.processes import run_machines
    from orchestrator_stub.sessions.store import Unmigrated

    settings = Settings.from_environment()
    try:
        asyncio.run(run_machines(settings, print, as_json=arguments.json))
    except (CannotServe, MachineError, Unmigrated, psycopg.Error) as error:
        sys.stderr.write(f"preview-orchestrator: cannot list the machines: {' '.join(str(error).split())}\n")
        return EXIT_FAILED
    return 0


def rollout(arguments: argparse.Namespace) -> int:
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


def modules(arguments: argparse.Namespace) -> int:
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


def tail(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.devstack.tail import run_tail

    return asyncio.run(run_tail(arguments.project, arguments.state, as_json=arguments.json))


def history(arguments: argparse.Namespace) -> int:
    from orchestrator_stub.snapshots.history import History

    project, dsn = project_and_database(arguments)
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


def project_and_database(arguments: argparse.Namespace) -> tuple[UUID, str]:
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
