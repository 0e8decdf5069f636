"""Checks that the project's user cannot put something else in the place of the agent's directories.

An agent that is root gives files away, locks directories and trusts its state. A user who may write in the directory
above one of these can rename it and put a link in its place, which `O_NOFOLLOW` sees in the last name of a path alone.
So no directory on the way to them may be that user's to change. One check at the start is enough: what only root can
change stays as it is.
"""

from __future__ import annotations

import errno
import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from agent.config import Settings

OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
MOST_LINKS = 40
"""How many the kernel follows in one path."""


def open_directory(path: Path) -> int:
    """Open a directory that is no link itself. Raises `OSError` whose `strerror` says what to do."""
    try:
        return os.open(path, OPEN_DIRECTORY)
    except NotADirectoryError:
        if not path.is_symlink():
            raise
        remedy = "it is a symbolic link; name the directory that it leads to"
        raise OSError(errno.ELOOP, remedy, str(path)) from None


def replaceable(path: str, uid: int, gid: int, *, given: bool = False) -> str | None:
    """Find the first directory on the way to `path` whose owner or mode lets a user put something else there.

    Links are followed as the kernel does; what does not exist counts as what the user may make.

    Args:
        path: an agent's directory.
        uid: the user.
        gid: the user's only group.
        given: what is at `path` belongs to the user, or will.

    Returns:
        None when only root can.
    """
    at, links = "/", 0
    ahead = _names(os.path.join(os.getcwd(), path))
    while ahead:
        name = ahead.pop(0)
        if name == "..":
            at = os.path.dirname(at)
            continue
        here, last = os.path.join(at, name), not ahead
        found = _lstat(here)
        above = os.stat(at)
        if above.st_uid == uid:
            return at
        if _may_write(at, above, gid):
            if not above.st_mode & stat.S_ISVTX or found is None or (given and last):
                return at
            if found.st_uid == uid:
                return here
        if found is None:
            return None
        if not stat.S_ISLNK(found.st_mode):
            at = here
            continue
        links += 1
        if links > MOST_LINKS:
            return None
        target = os.readlink(here)
        at = "/" if target.startswith("/") else at
        ahead = _names(target) + ahead
    return None


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except OSError:
        return None


def _may_write(directory: str, found: os.stat_result, gid: int) -> bool:
    """Whether a user of that group who does not own it may write in it. An access list is taken to name the user."""
    by_group = found.st_mode & stat.S_IWGRP and (found.st_gid == gid or _has_access_list(directory))
    return bool(by_group or found.st_mode & stat.S_IWOTH)


def _has_access_list(directory: str) -> bool:
    """Whether it names any users or groups; which ones is not asked."""
    try:
        return bool(os.getxattr(directory, "system.posix_acl_access"))
    except (OSError, AttributeError):
        return False


def weaknesses(settings: Settings, user: str, uid: int, gid: int) -> list[str]:
    """Say in one sentence for each directory what `user` could replace by a link there, and what to do about it."""
    import shlex  # for refusals alone

    ways = (
        ("PROJECT_DIR", settings.tree_dir, True),
        ("STAGING_DIR", settings.staging, False),
        ("STATE_DIR", settings.state_dir / "anything", False),
        ("MODULES_DIR", settings.modules, True),
    )
    found: dict[str, list[str]] = {}
    for name, path, given in ways:
        if weak := replaceable(str(path), uid, gid, given=given):
            found.setdefault(weak, []).append(name)
    sentences = []
    for weak, names in found.items():
        elsewhere = "choose a place that only root can change"
        if not os.stat(weak).st_mode & stat.S_ISVTX:
            elsewhere = f"chown root {shlex.quote(weak)} && chmod go-w {shlex.quote(weak)}, or {elsewhere}"
        sentences.append(
            f"{_enumeration(names)}: {user} can put a link there instead, since {weak} is theirs to change; {elsewhere}"
        )
    return sentences


def _enumeration(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
