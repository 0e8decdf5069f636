"""Reads files that the project's programs made, and none that they could only point at.

The agent may be root, and would read for them what they may not. So only what is plainly theirs is read: a regular file
with one name, of their user, reached without a link. A hard link to somebody else's file, which they may make and not
read, is not; neither is a FIFO, on which reading would wait.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from agent.fs.inspect import CHUNK, FileStat
from agent.fs.syscalls import READ_FILE


@dataclass(frozen=True, slots=True)
class Whole:
    """A file as it stood still while it was read."""

    content: bytes
    stat: FileStat
    executable: bool


@dataclass(frozen=True, slots=True)
class Unfit:
    """What stands there is not read. `rule`: `not_a_file`, `linked`, `owner`, `size` or `unreadable`."""

    rule: str


@dataclass(frozen=True, slots=True)
class Growing:
    """It changed while it was read; it has `size` bytes now."""

    size: int


def read_foreign(directory: int, name: str, owner: int, most: int) -> Whole | Unfit | Growing | None:
    """Read the file `name` of an open directory. None: there is nothing.

    Args:
        directory: an open directory, reached without a link.
        name: of the file.
        owner: the user whose files are read.
        most: bytes that are read.
    """
    try:
        descriptor = os.open(name, READ_FILE, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError:
        # A link, a socket, a device, or nothing that we may read: what it is says its stat, without opening it.
        return Unfit(_rule(directory, name))
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return Unfit("not_a_file")
        if found.st_nlink != 1:
            return Unfit("linked")
        if found.st_uid != owner:
            return Unfit("owner")
        if found.st_size > most:
            return Unfit("size")
        parts: list[bytes] = []
        left = found.st_size + 1  # one byte more than there should be shows a file that grows
        while left > 0 and (chunk := os.read(descriptor, min(CHUNK, left))):
            parts.append(chunk)
            left -= len(chunk)
        after = os.fstat(descriptor)
        if left != 1 or not FileStat.of(found).matches(after):
            return Growing(after.st_size)
        return Whole(b"".join(parts), FileStat.of(after), found.st_mode & 0o100 != 0)
    except OSError:
        return Unfit("unreadable")
    finally:
        os.close(descriptor)


def _rule(directory: int, name: str) -> str:
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except OSError:
        return "unreadable"
    return "unreadable" if stat.S_ISREG(mode) else "not_a_file"
