"""Runs one untrusted program for the agent, and kills everything it left behind when it or the agent ends.

The guard is a process of its own under a bare interpreter: it imports the standard library alone, `agent` and
`agent.devserver` import nothing, and `devserver.sandbox` has the command line. In a session of its own it

- becomes the subreaper of everything the program starts, so that a daemonised grandchild is still found;
- starts the program with its rights, limits and signals (`SPEC`, JSON: `argv`, `cwd`, and optionally `uid`, `gid`,
  `processes`, `files`, `stdin`, `given`), with a standard input that is empty, or a descriptor (`given`), or a pipe
  that nothing comes from and that stays open as long as the guard (`stdin`): some watchers end with it;
- waits on its own standard input, the agent's lifeline: when that closes, because the agent asked for it or because
  the agent is dead, it kills everything below it, whatever session or signal mask that chose;
- reads the program's environment there, as one line of JSON, and has none itself: the guard may be root, and the
  dynamic linker, libc and Python would act on variables meant for the program;
- ends when the program ends, after killing what that left behind, with the program's exit code, or 128 + the signal
  that ended it.

It ignores TERM, INT, HUP and QUIT: they are sent to the whole group, and are meant for the program.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import resource
import select
import signal
import sys
import time
import warnings  # noqa: F401 - `os.execvpe` imports it, and by then the interpreter may be out of reach
from collections.abc import Iterator, Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
"""From `linux/prctl.h`."""

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
CANNOT_RUN = 126
PROJECT_OOM_SCORE = 1000
"""`oom_score_adj` of the project's programs, the most there is (proc(5)). Where memory runs out the kernel kills the
largest process, and with sixty small ones that is the agent, which then can neither restart them nor report it."""
AGENT_OOM_SCORE = -500
"""The agent's and its guards', where it may set that: half of the memory does not count."""
KILLED = 128 + signal.SIGKILL
LONGEST_PAUSE = 0.5
"""Seconds between two rounds of killing what does not end."""


def prctl(option: int, value: int) -> None:
    """Call Linux's prctl(2); raises OSError. Elsewhere it does nothing: only the group kill works there."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def exec_program(spec: Mapping[str, Any], env: Mapping[str, str], stdin: int) -> NoReturn:
    """Drop rights, set limits and execute the program. For the forked child."""
    os.dup2(stdin, 0)
    for number in (*FORWARDED, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if (files := spec.get("files")) is not None:
        limit(resource.RLIMIT_NOFILE, files)
    if (processes := spec.get("processes")) is not None:
        limit(resource.RLIMIT_NPROC, processes)
    limit(resource.RLIMIT_CORE, 0)
    set_oom_score(PROJECT_OOM_SCORE)
    if (uid := spec.get("uid")) is not None:
        os.setgroups([])
        os.setresgid(spec["gid"], spec["gid"], spec["gid"])
        os.setresuid(uid, uid, uid)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    os.chdir(spec["cwd"])
    os.execvpe(spec["argv"][0], spec["argv"], env)  # noqa: S606 - that is what this is for


def protect_memory() -> None:
    """Deny other processes of the same user `/proc/<pid>/environ` and `mem`, and leave no core file, here or in any
    child: this process holds credentials.
    """
    prctl(PR_SET_DUMPABLE, 0)
    limit(resource.RLIMIT_CORE, 0)


def set_oom_score(score: int) -> None:
    """Set how early the kernel kills this process when memory runs out; a higher score is earlier.

    Every process may raise its score, few may lower it: not root in a container of the usual kind. What is not allowed
    is left as it is.
    """
    try:
        with open("/proc/self/oom_score_adj", "r+") as file:
            if score > 0 or int(file.read()) > score:
                file.write(str(score))
    except OSError:
        return


def limit(kind: int, value: int) -> None:
    """Lower a resource limit, soft and hard; a hard limit that is lower already stays."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def processes() -> Iterator[tuple[int, int, bool]]:
    """Yield pid, parent and whether it is dead, of every process.

    `Z` in /proc/PID/stat is the state of a process's first thread alone. While another goes on, the process runs code,
    forks and can be signalled; field 20, `num_threads`, says so (proc(5)).
    """
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    fields = stat.read().rpartition(b")")[2].split()
            except OSError:
                continue
            yield int(name), int(fields[1]), fields[0] in (b"Z", b"X") and int(fields[17]) <= 1


def descendants(root: int) -> set[int]:
    """Return every process below `root` that is not dead."""
    children: dict[int, list[int]] = {}
    for pid, parent, dead in processes():
        if not dead:
            children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    ahead = [root]
    while ahead:
        for pid in children.get(ahead.pop(), ()):
            if pid not in found:
                found.add(pid)
                ahead.append(pid)
    return found


def kill_everything() -> None:
    """Kill and reap everything below this process.

    Freeze first, kill second: a frozen process cannot fork, so a fork bomb stops growing before its places in the
    process table are free again. RACE: a fork that is under way when SIGSTOP arrives shows its child only when /proc
    is read again; hence round after round until there is nothing left to wait for. What hangs in the kernel may never
    end, so the rounds get longer.
    """
    if not os.path.isdir("/proc/self"):
        os.killpg(0, signal.SIGKILL)
    me = os.getpid()
    for rounds in itertools.count():
        frozen: set[int] = set()
        while found := descendants(me) - frozen:
            for pid in found:
                _kill(pid, signal.SIGSTOP)
            frozen |= found
        for pid in frozen:
            _kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(pause_after(rounds))


def pause_after(rounds: int) -> float:
    """Return the seconds until the next round of killing, after so many."""
    return min(0.005 * 1.5 ** min(rounds, 20), LONGEST_PAUSE)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def reap(program: int) -> int | None:
    """Collect dead children. Returns the program's exit code when it is among them, else None."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid == program:
            code = os.waitstatus_to_exitcode(status)
    return None if code is None else code if code >= 0 else 128 - code


def run_guarded(spec: Mapping[str, Any], env: Mapping[str, str]) -> int:
    """Start the program and stay until it has ended. Returns the exit code, see the module's docstring."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    # The pipe's other end stays open here until the guard ends; the program does not inherit it.
    stdin = spec.get("given")
    if stdin is None:
        stdin = os.pipe()[0] if spec.get("stdin") else os.open(os.devnull, os.O_RDONLY)
    program = os.fork()
    if program == 0:
        try:
            exec_program(spec, env, stdin)
        except BaseException as error:
            os.write(2, f"cannot run {spec['argv'][0]}: {error}\n".encode(errors="replace"))
            os._exit(CANNOT_RUN)

    waiting = select.poll()
    waiting.register(0, select.POLLIN | select.POLLHUP)
    waiting.register(woken, select.POLLIN)
    while True:
        ready = {fd for fd, _ in waiting.poll()}
        if woken in ready:
            os.read(woken, 4096)
            if (code := reap(program)) is not None:
                kill_everything()
                return code
        if 0 in ready and not os.read(0, 4096):
            kill_everything()
            return KILLED


def read_environment() -> dict[str, str] | None:
    """Read the program's environment from the lifeline; None when that closes before the line is whole."""
    line = bytearray()
    while not line.endswith(b"\n"):
        more = os.read(0, 65536)
        if not more:
            return None
        line += more
    environment: dict[str, str] = json.loads(line)
    return environment


def main(spec: str) -> int:
    """Be the guard of the program `spec`. Returns the exit code."""
    env = read_environment()
    return KILLED if env is None else run_guarded(json.loads(spec), env)
