"""What stands at a name, and what has become of it: by stat, and by hash where the stat is not the expected one.

Everything is named relative to an open directory, and no link is followed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass

from agent.ledger import FileStat
from agent.model import Digest, Entry, Problem, RelPath


@dataclass(frozen=True, slots=True)
class Drift:
    """A file that is not as the agent left it.

    `rule`: `changed`, `missing`, `appeared` (one the agent did not write), `not_a_file`. `digest` and `stat` are what
    stands there, None when it is no file.
    """

    path: RelPath
    rule: str
    digest: Digest | None = None
    stat: FileStat | None = None

    def problem(self) -> Problem:
        told = {
            "changed": "was changed inside the container",
            "missing": "was removed inside the container",
            "appeared": "was put there by something else",
            "not_a_file": "was replaced by something that is no file",
        }[self.rule]
        return Problem("drift", f"{self.path} {told}", self.path, self.rule)


def look(directory: int, name: str) -> os.stat_result | None:
    """What stands at `name`, a link being a link; None when nothing does. Raises `OSError`."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def digest_at(directory: int, name: str) -> tuple[Digest, FileStat] | None:
    """The digest of a regular file and how it looked *before* it was read; None when there is no such file.

    A change during the reading moves its times, so a digest of mixed content can never be taken for the stat's.
    Raises `OSError`.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            return None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return Digest(hashlib.file_digest(file, "sha256").hexdigest()), FileStat.of(found)
    finally:
        os.close(descriptor)


def compare(
    path: RelPath,
    directory: int,
    name: str,
    found: os.stat_result,
    expected: FileStat | None,
    entry: Entry | None,
) -> Drift | None:
    """What became of a file whose stat is not the expected one; None when its content is still `entry`'s."""
    if not stat.S_ISREG(found.st_mode):
        return Drift(path, "not_a_file")
    rule = "appeared" if expected is None else "changed"
    try:
        read = digest_at(directory, name)
    except PermissionError:
        return Drift(path, rule)
    if read is None:
        return Drift(path, "missing")
    if entry is not None and entry.digest == read[0]:
        return None
    return Drift(path, rule, *read)
