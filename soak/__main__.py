"""`python -m soak`: run one, say how it went.

Exit: 0 nothing grew, nothing was lost, nothing was left behind; 1 something was; 130 stopped before its time with
nothing found so far; 64 bad arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from soak.report import result_of, write
from soak.run import Outcome, Soak
from soak.schedule import Settings

LINE_EVERY = 30.0
"""Seconds between lines of progress where there is no terminal to write over."""


def parse(arguments: Sequence[str] | None) -> tuple[Settings, Path, Path]:
    """Settings, state directory, report directory."""
    defaults = Settings(seed=0)
    parser = argparse.ArgumentParser(
        prog="python -m soak", description="The whole local stack under work and faults, for a while."
    )
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="default: %(default)g")
    parser.add_argument("--seed", type=int, help="of editors and faults; default: a new one, printed")
    parser.add_argument("--agents", type=int, default=defaults.agents, help="default: %(default)s")
    parser.add_argument(
        "--vite",
        type=int,
        default=defaults.vite,
        help="how many of them with a real Vite; default: %(default)s",
    )
    parser.add_argument("--state", type=Path, default=Path(".preview-sync/soak-state"), help="emptied first")
    parser.add_argument("--out", type=Path, default=Path(".preview-sync/soak"), help="where the report goes")
    given = parser.parse_args(arguments)
    if given.minutes <= 0 or given.agents < 1:
        parser.exit(64, "soak: --minutes and --agents must be above 0\n")
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    return Settings(seed, given.minutes, given.agents, given.vite), given.state, given.out


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, report; the exit code."""
    settings, state, out = parse(arguments)
    print(
        f"soak: {settings.minutes:g} minutes, {settings.agents} agents, seed {settings.seed}"
        f" (again: python -m soak --minutes {settings.minutes:g} --agents {settings.agents}"
        f" --vite {settings.vite} --seed {settings.seed})",
        flush=True,
    )
    outcome = asyncio.run(run(settings, state))
    text = write(outcome, out)
    print(f"\n{text}\nThe whole report: {out / 'report.md'}", flush=True)
    return result_of(outcome).exit_code


async def run(settings: Settings, state: Path, say: Callable[[str], None] | None = None) -> Outcome:
    """One soak. The first SIGINT or SIGTERM ends the work and goes on to the last look at equality; the second cuts
    that short too."""
    stop = asyncio.Event()
    this = asyncio.current_task()
    assert this is not None

    def asked() -> None:
        if stop.is_set():
            this.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    try:
        return await Soak(settings, state, say or _teller(), stop).run()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _teller() -> Callable[[str], None]:
    """Progress on one line of a terminal, or a line now and then elsewhere."""
    last = 0.0

    def say(text: str) -> None:
        nonlocal last
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{text}")
        elif time.monotonic() - last > LINE_EVERY or not text.startswith(" "):
            last = time.monotonic()
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    return say


if __name__ == "__main__":
    raise SystemExit(main())
