"""Finds on which ports a program and everything that it started listen, from what the kernel shows under /proc.

A process's file descriptors name the inodes of its sockets, and /proc/net/tcp{,6} says which of those listen and where.
A process whose descriptors may not be read (a container without SYS_PTRACE) counts by its user, where that user runs
nothing but the project.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from agent.net import EVERYWHERE

MOST_PROCESSES = 2000
MOST_DESCRIPTORS = 4096
"""Of one process: what is read of a machine stays bounded, whatever runs on it. A dev server has 50 to 200."""
_LISTENS = "0A"
_SOCKET = re.compile(r"socket:\[([0-9]+)\]")


@dataclass(frozen=True, slots=True, order=True)
class Listener:
    """A TCP port that is listened on. `address` as it was bound: `0.0.0.0` and `::` are everywhere."""

    port: int
    address: str

    @property
    def target(self) -> str:
        """The address at which this machine itself reaches it."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)  # noqa: S104

    def serves(self, hosts: Sequence[str], port: int) -> bool:
        """Whether who comes to `port` of one of `hosts` comes here."""
        return self.port == port and (self.address in EVERYWHERE or self.address in hosts)

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def listeners(pid: int, *, uid: int | None = None) -> tuple[Listener, ...]:
    """Return what the descendants of `pid` and itself listen on, by port; empty where the kernel does not say.

    Args:
        pid: The first of the processes.
        uid: A user that runs nothing but these.
    """
    inodes: set[str] = set()
    for each in _descendants(pid):
        inodes |= _sockets(each)
    found = {
        Listener(port, address)
        for file in ("tcp", "tcp6")
        for address, port, owner, inode in _listening(Path("/proc/net", file))
        if inode in inodes or (uid is not None and owner == uid)
    }
    return tuple(sorted(found))


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in islice(os.listdir("/proc"), 10 * MOST_PROCESSES):
            if name.isascii() and name.isdigit():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    fields = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()
                    children.setdefault(int(fields[1]), []).append(int(name))
    found = [pid]
    for each in found:
        found.extend(children.get(each, ()))
        if len(found) > MOST_PROCESSES:
            break
    return found[:MOST_PROCESSES]


def _sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in islice(entries, MOST_DESCRIPTORS):
            with contextlib.suppress(OSError):
                if named := _SOCKET.fullmatch(os.readlink(entry.path)):
                    found.add(named[1])
    return found


def _listening(file: Path) -> list[tuple[str, int, int, str]]:
    """Return address, port, user and inode of each listening socket of a table."""
    found = []
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines()[1:]:
            fields = line.split()
            with contextlib.suppress(ValueError, IndexError, OSError):
                address, _, port = fields[1].partition(":")
                if fields[3] == _LISTENS:
                    found.append((_address(address), int(port, 16), int(fields[7]), fields[9]))
    return found


def _address(text: str) -> str:
    """Read an address as the kernel writes it: hexadecimal words of 32 bits, each in the machine's byte order."""
    raw = bytes.fromhex(text)
    swapped = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, swapped)
