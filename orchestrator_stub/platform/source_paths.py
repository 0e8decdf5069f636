"""Which paths are the project's: the names that are left out, what the database takes, and how one is shown."""

from __future__ import annotations

import os
import unicodedata
from typing import Final

IGNORED_DIRECTORIES: Final = frozenset(
    {
        ".cache",
        ".git",
        ".hg",
        ".idea",
        ".parcel-cache",
        ".preview-sync",
        ".svn",
        ".turbo",
        ".vite",
        ".vscode",
        "build",
        "coverage",
        "dist",
        "node_modules",
    }
)
"""What a project's .gitignore names anyway: made from the source, or a tool's own."""

IGNORED_FILES: Final = frozenset({".DS_Store", "Thumbs.db", "4913"})
"""The last one is Vim's probe of the directory."""

IGNORED_SUFFIXES: Final = ("~", ".swp", ".swx", ".swo", ".log", ".tsbuildinfo", ".crswap", ".tmp")


def ignored(path: str) -> bool:
    """Whether a file is no part of the project."""
    *directories, name = path.split("/")
    return (
        not IGNORED_DIRECTORIES.isdisjoint(directories)
        or name in IGNORED_FILES
        or name.startswith(".#")
        or name.endswith(IGNORED_SUFFIXES)
    )


def path_problem(path: str) -> str | None:
    """Why the database would not take this path (protocol: `file_path`), or None."""
    if not _is_utf8(path):
        return "its name is not UTF-8"
    if len(path.encode()) > 1024 or any(len(segment.encode()) > 255 for segment in path.split("/")):
        return "its name is too long"
    if path.count("/") >= 64:
        return "it lies below more than 63 directories"
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
