"""A project's files in a directory: which paths are the project's, what stands at each, and what cannot be read.

A file is gone when nothing stands at its path any more, or a directory or link does. Every other error (no rights, no
descriptors, a failing disk, a root that is away) says nothing about the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator_stub.platform.ignore_rules import NEVER, IgnoreRules, LeftOut

MAX_TEXT: Final = 10 * 2**20
"""Bytes of one file in the database (its `max_file_bytes`); larger ones are assets."""

MAX_ASSET: Final = 50 * 2**20
"""Bytes of one object: Supabase's default."""

MAX_PATH_BYTES: Final = 1024
MAX_SEGMENT_BYTES: Final = 255
MAX_SEGMENTS: Final = 64
"""Of a path, as `preview.path_problem` and the agents have them."""

FEW: Final = 3
"""Paths that are named one by one when they cannot be read."""

GONE: Final = (FileNotFoundError, NotADirectoryError)
"""What says that nothing stands at a path. Every other error says that it could not be seen."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """What the directory holds at one path."""

    digest: str
    executable: bool


class Unreadable(Exception):
    """What stands at a path cannot be seen or read now; the message says why."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"cannot be read now ({os.strerror(error.errno or 0)}); tried again until it can")


def path_problem(path: str) -> str | None:
    """Why the database would not take this path (protocol: `file_path`), or None."""
    if not _is_utf8(path):
        return "its name is not UTF-8"
    if len(path.encode()) > MAX_PATH_BYTES or any(
        len(segment.encode()) > MAX_SEGMENT_BYTES for segment in path.split("/")
    ):
        return "its name is too long"
    if path.count("/") >= MAX_SEGMENTS:
        return f"it lies below more than {MAX_SEGMENTS - 1} directories"
    if "\\" in path or any(unicodedata.category(c) == "Cc" for c in path):
        return "its name has a backslash or a control character"
    if not unicodedata.is_normalized("NFC", path):
        return "its name is not in Unicode's composed form (NFC)"
    return None


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(path: str) -> str:
    """`path` with nothing in it that a terminal cannot show or would act on."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _raise(error: OSError) -> None:
    raise error


def scan(
    root: Path,
    below: str = "",
    *,
    rules: IgnoreRules | None = None,
    failed: Callable[[OSError], None] = _raise,
    left_out: Callable[[str, LeftOut], None] = lambda path, reason: None,
) -> Iterable[str]:
    """The paths of the project's files in `root`, relative, `/`-separated, without links and what `rules` leave out.

    Args:
        root: The directory.
        below: A directory in it, to begin there.
        rules: What of it is the project's; by default the rules that stand in it.
        failed: Is told of each directory that cannot be listed; one that went away meanwhile has no files.
        left_out: Is told of each file and directory that the rules leave out, a directory with a slash at its end.

    Of a directory whose own path the database would not take only itself is given. One that is not UTF-8 must not be
    opened: that would be an event that the watch fails at. One that is too long could not be.
    """
    rules = rules or IgnoreRules(root)
    for relative, names in _walk(root, below, rules, failed, left_out):
        prefix = relative + "/" if relative else ""
        for name in names:
            try:
                reason = rules.left_out(prefix + name)
            except OSError:
                continue  # `_walk` has said of this directory that its rules cannot be read
            if reason is None:
                yield prefix + name
            else:
                left_out(prefix + name, reason)


def directories(root: Path, rules: IgnoreRules) -> list[Path]:
    """The directories in which the project's files are, its root among them; those that can be listed."""
    walked = _walk(root, "", rules, lambda _: None, lambda path, reason: None)
    return [root, *(root / relative for relative, _ in walked if relative)]


def _walk(
    root: Path,
    below: str,
    rules: IgnoreRules,
    failed: Callable[[OSError], None],
    left_out: Callable[[str, LeftOut], None],
) -> Iterator[tuple[str, list[str]]]:
    """Each directory that may hold files of the project, relative, and the names that are no directories to enter."""

    def on_error(error: OSError) -> None:
        if not isinstance(error, GONE):
            failed(error)

    for directory, names, files in os.walk(root / below, onerror=on_error):
        relative = relative_path(root, directory)
        if relative is None:
            names.clear()
            continue
        prefix = relative + "/" if relative else ""
        entered, closed = [], []
        try:
            rules.read(relative)
            for name in names:
                if os.path.islink(os.path.join(directory, name)):
                    continue
                if reason := rules.left_out(prefix + name, directory=True):
                    left_out(f"{prefix}{name}/", reason)
                elif path_problem(prefix + name):
                    closed.append(name)
                else:
                    entered.append(name)
        except OSError as error:  # a file of rules that cannot be read: what it keeps back must not be sent
            error.filename = directory
            failed(error)
            names.clear()
            continue
        names[:] = entered
        yield relative, [*files, *closed]


def list_files(
    root: Path,
    below: str = "",
    *,
    rules: IgnoreRules | None = None,
    left_out: Callable[[str, LeftOut], None] = lambda path, reason: None,
) -> tuple[set[str], dict[str, str]]:
    """The files at and below a directory; and the directories that cannot be listed, with a slash, and why."""
    unlisted: dict[str, str] = {}

    def failed(error: OSError) -> None:
        relative = relative_path(root, str(error.filename))
        if relative is not None:
            unlisted[f"{relative}/"] = str(Unreadable(error))

    return set(scan(root, below, rules=rules, failed=failed, left_out=left_out)), unlisted


def relative_path(root: Path, path: str) -> str | None:
    """`path` below `root`, or None when it is elsewhere or in a directory that is never the project's."""
    relative = os.path.relpath(path, root).replace(os.sep, "/")
    if relative == ".":
        return ""
    if relative.startswith("../") or not NEVER.isdisjoint(relative.split("/")):
        return None
    return relative


def mode_of(root: Path, path: str) -> int | None:
    """What stands at a path, by its `st_mode`; None: nothing, or nothing of the project's: a link is on the way to it.

    Raises `OSError` when that cannot be seen, which it cannot when `root` itself is away.
    """
    if not stat.S_ISDIR(os.stat(root).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    here, mode = str(root), stat.S_IFDIR
    for part in path.split("/") if path else ():
        if not stat.S_ISDIR(mode):
            return None
        here = f"{here}/{part}"
        try:
            mode = os.lstat(here).st_mode
        except GONE:
            return None
    return mode


def is_directory(root: Path, path: str) -> bool:
    """Whether a directory can be seen to stand there."""
    try:
        mode = mode_of(root, path)
    except OSError:
        return False
    return mode is not None and stat.S_ISDIR(mode)


def stands(root: Path, path: str) -> bool:
    """Whether a file or a directory is there, without opening it: that would be an event that the watch may fail at."""
    try:
        mode = mode_of(root, path)
    except (OSError, ValueError):
        return False
    return mode is not None and (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def read_file(root: Path, path: str) -> tuple[LocalFile, bytes] | None:
    """A regular file's content, as it is now; None when there is none (any more). Raises `Unreadable`."""
    try:
        mode = mode_of(root, path)
        if mode is None or not stat.S_ISREG(mode):
            return None
    except OSError as error:
        raise Unreadable(error) from None
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(root / path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(MAX_ASSET + 1)
    except GONE:
        return None
    except OSError as error:
        # A link that came between: seen at the next look.
        raise Unreadable(error) from None
    if not stat.S_ISREG(status.st_mode):
        return None
    return LocalFile(hashlib.sha256(content).hexdigest(), bool(status.st_mode & stat.S_IXUSR)), content


def in_few_words(unread: Mapping[str, str]) -> Iterator[str]:
    """A line for each path, or one for many with the same reason. A directory, with a slash, stands for its files."""
    whole = tuple(path for path in unread if path.endswith("/"))
    told = {path: why for path, why in unread.items() if path in whole or not _below(path, whole)}
    for reason in dict.fromkeys(told.values()):
        paths = sorted(
            "the whole directory" if path == "/" else shown(path) for path in told if told[path] == reason
        )
        if len(paths) > FEW:
            paths = [f"{paths[0]} and {len(paths) - 1} more"]
        yield from (f"{path}: {reason}" for path in paths)


def _below(path: str, directories: tuple[str, ...]) -> bool:
    return "/" in directories or path.startswith(directories)


def as_text(content: bytes) -> str | None:
    """The text of a file that the database keeps as text; None for a binary or very large one."""
    if len(content) > MAX_TEXT or b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None
