"""The console script: the dev server's head start first, then everything else.

Nothing is imported here that a head start does not need: it should wait for nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

HOLD_CREDENTIALS = ("run", "record", "check")
"""Commands that read the session's credentials."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's). Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    environ, early = dict(os.environ), None
    if words and words[0] in HOLD_CREDENTIALS:
        from agent import guard

        guard.seal()
    if words == ["run"]:
        from agent import guard
        from agent.headstart import begin

        guard.be_taken(guard.LAST_TO_GO)
        # Kept until somebody can hear them: PID 1 would lose them for good.
        signal.pthread_sigmask(signal.SIG_BLOCK, guard.FORWARDED)
        early = begin(environ)
        if early:
            _wake_gently()

    from agent.commands import command

    return command(words, environ, early)


def _wake_gently() -> None:
    """Import the agent while the dev server starts, and leave the processors to that.

    In a thread, because a thread's niceness ends with it; a process without privileges could not take it back.
    Ten is a tenth of a processor for the agent while somebody else wants all of it: it wakes even so.
    """
    import threading

    def wake() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, 0, 10)
        import agent.commands
        import agent.daemon  # noqa: F401

    thread = threading.Thread(target=wake, name="wake")
    thread.start()
    thread.join()


if __name__ == "__main__":
    sys.exit(main())
