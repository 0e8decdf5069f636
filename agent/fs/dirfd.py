"""Opens the directories below one root by descriptor, never through a symbolic link.

The project's own code runs beside the agent and may rename, replace or link any directory meanwhile. So no path is
handed to the kernel whole: each directory is opened from the one above with `O_NOFOLLOW`, and a file is named relative
to its directory's descriptor. Where a planted link points is thereby out of reach.

Open directories are kept for the next write. A descriptor names a directory, not a path, so before each use the kernel
is asked for the directory's present path (one readlink, whatever the depth). When that is another, or there is no
/proc, the path is walked again.

RACE: a directory can be moved between that question and the rename that follows. Worst case: the file lands in the
directory that stood at the path a moment before, under its new name. No link is followed even then.

What the system refuses while one path is changed is that path's problem, and the rest of a transaction is applied
(`path_rule`). What the next path would meet too undoes the transaction: no space, no descriptors, and every error in
staging (`environment_problem`).
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.core.model import Problem, ProblemKind, RelPath
from agent.fs.places import OPEN_DIRECTORY, open_directory
from agent.fs.syscalls import path_of

PATH_RULES = {
    errno.ENAMETOOLONG: "name_too_long",
    errno.EINVAL: "name_invalid",
    errno.EILSEQ: "name_invalid",
    errno.ENOTDIR: "not_a_directory",
    errno.ELOOP: "symlink",
    errno.EISDIR: "directory_in_the_way",
    errno.ENOTEMPTY: "directory_in_the_way",
    errno.EEXIST: "directory_in_the_way",
    errno.EBUSY: "mount_point",
    errno.EXDEV: "other_file_system",
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
    errno.EROFS: "read_only",
}
"""The rule that a path breaks by an error; by any other it is `refused`."""

SHARED = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that the next path would meet too."""

ENVIRONMENT: Mapping[int, ProblemKind] = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "read_only",
    errno.EMFILE: "too_many_open_files",
    errno.ENFILE: "too_many_open_files",
}

MOST_LISTED = 10_000
"""Names of a directory that are compared with one: 3 ms. The project makes a million."""

Make = Callable[[int, str, str], None]
"""Makes a directory: (descriptor of the one above, name, path)."""


def path_rule(error: OSError, staging: int) -> str | None:
    """The rule that a path breaks by an error met while it is changed; None when the next path would meet it too.

    `staging` is a descriptor on the file system that is read-only as a whole, or not.
    """
    if error.errno in SHARED:
        return None
    if error.errno == errno.EROFS and os.fstatvfs(staging).f_flag & os.ST_RDONLY:
        return None
    return PATH_RULES.get(error.errno or 0, "refused")


def environment_problem(error: OSError, path: RelPath | None, staging: int) -> Problem:
    """Turn an error of the environment into a problem that tells an operator what to check.

    `staging` is a descriptor on the file system that a full disk is told from missing inodes on.
    """
    kind = ENVIRONMENT.get(error.errno or 0, "io_error")
    rule = errno.errorcode.get(error.errno or 0, "unknown")
    if error.errno == errno.ENOSPC:
        with suppress(OSError):
            space = os.fstatvfs(staging)
            rule = "inodes" if space.f_files and not space.f_ffree else "space"
    where = f" {path}" if path else ""
    return Problem(kind, f"cannot change{where}: {error.strerror or error}", path, rule)


@dataclass(frozen=True, slots=True)
class DirectoryPermissions:
    """What a directory that is made here ends up with, whatever the umask. `owner`: (uid, gid), None for our own."""

    mode: int
    owner: tuple[int, int] | None

    def set_on(self, name: str, above: int | None = None) -> None:
        """Give them to the directory `name` of `above`, or at the path `name` without it. Raises `OSError`."""
        descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=above)
        try:
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            if mode & 0o777 != self.mode:
                os.fchmod(descriptor, mode & ~0o777 | self.mode)
            if self.owner is not None:
                os.fchown(descriptor, *self.owner)
        finally:
            os.close(descriptor)


class Blocked(Exception):
    """Something at `path` makes the operation impossible for this path only.

    `rule`: `symlink`, `not_a_directory`, `case_twin` or `directory_in_the_way`.
    """

    def __init__(self, path: str, rule: str) -> None:
        self.path = path
        self.rule = rule
        super().__init__(f"{path!r} is unusable: {rule}")


@dataclass(slots=True)
class _OpenDirectory:
    """`place` is where the kernel must still see it; "" when it cannot be asked."""

    descriptor: int
    place: str


class DirectoryCache:
    """Opens the directories of one root and keeps the last used ones open.

    Args:
        root: the directory at "".
        make_root: makes `root` when it is gone and something is to be made in it; None for a reader, and only for a
            reader may `root` itself be a link.
        size: how many directories stay open, well below the usual limit of 1,024 files.
    """

    def __init__(self, root: Path, make_root: Callable[[], None] | None, *, size: int = 64) -> None:
        self._root = root
        self._make_root = make_root
        self._size = max(size, 2)
        self._open: OrderedDict[str, _OpenDirectory] = OrderedDict()

    def open(self, path: str, make: Make | None = None) -> int:
        """Return a descriptor of the directory at `path` ("" is the root), good until the next call.

        Args:
            path: a directory's path below the root.
            make: makes each directory that is missing.

        Raises:
            Blocked: a link or a file stands in the way.
            FileNotFoundError: it is missing, and there is no `make`.
            OSError: as the system gives it.
        """
        missing: list[str] = []
        at = path
        while (descriptor := self._revalidated(at)) is None and at:
            missing.append(at)
            at = at.rpartition("/")[0]
        if descriptor is None:
            descriptor = self._keep("", self._open_root(make is not None))
        for below in reversed(missing):
            name = below.rpartition("/")[2]
            descriptor = self._keep(below, _open_below(descriptor, name, below, make))
        return descriptor

    def parent(self, path: str, make: Make | None = None) -> tuple[int, str]:
        """Return the descriptor of the directory that `path` is in, and its name there. Arguments, errors: `open`."""
        above, _, name = path.rpartition("/")
        return self.open(above, make), name

    def close(self, path: str | None = None) -> None:
        """Close the descriptor of `path` (which was removed), or all of them."""
        for at in [path] if path is not None else list(self._open):
            directory = self._open.pop(at, None)
            if directory is not None:
                os.close(directory.descriptor)

    def _revalidated(self, path: str) -> int | None:
        directory = self._open.get(path)
        if directory is None:
            return None
        if path_of(directory.descriptor) == directory.place != "":
            self._open.move_to_end(path)
            return directory.descriptor
        self.close(path)
        return None

    def _keep(self, path: str, descriptor: int) -> int:
        above, _, name = path.rpartition("/")
        if path:
            # Not asked of the kernel: that could be the place to which it was moved since it was opened.
            parent = self._open.get(above)
            place = f"{parent.place.rstrip('/')}/{name}" if parent and parent.place else ""
        else:
            place = path_of(descriptor)
        self.close(path)
        self._open[path] = _OpenDirectory(descriptor, place)
        while len(self._open) > self._size:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest.descriptor)
        return descriptor

    def _open_root(self, make: bool) -> int:
        if self._make_root is None:
            return os.open(self._root, OPEN_DIRECTORY & ~os.O_NOFOLLOW)
        try:
            return open_directory(self._root)
        except FileNotFoundError:
            if not make:
                raise
        self._make_root()
        return open_directory(self._root)


def _open_below(above: int, name: str, path: str, make: Make | None) -> int:
    try:
        try:
            descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=above)
        except FileNotFoundError:
            if make is None:
                raise
            make(above, name, path)
            return os.open(name, OPEN_DIRECTORY, dir_fd=above)
    except NotADirectoryError:
        raise Blocked(path, _rule_broken(above, name)) from None
    try:
        if is_case_twin(above, name, os.fstat(descriptor)):
            raise Blocked(path, "case_twin")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _rule_broken(above: int, name: str) -> str:
    """The rule that `name`, which is no directory, breaks by standing where one is needed."""
    try:
        mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
    except OSError:
        return "not_a_directory"
    return "symlink" if stat.S_ISLNK(mode) else "not_a_directory"


def is_case_twin(above: int, name: str, found: os.stat_result) -> bool:
    """Whether `name` found something that is spelled otherwise, on a case-insensitive file system.

    Ask only about what the agent did not put there under this name: it costs a stat, and a listing where case is
    ignored. Past `MOST_LISTED` names it counts as spelled so: two hard links look the same.
    """
    swapped = name.swapcase()
    if swapped == name:
        return False
    try:
        other = os.stat(swapped, dir_fd=above, follow_symlinks=False)
    except OSError:
        return False
    if (other.st_ino, other.st_dev) != (found.st_ino, found.st_dev):
        return False
    with os.scandir(above) as entries:
        for count, entry in enumerate(entries, 1):
            if entry.name == name or count == MOST_LISTED:
                return False
    return True
