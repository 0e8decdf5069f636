"""Real processes for tests: asked about by /proc, waited for with a deadline, left by nobody."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path


async def until(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `true()`; `TimeoutError` after `seconds`."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.01)


def running(*words: str) -> list[int]:
    """Living processes with all the words in their command line, this one left out.

    Other tests run beside this one: a program that they start too wants a second word, its test's directory.
    """
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                said = Path(f"/proc/{name}/cmdline").read_bytes()
                if all(word.encode() in said for word in words):
                    found.append(int(name))
    return found


def of_user(uid: int) -> list[int]:
    """Living or dead processes of a user."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == uid:
                    found.append(int(name))
    return found


def zombies_of(pid: int) -> list[int]:
    """Dead children that `pid` has not waited for."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                state, parent = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z" and int(parent) == pid:
                    found.append(int(name))
    return found
