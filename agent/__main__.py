"""The console script `preview-agent`: seals the process before it reads a credential, then runs the command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

HOLD_CREDENTIALS = ("run", "record", "check")
"""Commands that read the session's credentials."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's). Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in HOLD_CREDENTIALS:
        from agent.devserver import guard

        guard.protect_memory()
    if words == ["run"]:
        from agent.devserver import guard

        guard.set_oom_score(guard.AGENT_OOM_SCORE)
        # Blocked until the daemon listens, half a second of imports later: PID 1 would lose them for good.
        signal.pthread_sigmask(signal.SIG_BLOCK, guard.FORWARDED)

    from agent.cli.main import command

    return command(words)


if __name__ == "__main__":
    sys.exit(main())
