"""Parses the command line of `preview-agent` and runs the command; the exit code says how it ended."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from agent import __version__
from agent.core.errors import AgentError

EXITS = """exit codes:
  0   asked to stop, and drained          70  token or snapshot rejected for good
  1   a bug                               71  project directory unusable
  64  bad settings                        75  dev server failed for good (DEV_ESSENTIAL=true)
  69  hydration impossible

Settings come from the environment: PROJECT_ID, SESSION_ID, SNAPSHOT_URL, REALTIME_TOKEN, REALTIME_URL,
SESSION_API_URL and the settings that docs/settings.md lists."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="preview-agent",
        description="Keeps a directory, and the dev server that serves it, equal to the database's current tree.",
        epilog=EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"preview-agent {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="hydrate, start the dev server, follow the project until told to stop")
    commands.add_parser("check", help="settings, reach, permissions, disk, ports, Node: one line each")
    status = commands.add_parser(
        "status",
        help="what the running agent is doing, on one screen",
        epilog="exit codes: 0 ready, 1 running and not ready, 69 nobody answers",
    )
    status.add_argument("--json", action="store_true", help="the whole report as JSON")
    status.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    status.add_argument(
        "--url", help="of its health server (default: http://127.0.0.1:$HEALTH_PORT, or 9464)"
    )
    modules = commands.add_parser("modules", help="dependency layers: a project's key, or a layer to share")
    parts = modules.add_subparsers(dest="what", required=True, metavar="COMMAND")
    key = parts.add_parser("key", help="print what names the layer of a project on this machine")
    key.add_argument("directory", type=Path, help="of its package.json")
    packed = parts.add_parser(
        "pack", help="install from the lock file alone, without any script, and pack the result"
    )
    packed.add_argument("directory", type=Path, help="of its package.json")
    packed.add_argument("file", type=Path, help="the archive to write; it must not be there yet")
    record = commands.add_parser("record", help="write a scenario from the live channel, until Ctrl-C")
    record.add_argument("scenario", type=Path, help="the file to write; its snapshot goes beside it as .zip")
    record.add_argument("--seconds", type=float, help="end by itself")
    _add_replay(commands)
    return parser


def _add_replay(commands: Any) -> None:
    replay = commands.add_parser(
        "replay",
        help="run recorded scenarios against a directory; 0 when all end equal",
        epilog="exit codes: 0 all ended as expected, 1 one did not (and how), 64 one cannot be read",
    )
    replay.add_argument("scenario", type=Path, nargs="+", help="JSON Lines, as `record` writes them")
    replay.add_argument(
        "--directory", type=Path, help="empty or new, for project, staging and ledger (default: temporary)"
    )
    replay.add_argument(
        "--real-time", action="store_true", help="at the recorded pace instead of as fast as it goes"
    )
    replay.add_argument(
        "--dev-server",
        action="store_true",
        help="with the project's dev server, which must serve the end (DEV_COMMAND and the like as for run)",
    )
    replay.add_argument(
        "--shuffle", type=int, metavar="SEED", help="deliver in a disorder that SEED reproduces"
    )
    replay.add_argument(
        "--duplicate", type=_probability, default=0.0, metavar="P", help="deliver twice, with probability P"
    )
    replay.add_argument(
        "--drop", type=_probability, default=0.0, metavar="P", help="lose, with probability P"
    )
    replay.add_argument("--disconnect", type=_count, default=0, metavar="N", help="break the channel N times")
    replay.add_argument("--crash", type=_count, default=0, metavar="N", help="kill the agent N times")
    replay.add_argument("--json", type=Path, metavar="FILE", help="write a report as JSON")
    replay.add_argument("--junit", type=Path, metavar="FILE", help="write a report as JUnit XML")


def _probability(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no probability from 0 to 1")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def command(words: Sequence[str]) -> int:
    """Run the command; return the exit code. Raises `SystemExit` for `--help` and bad usage."""
    arguments = _parser().parse_args(words)
    commands = {"run": _run, "check": _check, "status": _status, "record": _record, "replay": _replay,
                "modules": _modules}  # fmt: skip
    try:
        return commands[arguments.command](arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has closed the pipe (`| head`): what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except AgentError as error:
        for line in str(error).splitlines():
            print(f"preview-agent: {line}", file=sys.stderr)  # noqa: T201 - the log may not be set up yet
        return error.exit_code


# What a command needs is imported in it: `--help` should not wait for the whole agent.


def _run(_: argparse.Namespace) -> int:
    import asyncio

    from agent.config import read_environment
    from agent.daemon import run
    from agent.telemetry.loop import WatchedLoop

    with asyncio.Runner(loop_factory=WatchedLoop) as runner:
        return runner.run(run(read_environment(os.environ), os.environ))


def _check(_: argparse.Namespace) -> int:
    import asyncio

    from agent.cli.check import check

    return asyncio.run(check(os.environ, print))


def _status(arguments: argparse.Namespace) -> int:
    from agent.cli.status import show

    url = arguments.url or f"http://127.0.0.1:{os.environ.get('HEALTH_PORT', '9464')}"
    # A terminal without UTF-8 shows question marks instead of the line of lags, and everything else.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return show(
        url, sys.stdout, sys.stderr, as_json=arguments.json, watch=arguments.watch, environ=os.environ
    )


def _modules(arguments: argparse.Namespace) -> int:
    from agent.cli import modules
    from agent.core.errors import RootUnusable

    directory = arguments.directory.resolve()
    _log_nothing()
    if arguments.what == "key":
        return modules.print_key(directory, os.environ, print)
    try:
        with arguments.file.open("xb") as target:
            return modules.pack(directory, target, os.environ, print)
    except OSError as error:
        raise RootUnusable(f"cannot write {arguments.file}: {error.strerror}") from None
    except AgentError:
        arguments.file.unlink()
        raise


def _log_nothing() -> None:
    """Keep the loop's log lines off the screen of a command that prints results."""
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))


def _record(arguments: argparse.Namespace) -> int:
    from agent.config import read_environment
    from agent.replay.record import record

    _log_nothing()
    return record(
        read_environment(os.environ), arguments.scenario, arguments.seconds, partial(print, flush=True)
    )


def _replay(arguments: argparse.Namespace) -> int:
    from agent.replay.faults import FaultPlan
    from agent.replay.runner import ReplayOptions, replay_all

    _log_nothing()
    faults = FaultPlan(
        seed=arguments.shuffle or 0,
        shuffle=arguments.shuffle is not None,
        duplicate=arguments.duplicate,
        drop=arguments.drop,
        disconnect=arguments.disconnect,
        crash=arguments.crash,
    )
    environ = dict(os.environ) if arguments.dev_server else None
    return replay_all(
        arguments.scenario,
        arguments.directory,
        partial(print, flush=True),
        options=ReplayOptions(faults, real_time=arguments.real_time, environ=environ),
        json_report=arguments.json,
        junit=arguments.junit,
    )
