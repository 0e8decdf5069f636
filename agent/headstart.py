"""The dev server of the last time, started before the agent is awake.

A restarted machine has the tree, the dependencies and a ledger that vouches for them; what it lacks is time: the
agent's own imports take longer than Vite's whole start. So the first thing `preview-agent run` does, with the little
that a bare interpreter has, is to start exactly what was ready when it last ran; the supervisor adopts it when, by its
own reckoning, it would have started the same, and kills it otherwise. Whether the preview is *ready* is decided as
ever.

Nothing is started early on a machine that was never ready, without a ledger, where a file that decides the
dependencies is not as it was, or whose port is taken; nor in shadow mode, which has no dev server.

Nothing may be imported here that is not needed: dataclasses, pathlib, typing and argparse each cost as much as
the rest together. The guard is a fork of this process, which is still small, instead of another interpreter.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Mapping, Sequence

from agent import guard, places
from agent.allowlist import environment

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from agent.rights import Launch

RECORD = "dev-server.json"
LEDGER = "ledger.sqlite"
PROJECT_DIR = "/app/project"
STATE_DIR = "/var/lib/preview-agent"
"""The defaults of `agent.config`, which takes too long to import; a test holds them together."""


class HeadStart:
    """A running dev server that nobody listens to yet. It ends with the agent, whatever becomes of it.

    `pid` is its guard's; `lifeline` and `output` are the agent's ends of the guard's pipes.
    """

    def __init__(self, spec: object, env: Mapping[str, str], pid: int, lifeline: int, output: int) -> None:
        self._started = (spec, env)
        self.pid, self.lifeline, self.output = pid, lifeline, output

    def is_what(self, launch: Launch) -> bool:
        """Whether `launch` would start the same."""
        return self._started == (launch.spec(), launch.env)


def remember(
    state_dir: Path,
    launch: Launch,
    more: Mapping[str, str],
    *,
    asked: str | None,
    listens: tuple[str, int],
    decided_by: Sequence[str],
) -> None:
    """Note what is ready now, for the next start. That it cannot be noted is no reason to fail.

    `asked`: what DEV_USER says. `listens`: address and port. `decided_by`: the files on which the install depends.
    """
    user = launch.rights.user
    noted = {
        "spec": launch.spec(),
        "more": dict(more),
        "user": [user.name, user.home] if user else [None, None],
        "asked": [asked, os.geteuid()],
        "listens": listens,
        "files": {path: _looks(path) for path in decided_by},
    }
    try:
        beside = state_dir / f".{RECORD}"
        beside.write_text(json.dumps(noted))
        beside.replace(state_dir / RECORD)
    except OSError:
        return


def forget(state_dir: Path) -> None:
    """What was ready is not worth starting again."""
    try:
        (state_dir / RECORD).unlink()
    except OSError:
        return


def begin(environ: Mapping[str, str]) -> HeadStart | None:
    """Start what the last run had ready; None when there is a reason not to. Never raises for what it finds."""
    state = environ.get("STATE_DIR") or STATE_DIR
    directory = environ.get("PROJECT_DIR") or PROJECT_DIR
    if (environ.get("SYNC_MODE") or "live") != "live":
        return None
    try:
        if not _ours_alone(f"{state}/{RECORD}", environ.get("DEV_USER")):
            return None
        with open(f"{state}/{RECORD}", "rb") as record:
            noted = json.load(record)
        spec, files, listens = noted["spec"], noted["files"], noted["listens"]
        user, home = noted["user"]
        env = environment(environ, user=user, home=home, more=noted["more"])
        if noted["asked"] != [environ.get("DEV_USER") or None, os.geteuid()]:
            return None
        if f"{directory}/package.json" not in files or any(_looks(path) != files[path] for path in files):
            return None
        if not os.path.exists(f"{state}/{LEDGER}"):
            return None
        # Before there is any code of the project's that could look.
        guard.prctl(guard.PR_SET_DUMPABLE, 0)
        early = _fork(spec, env)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    # It takes ten times as long to come to listening itself.
    from agent.host import port_is_free

    if not port_is_free(*listens):
        os.close(early.lifeline)
        os.close(early.output)
        os.waitpid(early.pid, 0)
        return None
    return early


def _ours_alone(record: str, user: str | None) -> bool:
    """Whether the user of the project, who is not to be root, could not have put that record there."""
    if not user or os.geteuid() != 0:
        return True
    import pwd

    found = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    return places.replaceable(record, found.pw_uid, found.pw_gid) is None


def _looks(path: str) -> list[int] | None:
    """How a file looks from outside; None when it is not there."""
    try:
        seen = os.lstat(path)
    except OSError:
        return None
    return [seen.st_mode, seen.st_ino, seen.st_size, seen.st_mtime_ns]


def _fork(spec: dict[str, object], env: dict[str, str]) -> HeadStart:
    """Turn a child of this process into a guard, with `env` as its environment."""
    theirs, lifeline = os.pipe()
    output, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            for there, here in ((theirs, 0), (said, 1), (said, 2)):
                os.dup2(there, here)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            os.chdir("/")
            _wipe_environment()
            os._exit(guard.watch(spec, env))
        except BaseException as error:
            os.write(2, f"cannot watch over the dev server: {error}\n".encode())
        finally:
            os._exit(guard.CANNOT_RUN)
    os.close(theirs)
    os.close(said)
    return HeadStart(spec, env, pid, lifeline, output)


def _wipe_environment() -> None:
    """Overwrite what this process was given at its start: the guard needs none of it, and /proc shows it for as long as
    the guard lives. Where that stands, fields 50 and 51 of proc_pid_stat(5) say.
    """
    os.environ.clear()
    if not os.path.exists("/proc/self/stat"):
        return
    with open("/proc/self/stat", "rb") as stat:
        fields = stat.read().rpartition(b")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    ctypes.memset(start, 0, end - start)
