"""Says which paths of a directory are the project's: git's own ignore rules, and a default where there are none.

    never         version control's, `node_modules`, our own state: the database takes no such path
    leftovers     what an editor leaves beside a file (`x~`, `.x.swp`), and texts that lost a conflict
    git           what `.gitignore` files and `.git/info/exclude` name, as git reads them
    default       where there is no git and no `.gitignore`: builds, caches and logs at the top of the directory
    secret        there too: files that often hold secrets (`.env`, keys, `.npmrc`). With rules of its own, the
                  directory says itself what is not to be shared

`include`, patterns as git writes them, brings back what `git`, `default` or `secret` leave out. A directory that is
left out is brought back whole, since git does not go into it either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Final

from pathspec.patterns.gitignore.base import GitIgnorePatternError
from pathspec.patterns.gitignore.spec import GitIgnoreSpecPattern


class Rules:
    """The patterns of one file, as git judges one path by them: what lies above the path has been judged before."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._patterns: list[tuple[re.Pattern[str], bool]] = []
        for line in lines:
            try:
                pattern = GitIgnoreSpecPattern(_as_bytes(line.removesuffix("\r")))
            except GitIgnorePatternError:
                continue  # as git passes over what is no pattern
            if pattern.include is not None and pattern.regex is not None:
                expression = pattern.regex
                if _BELOW in expression.groupindex:
                    expression = re.compile(expression.pattern + r"\Z", expression.flags)
                self._patterns.append((expression, pattern.include))

    def judge(self, path: str) -> bool | None:
        """Whether `path` (a directory with a slash at its end) is ignored; None when no pattern names it.

        The last pattern that names it counts. One that names a directory above it says nothing of it.
        """
        asked = _as_bytes(path)
        for expression, ignored in reversed(self._patterns):
            if expression.search(asked):
                return ignored
        return None


_BELOW: Final = "ps_d"
"""The group in which pathspec's expressions go on from a directory to all that is below it."""


def _as_bytes(text: str) -> str:
    """A letter for each byte: git's `?` and `[!a]` stand for one byte."""
    return text.encode(errors="surrogateescape").decode("latin-1")


NEVER: Final = frozenset({".git", ".hg", ".svn", ".preview-sync", "node_modules"})

_LEFTOVER: Final = re.compile(
    r"\.DS_Store|Thumbs\.db|4913|\.#.*|.*(?:~|\.sw[a-z]|\.crswap)|.*\.conflict-v\d+", re.DOTALL
)
"""`4913` is Vim's probe of a directory, `.crswap` Chrome's, `.conflict-v7` ours (`three_way`)."""

# fmt: off
DEFAULT: Final = Rules([
    "/dist/", "/build/", "/coverage/", "/.cache/", "/.parcel-cache/", "/.turbo/", "/.vite/", "/.next/", "/.nuxt/",
    "/.output/", "/.svelte-kit/", "/.astro/", "/.idea/", "/.vscode/", "*.log", "*.tsbuildinfo", "*.tmp",
])

SECRET: Final = Rules([
    ".env", ".env.*", "!.env.example", "!.env.sample", "!.env.template", ".npmrc", ".yarnrc.yml", "*.pem", "*.key",
    "*.p12", "*.pfx", "id_rsa", "id_ed25519",
])
# fmt: on

MAX_RULES: Final = 1 << 20
"""Bytes of one file of rules that are read; git's own largest collection of templates has 60 KB."""


class LeftOut(StrEnum):
    """Why a path is no part of the project (the module's docstring)."""

    NEVER = "never"
    LEFTOVER = "leftover"
    GIT = "git"
    DEFAULT = "default"
    SECRET = "secret"  # noqa: S105 - a reason's name


class IgnoreRules:
    """The rules of one directory as they are at the first use of each file of rules; make another to read them anew.

    `root` is absolute. `include`: patterns that bring paths back.

    Methods raise `OSError` when a file of rules is there and cannot be read: without it, what it keeps back would be
    sent.
    """

    def __init__(self, root: Path, include: Sequence[str] = ()) -> None:
        self._root = root
        self._include = Rules(include)
        self._specs: dict[str, Rules | None] = {}
        self._directories: dict[str, LeftOut | None] = {}
        self._top = next((d for d in (root, *root.parents) if (d / ".git").exists()), None)
        """Of the repository that `root` is in. Its rules above `root` count for what is in it, not for itself."""
        self._above: list[tuple[str, Rules]] | None = None

    def read(self, directory: str) -> None:
        """Read what stands in a directory, so that it is known whether it can be. Raises `OSError`."""
        self._spec_of(directory)

    def left_out(self, path: str, *, directory: bool = False) -> LeftOut | None:
        """Why `path` (relative, `/`-separated) is no part of the project; None when it is one."""
        segments = path.split("/")
        for end in range(1, len(segments)):
            above = "/".join(segments[:end])
            if (reason := self._of_directory(above)) is not None:
                return reason
        return self._of_directory(path) if directory else self._judge(path, directory=False)

    def _of_directory(self, path: str) -> LeftOut | None:
        if path not in self._directories:
            self._directories[path] = self._judge(path, directory=True)
        return self._directories[path]

    def _judge(self, path: str, *, directory: bool) -> LeftOut | None:
        """Of the path alone: what is above it is a part of the project."""
        name = path.rpartition("/")[2]
        if name in NEVER:
            return LeftOut.NEVER
        if not directory and _LEFTOVER.fullmatch(name):
            return LeftOut.LEFTOVER
        asked = path + "/" if directory else path
        if self._include.judge(asked):
            return None
        verdict = self._git_says(asked)
        if verdict is not None:
            return LeftOut.GIT if verdict else None
        if self._top is None and self._spec_of("") is None:
            if DEFAULT.judge(asked):
                return LeftOut.DEFAULT
            if not directory and SECRET.judge(asked):
                return LeftOut.SECRET
        return None

    def _git_says(self, asked: str) -> bool | None:
        """Whether git ignores it; None when no rule names it. The deepest file of rules that names it decides."""
        directories = asked.rstrip("/").split("/")[:-1]
        for depth in range(len(directories), -1, -1):
            spec = self._spec_of("/".join(directories[:depth]))
            below = asked if depth == 0 else asked[len("/".join(directories[:depth])) + 1 :]
            if spec is not None and (said := spec.judge(below)) is not None:
                return said
        if self._above is None:
            self._above = self._rules_above()
        for prefix, spec in self._above:
            if (said := spec.judge(f"{prefix}{asked}")) is not None:
                return said
        return None

    def _spec_of(self, directory: str) -> Rules | None:
        """The rules that stand in one directory below the root. Raises `OSError`."""
        if directory not in self._specs:
            self._specs[directory] = _read(self._root / directory / ".gitignore")
        return self._specs[directory]

    def _rules_above(self) -> list[tuple[str, Rules]]:
        """Of the repository's directories above the root, the nearest first, and its `info/exclude`, which is weakest.

        Each with what leads from there to the root.
        """
        if self._top is None:
            return []
        found = []
        inner = PurePosixPath(self._root.relative_to(self._top).as_posix())
        for above in inner.parents if inner.parts else ():
            found.append((self._top / above / ".gitignore", f"{inner.relative_to(above)}/"))
        whole = f"{inner}/" if inner.parts else ""
        found.append((self._top / ".git" / "info" / "exclude", whole))
        return [(prefix, spec) for file, prefix in found if (spec := _read(file)) is not None]


def _read(file: Path) -> Rules | None:
    """The rules in a file; None when there is none. Raises `OSError`."""
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_RULES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return Rules(text.decode(errors="surrogateescape").removeprefix("\ufeff").split("\n"))
