"""Runs between the agent and a program that is not trusted, and outlives neither.

Of the standard library alone: a bare interpreter that runs nothing else (`devserver.sandbox` has the command line),
in a session of its own. It

- becomes the subreaper of everything the program starts, so that a daemonised grandchild is still found;
- starts the program with the rights, limits and signals it should have (`SPEC`, JSON: `argv`, `cwd`, and
  optionally `uid`, `gid`, `processes`, `files`), its standard input empty;
- holds the agent's lifeline, its own standard input: when that closes, because the agent asked for it or
  because the agent is dead, everything below is killed, whatever session or signal mask it chose;
- reads the program's environment there, as one line of JSON, and has none itself: the guard may be root, and the
  dynamic linker, libc and Python would do for it what variables meant for the program say;
- ends when the program ends, after killing what the program left behind, with the program's exit code, or
  128 + the signal that ended it.

TERM, INT, HUP and QUIT are meant for the program and ignored here: the group gets them together.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
import warnings  # noqa: F401 - `os.execvpe` imports it, and by then the interpreter may be out of reach
from collections.abc import Mapping

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
FIRST_TO_GO = 1000
"""`oom_score_adj` of the project's programs, see proc(5): the most there is. Where memory runs out the kernel takes the
largest program, and with sixty small ones that is the agent, which then can neither start them again nor say so."""
LAST_TO_GO = -500
"""The agent's and its guards', where it may have that: half of the memory counts for nothing."""
KILLED = 128 + signal.SIGKILL


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2); raises OSError. Elsewhere it does nothing: there the group kill is all there is."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def become(spec: Mapping[str, Any], env: Mapping[str, str]) -> NoReturn:
    """In the forked child: shed rights, set limits, and turn into the program."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (*FORWARDED, signal.SIGCHLD, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if (files := spec.get("files")) is not None:
        limit(resource.RLIMIT_NOFILE, files)
    if (processes := spec.get("processes")) is not None:
        limit(resource.RLIMIT_NPROC, processes)
    limit(resource.RLIMIT_CORE, 0)
    be_taken(FIRST_TO_GO)
    if (uid := spec.get("uid")) is not None:
        os.setgroups([])
        os.setresgid(spec["gid"], spec["gid"], spec["gid"])
        os.setresuid(uid, uid, uid)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.umask(0o022)
    os.chdir(spec["cwd"])
    os.execvpe(spec["argv"][0], spec["argv"], env)  # noqa: S606 - that is what this is for


def seal() -> None:
    """Leave no core file, and open neither `/proc/<pid>/environ` nor `mem` to other processes of the same user: this
    process holds credentials. Nothing that it forks or starts leaves a core file either.
    """
    prctl(PR_SET_DUMPABLE, 0)
    limit(resource.RLIMIT_CORE, 0)


def be_taken(score: int) -> None:
    """Say how early the kernel should take this process when memory runs out. Everybody may say earlier, few may say
    later: not root in a container of the usual kind. What cannot be said is left as it is.
    """
    try:
        with open("/proc/self/oom_score_adj", "r+") as said:
            if score > 0 or int(said.read()) > score:
                said.write(str(score))
    except OSError:
        return


def limit(kind: int, value: int) -> None:
    """Lower a limit for good; an already lower hard limit stays."""
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def descendants(root: int) -> set[int]:
    """Every process below `root` that is not dead, by the parents that /proc names."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                state, parent = stat.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if state not in (b"Z", b"X"):
            parents.setdefault(int(parent), []).append(int(name))
        else:
            parents.setdefault(int(parent), [])
    found: set[int] = set()
    ahead = [root]
    while ahead:
        for pid in parents.get(ahead.pop(), ()):
            if pid not in found:
                found.add(pid)
                ahead.append(pid)
    return found


def kill_everything() -> None:
    """Leave nothing alive below this process, and reap it all.

    Freeze first, kill second: a frozen process cannot fork, so that a fork bomb stops growing before its
    places are given free. RACE: a fork under way when the stop arrives shows its child only in a later look
    at /proc; hence round after round until there is nothing left to wait for.
    """
    if not os.path.isdir("/proc/self"):
        os.killpg(0, signal.SIGKILL)
    me = os.getpid()
    while True:
        frozen: set[int] = set()
        while fresh := descendants(me) - frozen:
            for pid in fresh:
                _kill(pid, signal.SIGSTOP)
            frozen |= fresh
        for pid in frozen:
            _kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.005)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def reap(program: int) -> int | None:
    """Collect the dead; the program's exit code once it is among them."""
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


def _empty(pipe: int) -> None:
    try:
        os.read(pipe, 4096)
    except BlockingIOError:
        return


def watch(spec: Mapping[str, Any], env: Mapping[str, str]) -> int:
    """Start the program and stay until it is over; the exit code. See the module's docstring."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)

    program = os.fork()
    if program == 0:
        try:
            become(spec, env)
        except BaseException as error:
            os.write(2, f"cannot run {spec['argv'][0]}: {error}\n".encode(errors="replace"))
            os._exit(CANNOT_RUN)

    waiting = select.poll()
    waiting.register(0, select.POLLIN | select.POLLHUP)
    waiting.register(woken, select.POLLIN)
    while True:
        ready = {fd for fd, _ in waiting.poll()}
        if woken in ready:
            _empty(woken)
            if (code := reap(program)) is not None:
                kill_everything()
                return code
        if 0 in ready and not os.read(0, 4096):
            kill_everything()
            return KILLED


def hear_environment() -> dict[str, str] | None:
    """The program's environment, from the lifeline; None when that closes before it is told."""
    told = bytearray()
    while not told.endswith(b"\n"):
        more = os.read(0, 65536)
        if not more:
            return None
        told += more
    environment: dict[str, str] = json.loads(told)
    return environment


def main(spec: str) -> int:
    """A guard of its own process."""
    env = hear_environment()
    return KILLED if env is None else watch(json.loads(spec), env)
