"""The commands `nats-keys`, `nats-region` and `nats-mirror`: make what a NATS deployment and its regions need.

What they need is imported when one of them runs: every other command starts without NATS.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator_stub import help_texts

if TYPE_CHECKING:
    from orchestrator_stub.relay.accounts import NatsKeys

EXIT_FAILED = 1


def add_commands(commands: Any) -> None:
    """Add them to the command line."""
    keys = commands.add_parser(
        "nats-keys", help="make the keys and accounts of a NATS deployment", description=help_texts.NATS_KEYS
    )
    keys.add_argument("directory", type=Path, help="where the three files are written")
    keys.set_defaults(run=_said(_keys))

    region = commands.add_parser(
        "nats-region", help="make what the NATS servers of a region need", description=help_texts.NATS_REGION
    )
    region.add_argument("name", metavar="NAME", help="the region's: a-z, 0-9 and -")
    region.add_argument("directory", type=Path, help="where the two files are written")
    region.set_defaults(run=_said(_region))

    mirrored = commands.add_parser(
        "nats-mirror", help="make a region's mirror of the stream", description=help_texts.NATS_MIRROR
    )
    mirrored.add_argument("name", metavar="NAME", help="the region's")
    mirrored.set_defaults(run=_said(_mirror))


def _said(work: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    """Print what it says; what keeps it from its work is one line."""

    def run(arguments: argparse.Namespace) -> int:
        from orchestrator_stub.relay.regions import RegionError

        try:
            sys.stdout.write(work(arguments))
        except OSError as error:
            sys.stderr.write(f"preview-orchestrator: cannot write {error.filename}: {error.strerror}\n")
            return EXIT_FAILED
        except RegionError as error:
            sys.stderr.write(f"preview-orchestrator: {error}\n")
            return EXIT_FAILED
        return 0

    return run


def _keys(arguments: argparse.Namespace) -> str:
    from orchestrator_stub.relay.accounts import Operator

    return _lines(Operator().write(arguments.directory))


def _region(arguments: argparse.Namespace) -> str:
    from orchestrator_stub.relay.regions import write_region

    return _lines(write_region(_settings()[1], arguments.name, arguments.directory))


def _lines(files: list[Path]) -> str:
    return "".join(f"{file}\n" for file in files)


def _mirror(arguments: argparse.Namespace) -> str:
    from orchestrator_stub.relay.regions import mirror

    servers, keys = _settings()
    behind = asyncio.run(mirror(servers, keys, arguments.name))
    return f"{arguments.name} follows the stream, {behind} messages behind\n"


def _settings() -> tuple[str, NatsKeys]:
    """Where NATS is and what signs its tokens, from the relay's environment. Raises `RegionError`."""
    from orchestrator_stub.config import RelaySettings
    from orchestrator_stub.relay.accounts import NatsKeys
    from orchestrator_stub.relay.regions import RegionError

    settings = RelaySettings.from_environment()
    assert settings.nats_url is not None, "the settings require it"
    assert settings.nats_keys_file is not None, "the settings require it"
    try:
        return settings.nats_url, NatsKeys.read(settings.nats_keys_file)
    except (OSError, ValueError) as error:
        raise RegionError(f"NATS_KEYS_FILE: cannot read {settings.nats_keys_file}: {error}") from None
