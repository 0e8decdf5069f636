"""Directories under one root, reached by descriptor and never through a symbolic link.

The project's own code runs beside us and may rename, replace or link any directory while we work. So a path
from outside is never handed to the kernel whole: each directory of it is opened from the one above with
`O_NOFOLLOW`, and the file itself is then named relative to that descriptor. What a link points to is thereby
out of reach, whatever is planted and whenever.

Open directories are held for the next write. A held descriptor names a directory, not a path, so before each
use the kernel is asked where that directory stands now (`/proc/self/fd/N`, one call whatever the depth); moved,
removed or replaced by a link, the path is walked again. Without /proc it is walked every time.

RACE: a directory can be moved away between that question and the rename that follows. Its worst case: the file
lands in the very directory that stood at the path a moment before, under its new name. A link is not followed
even then.

What a system error says: that one path is unusable here, or that the environment fails.

The first is a problem of that path, and the rest of a batch lands; the second undoes the batch.
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

UNUSABLE = {
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
}
"""What a system error says about this path alone. Every other error is the environment's."""

ENVIRONMENT: Mapping[int, ProblemKind] = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EROFS: "read_only",
    errno.EMFILE: "too_many_open_files",
    errno.ENFILE: "too_many_open_files",
}


def environment_problem(error: OSError, path: RelPath | None, staging: int) -> Problem:
    """A failure that is not this path's own, typed: what an operator has to look at."""
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
    """How directories are made."""

    mode: int
    owner: tuple[int, int] | None


class Blocked(Exception):
    """Something at `path` makes the operation impossible for this path only.

    `rule` is one of `symlink, not_a_directory, case_twin`; `fs.transaction` adds what system errors say of one path.
    """

    def __init__(self, path: str, rule: str) -> None:
        self.path = path
        self.rule = rule
        super().__init__(f"{path!r} is unusable: {rule}")


class DirectoryCache:
    """The directories of one root.

    `make_root` makes the root itself, should it be gone when something is to be made in it; None where nothing is ever
    made, and only there may the root be a link. `hold`: how many directories stay open, well below the usual limit of
    1,024 files.
    """

    def __init__(self, root: Path, make_root: Callable[[], None] | None, *, hold: int = 64) -> None:
        self._root = root
        self._make_root = make_root
        self._hold = max(hold, 2)
        self._held: OrderedDict[str, _OpenDirectory] = OrderedDict()

    def open(self, path: str, make: Callable[[int, str, str], None] | None = None) -> int:
        """A descriptor of the directory at `path` ("" is the root), good until the next call.

        A missing directory is made by `make(descriptor of the one above, name, path)`, which must create it;
        without `make` it raises `FileNotFoundError`. Raises `Blocked` when a link or a file stands in the way, and
        `OSError` as the system gives it.
        """
        at = path
        while (descriptor := self._still_there(at)) is None and at:
            at = at.rpartition("/")[0]
        if descriptor is None:
            descriptor = self._keep("", self._open_root(make is not None))
        while at != path:
            end = path.find("/", len(at) + 1) if at else path.find("/")
            below = path if end == -1 else path[:end]
            name = below[len(at) + 1 :] if at else below
            descriptor = self._keep(below, self._enter(descriptor, name, below, make))
            at = below
        return descriptor

    def close(self, path: str | None = None) -> None:
        """Close what is held for `path` (which was removed), or everything."""
        for at in [path] if path is not None else list(self._held):
            held = self._held.pop(at, None)
            if held is not None:
                os.close(held.descriptor)

    def _still_there(self, path: str) -> int | None:
        held = self._held.get(path)
        if held is None:
            return None
        if _path_of(held.descriptor) == held.place != "":
            self._held.move_to_end(path)
            return held.descriptor
        self.close(path)
        return None

    def _keep(self, path: str, descriptor: int) -> int:
        above = self._held.get(path.rpartition("/")[0])
        if not path:
            place = _path_of(descriptor)
        else:
            place = f"{above.place.rstrip('/')}/{path.rpartition('/')[2]}" if above and above.place else ""
        self.close(path)
        self._held[path] = _OpenDirectory(descriptor, place)
        while len(self._held) > self._hold:
            _, held = self._held.popitem(last=False)
            os.close(held.descriptor)
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

    def _enter(self, above: int, name: str, path: str, make: Callable[[int, str, str], None] | None) -> int:
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


class _OpenDirectory:
    """An open directory and the place where the kernel must still see it; "" when it cannot be asked."""

    __slots__ = ("descriptor", "place")

    def __init__(self, descriptor: int, place: str) -> None:
        self.descriptor = descriptor
        self.place = place


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""


def set_permissions(above: int | None, name: str, form: DirectoryPermissions) -> None:
    """Give a directory just made the mode and the owner it should have, whatever the umask; without `above`, `name` is
    a path. Raises `OSError`.
    """
    descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=above)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & 0o777 != form.mode:
            os.fchmod(descriptor, mode & ~0o777 | form.mode)
        if form.owner is not None:
            os.fchown(descriptor, *form.owner)
    finally:
        os.close(descriptor)


def _rule_broken(above: int, name: str) -> str:
    """The rule that a thing which is no directory breaks by standing where one is needed."""
    try:
        mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
    except OSError:
        return "not_a_directory"
    return "symlink" if stat.S_ISLNK(mode) else "not_a_directory"


def is_case_twin(above: int, name: str, found: os.stat_result) -> bool:
    """Whether `name` found something that is spelled otherwise, on a file system blind to case.

    Asked only of things the agent did not put there under this name, so that the price (one stat, and a listing on a
    case-blind file system) is paid once.
    """
    swapped = name.swapcase()
    if swapped == name:
        return False
    try:
        other = os.stat(swapped, dir_fd=above, follow_symlinks=False)
    except OSError:
        return False
    return (other.st_ino, other.st_dev) == (found.st_ino, found.st_dev) and name not in os.listdir(above)
