"""Chooses the directory of a project that is previewed: `frontend` beside `backend`, `apps/web`, a lone index.html.

In this order: DEV_ROOT; package.json at the top; the one directory below whose package.json depends on a known dev
server, of several the one with the name of a front end; the one with a `dev` script, likewise; a page without any
package.json. What was chosen says why, and where nothing can be shown a sentence says what would make it run.

Other processes write these files, so nothing here follows a link, blocks on a pipe or trusts a size.
"""

from __future__ import annotations

import itertools
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.core.errors import AgentError, PathRefused
from agent.core.model import parse_path
from agent.project.scripts import TOOLS, Tool, is_argument, known_tool

LARGEST_PACKAGE = 2**20
"""Bytes of a package.json that is read. The largest on npm are some 100 KB."""
MOST_DIRECTORIES = 1000
"""Directories that are searched for a package.json. Work of a few milliseconds."""
MOST_ENTRIES = 10_000
"""Names that are read in all of them together."""
MOST_READ = 2**19
"""Bytes of all package.json below the top together: the event loop asks, and the worst take 0.3 s a megabyte."""
NAMES = ("frontend", "web", "client", "app", "site")
"""What people call the part of a project that has the page, the likeliest first."""
SCRIPTS = ("dev", "start")
"""What starts a project, by the name of its script."""
REMEDY = (
    'add a package.json with a "dev" script, or an index.html, or name the directory to preview in DEV_ROOT '
    "(root of the run settings), or its command in DEV_COMMAND (dev_command)"
)
OTHERS = {
    "deno.json": "deno task dev", "deno.jsonc": "deno task dev", "manage.py": "python3 manage.py runserver",
    "app.py": "python3 app.py", "main.py": "python3 main.py", "requirements.txt": "python3 -m YOUR_MODULE",
    "pyproject.toml": "python3 -m YOUR_MODULE", "go.mod": "go run .", "Cargo.toml": "cargo run",
    "bin/rails": "bin/rails server", "Gemfile": "bundle exec rackup", "mix.exs": "mix phx.server",
    "composer.json": "php -S 127.0.0.1:8000", "index.php": "php -S 127.0.0.1:8000",
    "mvnw": "./mvnw spring-boot:run", "gradlew": "./gradlew bootRun", "hugo.toml": "hugo server",
    "_config.yml": "bundle exec jekyll serve",
}  # fmt: skip
"""What projects without a package.json have at their top, and what usually starts them, the surest first. Visitors are
passed on to whatever port it listens on."""


class ProjectUnreadable(AgentError):
    """package.json is not JSON, or is not a regular file."""


class NothingToServe(AgentError):
    """There is nothing in the project that a preview could be of. The message says what there is, and what helps."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory that may be previewed."""

    place: str
    """Relative to the project's directory; "" is that itself."""
    package: Mapping[str, Any]
    """Its package.json; empty without one."""
    why: str = ""
    """Why it was chosen, for people."""

    @property
    def tool(self) -> Tool | None:
        """The known dev server that it depends on."""
        return known_tool(self.package)

    @property
    def scripts(self) -> dict[str, str]:
        """Its scripts by name."""
        declared = self.package.get("scripts")
        if not isinstance(declared, dict):
            return {}
        return {name: text.strip() for name, text in declared.items() if isinstance(text, str)}

    @property
    def script(self) -> str | None:
        """The name of the script that starts it."""
        return next((name for name in SCRIPTS if self.scripts.get(name)), None)

    @property
    def is_page(self) -> bool:
        """Whether it has a page and nothing that would serve it."""
        return not self.script and not self.tool


def choose(directory: Path, root: str | None = None) -> tuple[Candidate, list[Candidate]]:
    """Choose what to preview.

    Args:
        directory: Where the project's files are.
        root: DEV_ROOT: the directory to preview, relative to that one.

    Returns:
        What was chosen, and the other directories that have a package.json.

    Raises:
        NothingToServe: There is nothing, or it is not clear which is meant.
        ProjectUnreadable: There is a package.json that cannot be used.
    """
    below: list[Candidate] = []
    unreadable: ProjectUnreadable | None = None
    places = _directories(directory)
    left = MOST_READ
    for place in places:
        if os.path.lexists(directory / place / "package.json"):
            try:
                candidate, size = _read(directory, place, "", min(left, LARGEST_PACKAGE))
            except ProjectUnreadable as error:
                unreadable = error
            else:
                below.append(candidate)
                left -= size
    if root is not None:
        return _named(directory, root.strip("/")), below
    if os.path.lexists(directory / "package.json"):
        top = read(directory, "", "package.json is at the top")
        if not top.is_page or os.path.lexists(directory / "index.html"):
            return top, below
    if chosen := front_end(below):
        return chosen, below
    # The pages of another kind of project, below its top, are templates.
    if (
        unreadable is None
        and (page := _page(directory, places, below))
        and not (page.place and _other(directory))
    ):
        return page, below
    raise unreadable or NothingToServe(_sentence(directory, below))


def _named(directory: Path, root: str) -> Candidate:
    place = "" if root in ("", ".") else root
    if place and not (_is_path(place) and _is_directory(directory, place)):
        raise NothingToServe(f"DEV_ROOT is {root!r}, and the project has no such directory; {REMEDY}")
    if os.path.lexists(directory / place / "package.json"):
        named = read(directory, place, "DEV_ROOT names it")
    else:
        named = Candidate(place, {}, "DEV_ROOT names it")
    if named.is_page and not os.path.lexists(directory / place / "index.html"):
        raise NothingToServe(f"DEV_ROOT is {root!r}: {_lacks(named)}; {REMEDY}")
    return named


def front_end(found: list[Candidate]) -> Candidate | None:
    """Choose by dev server, then by script; of several by name."""
    kinds: tuple[tuple[str, Callable[[Candidate], bool]], ...] = (
        ("depends on a known dev server", lambda each: each.tool is not None),
        ('has a "dev" script', lambda each: each.script == "dev"),
    )
    for what, fits in kinds:
        fitting = [each for each in found if fits(each)]
        if len(fitting) == 1:
            return Candidate(fitting[0].place, fitting[0].package, f"it is the only directory that {what}")
        for name in NAMES:
            named = [each for each in fitting if each.place.rpartition("/")[2] == name]
            if len(named) == 1:
                places = ", ".join(each.place for each in fitting[:5])
                why = f"of {places} it has the name of a front end"
                return Candidate(named[0].place, named[0].package, why)
    return None


def _page(directory: Path, places: list[str], below: list[Candidate]) -> Candidate | None:
    """Choose a page that no package.json is beside of."""
    if os.path.lexists(directory / "index.html"):
        return Candidate("", {}, "index.html is at the top")
    pages = [
        place
        for place in places
        if os.path.lexists(directory / place / "index.html")
        and not any(f"{place}/".startswith(f"{each.place}/") for each in below)
    ]
    if len(pages) == 1:
        return Candidate(pages[0], {}, "it is the only directory with an index.html")
    return None


def _sentence(directory: Path, found: list[Candidate]) -> str:
    """Say what there is in a project of which nothing can be previewed."""
    several = [each for each in found if each.tool or each.script == "dev"]
    if several:
        places = ", ".join(f"{each.place} ({each.tool.name if each.tool else 'dev'})" for each in several[:5])
        return f"several directories could be previewed, {places}: name the one to preview in DEV_ROOT"
    if os.path.lexists(directory / "package.json"):
        return f"{_lacks(read(directory, ''))}; {REMEDY}"
    if found:
        return f"{_lacks(found[0])}; {REMEDY}"
    if name := _other(directory):
        return (
            f"there is no package.json in the project; for its {name} set DEV_COMMAND (dev_command of the run "
            f"settings) to what serves it, such as {OTHERS[name]!r}, in an image that has the programs for it"
        )
    return f"there is no package.json and no index.html in the project; {REMEDY}"


def _other(directory: Path) -> str | None:
    """Return by which name at the top it is another kind of project."""
    return next((name for name in OTHERS if os.path.lexists(directory / name)), None)


def _lacks(candidate: Candidate) -> str:
    scripts = ", ".join(list(candidate.scripts)[:5])
    known = ", ".join(tool.name for tool in TOOLS)
    has = f"it has {scripts}" if scripts else "it has no scripts"
    where = f"{candidate.place}/package.json" if candidate.place else "package.json"
    return f'{where} has no script "dev" or "start" ({has}), and depends on none of {known}'


def read(directory: Path, place: str = "", why: str = "") -> Candidate:
    """Read the package.json of a directory. Raises `ProjectUnreadable`."""
    return _read(directory, place, why, LARGEST_PACKAGE)[0]


def _read(directory: Path, place: str, why: str, most: int) -> tuple[Candidate, int]:
    """Read a package.json of at most so many bytes; and how many it has. Raises `ProjectUnreadable`."""
    name = f"{place}/package.json" if place else "package.json"
    raw = read_small(directory / name, most)
    if raw is None:
        raise ProjectUnreadable(f"cannot read {name}: not a regular file, or too large")
    try:
        package = json.loads(raw)
    except RecursionError:
        raise ProjectUnreadable(f"cannot read {name}: it is nested too deep") from None
    except ValueError as error:
        raise ProjectUnreadable(f"cannot read {name}: {error}") from None
    if not isinstance(package, dict):
        raise ProjectUnreadable(f"cannot read {name}: it is not an object")
    found = Candidate(place, package, why)
    for script, text in found.scripts.items():
        if script.removeprefix("pre").removeprefix("post") in SCRIPTS and not is_argument(text):
            unusable = "it has a character that no command line can hold"
            raise ProjectUnreadable(f'cannot use the script "{script}" of {name}: {unusable}')
    return found, len(raw)


def _directories(directory: Path) -> list[str]:
    """Return the directories of the project that are at most two deep, those above first."""
    first, seen = _names(directory, MOST_ENTRIES)
    first = first[:MOST_DIRECTORIES]
    found = list(first)
    for above in first:
        if seen >= MOST_ENTRIES:
            break
        names, entries = _names(directory / above, MOST_ENTRIES - seen)
        seen += entries
        found += (f"{above}/{name}" for name in names)
    return found[:MOST_DIRECTORIES]


def _names(directory: Path, most: int) -> tuple[list[str], int]:
    """Return the directories in one, in order, and how many entries were looked at, of at most so many.

    Those that the database could not have are not the project's.
    """
    try:
        with os.scandir(directory) as listing:
            entries = list(itertools.islice(listing, most))
    except OSError:
        return [], 0
    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    wanted = (
        name for name in names if not name.startswith(".") and name != "node_modules" and _is_path(name)
    )
    return sorted(wanted), len(entries)


def _is_path(name: str) -> bool:
    """Return whether the database could have this path."""
    try:
        parse_path(name)
    except PathRefused:
        return False
    return True


def _is_directory(top: Path, place: str) -> bool:
    """Return whether it is a directory of the project, with no link on the way."""
    return os.path.isdir(top / place) and os.path.realpath(top / place) == f"{os.path.realpath(top)}/{place}"


def read_small(path: Path, most: int) -> bytes | None:
    """Read a file without following a link or waiting. None when it is not a regular file, or has over `most` bytes."""
    try:
        with open(path, "rb", opener=_open_strictly) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                return None
            return file.read(most + 1)
    except OSError:
        return None


def _open_strictly(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
