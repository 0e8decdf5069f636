"""`soak/agent.py CLOCKS run`: the agent, with a wall clock that the soak moves. All else is `preview-agent run`.

A machine's clock jumps when it wakes from suspension, and when NTP puts it right. The wall clock of this machine is
everybody's: PostgreSQL's, the editors', that of whatever else runs here. So it is the agent's process alone that sees
another one: every reading (`time.time`, `time.time_ns`) is shifted by the seconds in CLOCKS/{session}, a file that
need not be there. Timers go by the monotonic clock, which no jump moves on a real machine either. The time stamps of
the log stay true, so that one can be held against the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


def shifted(clock: Path, now: Callable[[], float]) -> Callable[[], float]:
    """`now`, moved by what is written in the file `clock` at that time."""

    def read() -> float:
        try:
            return now() + float(clock.read_text())
        except (OSError, ValueError):
            return now()

    return read


def main(clocks: str, *words: str) -> int:
    """Run the agent's command line `words`, as a machine of the session in SESSION_ID."""
    time.time = shifted(Path(clocks, os.environ["SESSION_ID"]), time.time)
    time.time_ns = lambda: int(time.time() * 1e9)
    from agent.__main__ import main as agent

    return agent(words)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
