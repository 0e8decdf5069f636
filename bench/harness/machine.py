"""The machine a run is made on: what it is, what is installed, who else works on it, and what the run leaves on it.

*Who else*: a processor that somebody else's program takes is not there for the contestants, and it hits the one that
computes more harder than the one that waits for the disk. Load averages count the run's own work too, so they are
reported and decide nothing. What decides is arithmetic: the processors' time that was not idle, less that of this
process and all its descendants, less that of the kernel's own threads, is time that others took (a hypervisor's steal
included).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

PROGRAMS: Mapping[str, str] = {
    "bsdtar": "--version", "unzip": "-v", "zip": "-v", "curl": "--version", "inotifywait": "--help",
    "rsync": "--version", "lsyncd": "--version", "unison": "-version", "syncthing": "--version", "cc": "--version",
    "node": "--version",
}  # fmt: skip
"""Peers by program, and how each is asked for its version."""

PACKAGES = ("realtime", "starlette", "websockets")
"""Peers that are Python packages."""

PR_SET_CHILD_SUBREAPER = 36
KTHREADD = 2
"""The kernel's threads are its children."""

_VERSION = re.compile(r"\d+\.\d+[\w.]*")


def version_of(program: str) -> str | None:
    """What a program says of itself; None when it is not installed."""
    if shutil.which(program) is None:
        return None
    done = subprocess.run(
        [program, PROGRAMS[program]], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    found = _VERSION.search(done.stdout + done.stderr)
    return found.group() if found else "unknown"


def versions() -> dict[str, str | None]:
    """Every peer's version; None for one that is not installed."""
    found = {program: version_of(program) for program in PROGRAMS}
    for package in PACKAGES:
        found[package] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def machine() -> dict[str, object]:
    """What was measured on."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                model = text.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of processor time since their beginning, all processors together."""

    there: float
    idle: float
    ours: float
    kernel: float


def taken_by_others(before: Spent, after: Spent) -> float:
    """The share of all processors' time that was neither idle nor ours nor the kernel's own."""
    there = after.there - before.there
    busy = there - (after.idle - before.idle)
    known = (after.ours - before.ours) + (after.kernel - before.kernel)
    return min(max(busy - known, 0.0) / there, 1.0) if there > 0 else 0.0


RESTING = 0.05
"""Of a core, for all descendants together: those that poll take a fifth of it."""


def at_rest(patience: float = 20.0) -> None:
    """Return once this process and its descendants have next to nothing left to do, or after `patience` seconds."""
    deadline = time.monotonic() + patience
    while (now := time.monotonic()) < deadline:
        before, _ = _family_seconds(os.getpid())
        time.sleep(0.2)
        after, _ = _family_seconds(os.getpid())
        if after - before <= RESTING * (time.monotonic() - now):
            return


class Others:
    """How much others take, from when this was made. `root`: whose descendants are not others; this process."""

    def __init__(self, root: int | None = None) -> None:
        self._root = os.getpid() if root is None else root
        self._before = self._spent()

    def share(self) -> float:
        """Of all processors, until now; 0 where the kernel does not say."""
        return 0.0 if self._before is None else taken_by_others(self._before, self._spent() or self._before)

    def _spent(self) -> Spent | None:
        try:
            lines = Path("/proc/stat").read_text().splitlines()
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        cores = sum(line.startswith("cpu") for line in lines) - 1
        fields = [int(field) for field in lines[0].split()[1:]]
        ours, kernel = _family_seconds(self._root)
        # What is not idle is exact; how the rest is split is sampled by the kernel, and short work slips through.
        return Spent(time.monotonic() * cores, (fields[3] + fields[4]) / ticks, ours, kernel)


def _family_seconds(root: int) -> tuple[float, float]:
    """Seconds of `root` with its descendants, the dead ones they waited for included; and of the kernel's threads."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    ticks = os.sysconf("SC_CLK_TCK")
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                parents[int(entry)] = int(fields[1])
                seconds[int(entry)] = sum(int(field) for field in fields[11:15]) / ticks
    return _below(root, parents, seconds), _below(KTHREADD, parents, seconds)


def _below(root: int, parents: Mapping[int, int], seconds: Mapping[int, float]) -> float:
    total = 0.0
    for pid, spent in seconds.items():
        above: int | None = pid
        while above not in (None, 0, root):
            above = parents.get(above)
        total += spent if above == root else 0.0
    return total


def busiest(seconds: float = 1.0, count: int = 3) -> tuple[float, list[str]]:
    """What others take now, and who they are: for a sentence that says what to stop."""
    others = Others()
    mine = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    before = {p.pid: p for p in psutil.process_iter() if p.pid not in mine}
    for process in before.values():
        with contextlib.suppress(psutil.Error):
            process.cpu_percent()
    time.sleep(seconds)
    used: list[tuple[float, str]] = []
    for process in before.values():
        with contextlib.suppress(psutil.Error):
            used.append((process.cpu_percent(), f"{process.name()} ({process.pid})"))
    return others.share(), [name for percent, name in sorted(used, reverse=True)[:count] if percent >= 5]


@contextlib.contextmanager
def own_descendants() -> Iterator[Descendants]:
    """While it lasts, what is orphaned below this process stays below it; at the end whatever was left is killed."""
    libc = ctypes.CDLL(None)
    if platform.system() == "Linux":
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    family = Descendants()
    try:
        yield family
    finally:
        family.end()
        if platform.system() == "Linux":
            libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Descendants:
    """The processes below this one, but for those that were there before."""

    def __init__(self) -> None:
        self._before = set(psutil.Process().children(recursive=True))

    def end(self) -> list[str]:
        """Kill those that are left; what they were."""
        left: list[str] = []
        # Again while there are any: one may have started another in the meantime.
        for _ in range(100):
            alive = [
                p for p in psutil.Process().children(recursive=True) if p not in self._before and not _ours(p)
            ]
            if not alive:
                break
            for process in alive:
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_ZOMBIE:
                        left.append(" ".join(process.cmdline())[:100] or process.name())
                    process.kill()
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
            psutil.wait_procs(alive, timeout=1)
        return left


def _ours(process: psutil.Process) -> bool:
    """Whether it is multiprocessing's own, which ends with this process."""
    with contextlib.suppress(psutil.Error):
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    return False
