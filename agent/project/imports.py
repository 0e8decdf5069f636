"""Finds the packages that a project's sources import, as Vite's scan for dependencies does, in a fraction of its time.

The set names what Vite bundles ahead for a project: with another import it bundles something else. A name that is not
really imported (in a comment, say) is in the set each time, so the set is the same where the sources are the same.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from agent.project.choice import read_small

SOURCES: Final = (
    ".js", ".jsx", ".ts", ".tsx", ".mjs", ".mts", ".cjs", ".cts", ".vue", ".svelte", ".astro", ".html", ".mdx",
)  # fmt: skip
LEFT_OUT: Final = ("node_modules", "dist", "build")
MOST_DIRECTORIES: Final = 5_000
MOST_FILES: Final = 5_000
MOST_BYTES: Final = 32 * 2**20
"""Of all sources together: a quarter of a second of reading. A project of more is bundled by Vite each time."""
MOST_FILE_BYTES: Final = 2**18
"""A larger file is generated, and is left out. The search of one takes 10 ms, in which nothing else runs."""
CONFIG: Final = re.compile(r"[\w.-]+\.config\.[cm]?[jt]s")
_IMPORT: Final = re.compile(
    rb"""(?:\bfrom|\bimport|\brequire)\s{0,20}\(?\s{0,20}["']([@\w][^"'\n:]{0,200})["']"""
)
"""Every repetition is bounded, since the project may write a source that makes an unbounded search take for ever."""


def imported(content: bytes) -> set[bytes]:
    """Return what a source imports by a package's name."""
    return set(_IMPORT.findall(content))


def imports(root: Path) -> tuple[list[str], list[tuple[str, bytes]]] | None:
    """Return what the sources below `root` import, in order, and the settings files at its top with their contents.

    None where it is too much to read, or more than a project's sources have.
    """
    found: set[bytes] = set()
    configs: list[tuple[str, bytes]] = []
    files, left = 0, MOST_BYTES
    for walked, (place, directories, names) in enumerate(os.walk(root)):
        directories[:] = [d for d in directories if d not in LEFT_OUT and not d.startswith(".")]
        if walked == MOST_DIRECTORIES:
            return None
        for name in sorted(names):
            is_config = CONFIG.fullmatch(name) is not None and Path(place) == root
            if not is_config and not name.endswith(SOURCES):
                continue
            content = read_small(Path(place, name), MOST_FILE_BYTES) or b""
            files, left = files + 1, left - len(content)
            if files > MOST_FILES or left < 0:
                return None
            if is_config:
                configs.append((name, content))
            found |= imported(content)
    return sorted(name.decode(errors="replace") for name in found), configs
