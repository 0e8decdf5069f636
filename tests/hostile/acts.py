"""What a hostile project does, in random order from a seed, until it is told that it is over: `python3 acts.py NAME`.

The project's own user runs it, three times at once: from a Vite plugin, from a postinstall and from the dev script. It
imports the standard library alone. The environment says the rest: HOSTILE_SEED, HOSTILE_OVER (a file that ends it),
HOSTILE_PROJECT, HOSTILE_MODULES, HOSTILE_HEALTH (a port), HOSTILE_LOG (a file for the names of what was done).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROJECT = Path(os.environ["HOSTILE_PROJECT"])
MODULES = Path(os.environ["HOSTILE_MODULES"])
OVER = Path(os.environ["HOSTILE_OVER"])
HEALTH = int(os.environ["HOSTILE_HEALTH"])
NAME = sys.argv[1]
DICE = random.Random(f"{os.environ['HOSTILE_SEED']} {NAME}")
MOST_LEFT = 12
"""Processes that one of the three leaves behind; DEV_PROCESSES bounds all of them."""

left = 0


def a_file() -> Path:
    """One of the project's files, or where one was."""
    found = [p for p in (PROJECT / "src").rglob("*") if not p.name.startswith("foreign")][:200]
    return DICE.choice(found or [PROJECT / "src" / "f0.ts"])


def clear(path: Path) -> None:
    """Have nothing at `path`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def overwrite(path: Path, text: str) -> None:
    """Write it as an editor does, but wait for nobody: it may be a pipe by now that no one reads, or be leased."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK, 0o644)
    with open(descriptor, "w") as file:
        file.write(text)


# --- files that are not what they were


def huge() -> None:
    os.truncate(a_file(), 2**40)


def far_times() -> None:
    at = DICE.choice([2**33, -(2**31), 10**10, 2**62 // 10**9])
    os.utime(a_file(), (at, at))


def changed() -> None:
    for _ in range(20):
        overwrite(a_file(), f"theirs {DICE.random()}\n" * DICE.randrange(1, 2000))


def written_on() -> None:
    """One file, over and over, for the moment between a rename and a stat."""
    path, until = a_file(), time.monotonic() + 0.5
    while time.monotonic() < until:
        with suppress(OSError):
            overwrite(path, "theirs")


def removed() -> None:
    clear(DICE.choice([a_file(), PROJECT / "src" / "deep", PROJECT / "src"]))


def moved() -> None:
    for _ in range(20):
        with suppress(OSError):
            os.rename(PROJECT / "src", PROJECT / "elsewhere")
            os.rename(PROJECT / "elsewhere", PROJECT / "src")


def closed() -> None:
    os.chmod(a_file(), DICE.choice([0, 0o200, 0o4755]))
    where = DICE.choice([PROJECT, PROJECT / "src"])
    os.chmod(where, 0)
    time.sleep(0.2)
    os.chmod(where, 0o755)


def leased() -> None:
    descriptor = os.open(a_file(), os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    time.sleep(0.3)
    os.close(descriptor)


# --- things in the place of files


def linked() -> None:
    path = a_file()
    clear(path)
    path.symlink_to(
        DICE.choice(["/etc/passwd", "/", "..", "/proc/self/environ", str(PROJECT / "package.json")])
    )


def twin() -> None:
    path = a_file()
    os.link(path, path.with_name(path.name.swapcase()))


def special() -> None:
    path = a_file()
    clear(path)
    if DICE.random() < 0.5:
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))


def nested() -> None:
    """Empty directories, one in the other, in a file's place."""
    path = a_file()
    clear(path)
    path.mkdir()
    above = os.open(path, os.O_RDONLY)
    for _ in range(DICE.choice([10, 200, 1_200])):
        os.mkdir("d", dir_fd=above)
        below = os.open("d", os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)


def swapped() -> None:
    """A file and a directory that change places."""
    path, until = a_file(), time.monotonic() + 0.5
    beside = path.with_name("foreign-directory")
    with suppress(OSError):
        (beside / "x").mkdir(parents=True)
    while time.monotonic() < until:
        with suppress(OSError):
            os.rename(path, path.with_name("foreign-file"))
            os.rename(beside, path)
            os.rename(path, beside)
            os.rename(path.with_name("foreign-file"), path)


# --- names


def odd_names() -> None:
    where = os.fsencode(DICE.choice([PROJECT, PROJECT / "src"]))
    for name in (b"foreign-\xff\xfe", b"foreign-caf\xe9", b"foreign-\n\x1b[2J", b"foreign-" + b"x" * 240):
        with suppress(OSError):
            os.mkdir(where + b"/" + name)


def flood() -> None:
    until, number = time.monotonic() + 0.7, 0
    while time.monotonic() < until:
        name = PROJECT / f"foreign-{NAME}-{number}"
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
        os.unlink(name)
        number += 1


def stages() -> None:
    for name in ("stage-99999999999999999999-1", "stage-²-1", "stage--1", "stage-1-1"):
        (MODULES / name).mkdir(exist_ok=True)


# --- package.json


def package() -> None:
    path = PROJECT / "package.json"
    whole = path.read_text()
    path.write_text(
        DICE.choice(
            [
                "{" * 5_000,
                '{"a":' * 975 + "1" + "}" * 975,
                '{"scripts": {"dev": "\\ud800"}}',
                '{"name": "' + "x" * 8_000_000 + '"}',
                whole.replace("}", ', "workspaces": ["**"]}', 1),
            ]
        )
    )
    time.sleep(0.3)
    path.write_text(whole)


# --- output, memory, requests


def printed() -> None:
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        os.write(
            1,
            DICE.choice([b"eyJ" * 1_365, b"\xff" * 4_000, b"\xed\xa0\x80\x1b[2J", b"x" * 65_000, b""])
            + b"\n",
        )


def memory() -> None:
    taken = bytearray(80 << 20)
    taken[::4_096] = b"x" * len(taken[::4_096])
    time.sleep(0.3)


def asked() -> None:
    for path in DICE.choices([b"/status", b"/metrics", b"/readyz", b"/livez", b"\0"], k=100):
        with suppress(OSError), socket.create_connection(("127.0.0.1", HEALTH), 1) as connection:
            connection.sendall(b"GET " + path + b" HTTP/1.1\r\n\r\n")


def silent() -> None:
    held = []
    for _ in range(150):
        with suppress(OSError):
            held.append(socket.create_connection(("127.0.0.1", HEALTH), 1))
    time.sleep(0.5)
    for each in held:
        each.close()


# --- processes


def daemon() -> None:
    leave("trap '' TERM HUP INT; cd /; exec <&- >&- 2>&-; while :; do sleep 1; done")


def leave(script: str) -> None:
    global left
    if left < MOST_LEFT:
        left += 1
        subprocess.Popen(["sh", "-c", script], start_new_session=True)


def leaderless() -> None:
    """A process whose first thread ends while another goes on: a zombie by its state."""
    global left
    if left >= MOST_LEFT:
        return
    left += 1
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=time.sleep, args=(3_600,)).start()
        ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)


def forks() -> None:
    children = []
    for _ in range(30):
        child = os.fork()
        if child == 0:
            time.sleep(0.2)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def stopped() -> None:
    """Everything of this user's is ended, its dev server too."""
    if DICE.random() < 0.1:
        os.kill(-1, signal.SIGKILL)


ACTS: tuple[Callable[[], None], ...] = (
    huge, far_times, changed, written_on, removed, moved, closed, leased, linked, twin, special, nested, swapped,
    odd_names, flood, stages, package, printed, memory, asked, silent, daemon, leaderless, forks, stopped,
)  # fmt: skip


def main() -> None:
    """Act until it is over."""
    with open(os.environ["HOSTILE_LOG"], "a", buffering=1) as log:
        until = time.monotonic() + (2.0 if NAME == "postinstall" else 86_400)
        while time.monotonic() < until and not OVER.exists():
            act = DICE.choice(ACTS)
            outcome = "did"
            try:
                act()
            except (OSError, RecursionError, MemoryError, ValueError) as error:
                outcome = type(error).__name__
            log.write(f"{NAME} {act.__name__} {outcome}\n")
            time.sleep(DICE.uniform(0, 0.05))


if __name__ == "__main__":
    main()
