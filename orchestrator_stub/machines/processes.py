"""Finds, stops and freezes the processes of a local machine.

A process is known by pid *and* start time, so a pid that was given to somebody else is never signalled. Blocks: for a
thread.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

STOP_GRACE: Final = 6.0
"""Seconds from SIGTERM to SIGKILL: above the agent's own 4 s, so that it is the agent that ends the dev server."""

FREEZE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class Record:
    """`machine.json`: which process a machine is. `started` is psutil's creation time of the process.

    The record is there before the process: with `NOT_STARTED`, whatever stands below the directory is the machine's.
    """

    name: str
    pid: int
    started: float
    created_at: float
    dev_port: int
    health_port: int


def birth(pid: int) -> float:
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0


def alive(record: Record) -> bool:
    try:
        process = psutil.Process(record.pid)
        return process.create_time() == record.started and _lives(process)
    except psutil.Error:
        return False


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def frozen(record: Record) -> bool:
    try:
        return alive(record) and psutil.Process(record.pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _family(record: Record) -> list[psutil.Process]:
    """The agent, then what it started."""
    process = psutil.Process(record.pid)
    return [process, *process.children(recursive=True)]


def freeze(record: Record) -> None:
    """SIGSTOP: to the agent first, so that it starts nothing more, then to the others until none is left that runs.

    Blocks until they stand still, at most `FREEZE_SECONDS`: one that waits for a disk stops when that answers.
    """
    if not alive(record):
        return
    deadline = time.monotonic() + FREEZE_SECONDS
    with suppress(psutil.NoSuchProcess):
        while (running := [each for each in _family(record) if _runs(each)]) and time.monotonic() < deadline:
            for each in running:
                with suppress(psutil.NoSuchProcess):
                    each.suspend()
            time.sleep(0.005)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def thaw(record: Record) -> bool:
    """SIGCONT, to the agent last; whether it is there."""
    if not alive(record):
        return False
    with suppress(psutil.NoSuchProcess):
        for each in reversed(_family(record)):
            with suppress(psutil.NoSuchProcess):
                each.resume()
    return alive(record)


def stop(record: Record) -> None:
    """End one agent and everything it started. Blocks up to `STOP_GRACE` and a little.

    The agent may be our child, whose exit status the event loop collects: so it is looked at, never waited for.
    """
    if not alive(record):
        return
    with suppress(psutil.NoSuchProcess):
        if frozen(record):  # it could not hear that it is to end
            for member in reversed(_family(record)):
                member.resume()
        process = psutil.Process(record.pid)
        family = process.children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _gone([process], STOP_GRACE)
        for member in (process, *family):
            with suppress(psutil.NoSuchProcess):
                if _lives(member):
                    member.kill()
        _gone([process, *family], 2.0)


def _gone(processes: Sequence[psutil.Process], timeout: float) -> bool:
    """Whether all of them ended (a zombie has) within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while any(_lives(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def kill_strays(directory: Path) -> None:
    """SIGKILL what a killed agent left behind: every process that stands below the machine's directory.

    The dev server is a group of its own, so it outlives an agent that got SIGKILL; its working directory is the
    project's, which is how it is known. A process with a terminal is somebody's shell and is left alone.
    """
    below = str(directory)
    for process in psutil.process_iter(["cwd", "terminal"]):
        cwd = process.info["cwd"]
        if cwd is None or process.info["terminal"] is not None or process.pid == os.getpid():
            continue
        if cwd == below or cwd.startswith(below + os.sep):
            with suppress(psutil.Error):
                process.kill()
