"""`python -m bench.capacity`: one run and its table.

Exit: 0 it says something; 3 it was refused, or a part does not start; 64 bad arguments; 130 stopped before its end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench.__main__ import commit, hushed, swept
from bench.capacity.estimate import TAKEN, Refused
from bench.capacity.report import keep, report_of, table_of
from bench.capacity.run import QUICK, WHOLE, measure
from bench.harness.machine import busiest, machine
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgresError
from soak.program import CannotRun


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write down; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.capacity", description="What so many sessions cost."
    )
    parser.add_argument("--sessions", type=int, default=100_000, help="carried on to (default %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, under 3 minutes: to see that it works"
    )
    parser.add_argument("--save", action="store_true", help="write the table and the picture into docs/scale")
    chosen = parser.parse_args(arguments)
    if chosen.sessions < 1 or (chosen.save and chosen.quick):
        parser.exit(64, "capacity: --sessions must be above 0, and a quick run is not kept\n")
    taken, who = busiest()
    if taken > TAKEN:
        print(
            f"capacity: refused: others take {taken:.0%} of the processors ({', '.join(who)})",
            file=sys.stderr,
        )
        return 3
    profile = QUICK if chosen.quick else WHOLE
    about = {"at": datetime.now(UTC).isoformat(timespec="minutes"), "commit": commit(), "machine": machine()}
    try:
        with swept(), hushed():
            place = Path(tempfile.mkdtemp(prefix="capacity-"))
            os.chmod(place, 0o711)  # the database runs as a user of its own
            measured = asyncio.run(measure(place, profile, lambda line: print(line, flush=True)))
        report = report_of(measured, chosen.sessions)
    except (Refused, CannotRun, EmbeddedPostgresError, TimeoutError) as error:
        print(f"capacity: refused: {error or type(error).__name__}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    print("\n" + table_of(report))
    if chosen.save:
        print("written: " + ", ".join(keep(measured, report, about)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
