"""Reads what a lock file has installed: of each package where it comes from and its hash. Pure.

What the package managers read differently from this would be installed unseen. So only the form that they write
themselves is read, all of it, and everything else is no lock file: a name twice, a YAML alias or tag, a comment within
an entry, a field of a source that is not known here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

DEEPEST: Final = 32
"""Levels of a YAML file: pnpm's and Yarn's have five."""

_NAME = r"(?:@[\w.~-]+/)?[\w.~-]+"
_PLAIN: Final = re.compile(r"v?\d[\w.+-]*")
"""A version of a registry's package. Whatever else may stand there is a place to install from."""
_LOCATOR: Final = re.compile(rf"({_NAME})@(.+)", re.DOTALL)


class Entry(NamedTuple):
    """What one package is from.

    Attributes:
        said: all that the file says of it.
        source: where its bytes are; None: at the registry that is set up.
        digest: their hash.
        needs_digest: False: its package manager writes none for it.
    """

    said: str
    source: str | None
    digest: str | None
    needs_digest: bool = True


class NotALockFile(Exception):
    """The text is not what its name says."""


# --- JSON: npm, Bun


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs) or "__proto__" in found:
        raise NotALockFile  # parsers differ in which of two they take, and this name changes others in JavaScript
    return found


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError):
        raise NotALockFile from None
    return _mapping(found)


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise NotALockFile
    return value


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _said(*parts: object) -> str:
    try:
        return json.dumps(parts, sort_keys=True)
    except RecursionError:
        raise NotALockFile from None


def _npm(text: str) -> Iterator[Entry]:
    lock = _object(text)
    for place, package in _mapping(lock.get("packages")).items():  # there are none before version 2, of 2020
        resolved, linked = _mapping(package).get("resolved"), package.get("link") is True
        _, is_installed, name = f"/{place}".rpartition("/node_modules/")
        if linked or (resolved is None and not is_installed):
            continue  # a directory of the project, the project itself, and its workspaces
        if resolved is None and package.get("inBundle") is True:
            continue  # bytes that are in another package's
        source = None if resolved is None else str(resolved)
        if source is None and not _is_at_the_registry(package.get("name", name), package.get("version")):
            source = f"{name} {package.get('version')}"
        yield Entry(_said(place, package), source, _text(package.get("integrity")))
    yield from _npm_6(_mapping(lock.get("dependencies", {})), "")


def _npm_6(dependencies: Mapping[str, Any], above: str) -> Iterator[Entry]:
    """The same once more, as versions of npm before 7 read it."""
    waiting = [(above, dependencies)]
    while waiting:
        place, found = waiting.pop()
        for name, package in found.items():
            resolved, version = _mapping(package).get("resolved"), package.get("version")
            waiting.append((f"{place}/{name}", _mapping(package.get("dependencies", {}))))
            if package.get("bundled") is True and resolved is None:
                continue
            if (
                resolved is None
                and isinstance(version, str)
                and version.startswith("file:")
                and not _archive(version)
            ):
                continue  # a directory of the project
            source = None if resolved is None else str(resolved)
            alias = re.fullmatch(rf"npm:({_NAME})@(.+)", str(version))
            if not _is_at_the_registry(alias[1] if alias else name, alias[2] if alias else version):
                source = f"{name} {version}"
            yield Entry(_said(place, name, package), source, _text(package.get("integrity")))


def _archive(source: str) -> bool:
    return re.search(r"\.(tgz|tar|tar\.gz)$", source, re.I) is not None


def _is_at_the_registry(name: object, version: object) -> bool:
    """Whether npm asks the registry for `name@version`, which it does where nothing is `resolved`."""
    return (
        isinstance(name, str)
        and isinstance(version, str)
        and re.fullmatch(_NAME, name) is not None
        and _PLAIN.fullmatch(version) is not None
    )


def _bun(text: str) -> Iterator[Entry]:
    packages = _mapping(_object(re.sub(r",(\s*[}\]])", r"\1", text)).get("packages"))
    for name, package in packages.items():
        if not isinstance(package, list) or not package or not isinstance(package[0], str):
            raise NotALockFile
        locator = _LOCATOR.fullmatch(package[0])
        if locator is not None and locator[2].startswith("workspace:"):
            continue
        is_plain = locator is not None and _PLAIN.fullmatch(locator[2]) is not None
        is_plain = is_plain and len(package) == 4 and isinstance(package[1], str)
        source = (package[1] or None) if is_plain else package[0]
        yield Entry(_said(name, package), source, _text(package[-1]))


# --- YAML: pnpm, and Yarn since 2


def _yaml(text: str) -> dict[str, Any]:
    """Read one document of mappings, lists and texts, event by event: what is nested deeply is not followed."""
    top: list[Any] = []
    open_: list[tuple[list[Any] | dict[str, Any], str | None]] = [(top, None)]
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader)):
            if isinstance(event, yaml.CollectionEndEvent):
                open_.pop()
            elif isinstance(event, yaml.NodeEvent):
                if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag or len(open_) > DEEPEST:
                    raise NotALockFile
                _add(open_, event)
    except (yaml.YAMLError, ValueError):
        raise NotALockFile from None
    return _mapping(top[0] if len(top) == 1 else None)


def _add(open_: list[tuple[Any, str | None]], event: yaml.NodeEvent) -> None:
    """Put one node where the parser is."""
    value: Any = event.value if isinstance(event, yaml.ScalarEvent) else None
    if value is None:
        value = {} if isinstance(event, yaml.MappingStartEvent) else []
    into, key = open_[-1]
    if isinstance(into, list):
        into.append(value)
    elif key is None:
        if not isinstance(value, str) or value in into or value in ("<<", "__proto__"):
            raise NotALockFile
        open_[-1] = into, value
    else:
        into[key] = value
        open_[-1] = into, None
    if not isinstance(value, str):
        open_.append((value, None))


def _pnpm(text: str) -> Iterator[Entry]:
    lock = _yaml(text)
    if "lockfileVersion" not in lock:
        raise NotALockFile
    for name, package in _mapping(lock.get("packages", {})).items():
        resolution = _mapping(_mapping(package).get("resolution"))
        if resolution.keys() == {"directory", "type"} and resolution["type"] == "directory":
            continue
        source = resolution.get("tarball")
        if not resolution.keys() <= {"integrity", "tarball"}:
            source = _said(resolution)
        yield Entry(_said(name, resolution), source and str(source), _text(resolution.get("integrity")))


_YARN_FIELDS: Final = frozenset(
    [
        "version",
        "resolution",
        "checksum",
        "conditions",
        "languageName",
        "linkType",
        "bin",
        "dependencies",
        "dependenciesMeta",
        "optionalDependencies",
        "peerDependencies",
        "peerDependenciesMeta",
    ]
)


def _yarn_since_2(text: str) -> Iterator[Entry]:
    for name, package in _yaml(text).items():
        if name == "__metadata":
            continue
        resolution = _mapping(package).get("resolution")
        if not isinstance(resolution, str) or not package.keys() <= _YARN_FIELDS:
            raise NotALockFile
        for source in _yarn_sources(resolution):
            # It leaves out the hash of what is for other systems than its own, and asks the registry for them.
            for_others = source is None and isinstance(package.get("conditions"), str)
            yield Entry(_said(name, package), source, _text(package.get("checksum")), not for_others)


def _yarn_sources(resolution: str) -> Iterator[str | None]:
    """Where a package comes from: more than one place where one is made of another."""
    for _ in range(DEEPEST):
        locator = _LOCATOR.fullmatch(resolution)
        kind, _, rest = (locator[2] if locator is not None else "").partition(":")
        place, _, parameters = rest.partition("::")
        addresses = parse_qs(parameters).get("__archiveUrl", [])
        if kind in ("workspace", "portal", "link"):
            return
        if (
            kind not in ("npm", "patch")
            or (kind == "npm" and not _PLAIN.fullmatch(place))
            or len(addresses) > 1
        ):
            yield resolution
            return
        yield addresses[0] if addresses else None
        if kind == "npm":
            return
        resolution = unquote(place.partition("#")[0])  # what the patch is made for
    raise NotALockFile


# --- Yarn 1

_BARE = r"[a-zA-Z][^:\s\\\",\[\]#]*"
_WORD: Final = rf'(?:"[^"\\\n]*"|{_BARE})'
_HEAD: Final = re.compile(rf"{_WORD}(?:, {_WORD})*:")
_FIELD: Final = re.compile(rf"  (version|resolved|integrity|uid|registry) ({_WORD})")
_PART: Final = re.compile(r"  (?:dependencies|optionalDependencies):")
_DEPENDENCY: Final = re.compile(rf"    {_WORD} {_WORD}")


def _yarn_1(text: str) -> Iterator[Entry]:
    head, fields, in_part = "", dict[str, str](), False
    for line in [*text.split("\n"), "end:"]:
        if not line or line.startswith("#"):
            continue
        field = _FIELD.fullmatch(line)
        if _HEAD.fullmatch(line):
            if head:
                yield Entry(_said(head, fields), fields.get("resolved", "nowhere"), fields.get("integrity"))
            head, fields, in_part = line, {}, False
        elif head and field is not None and field[1] not in fields:
            fields[field[1]], in_part = field[2].strip('"'), False
        elif head and _PART.fullmatch(line):
            in_part = True
        elif not in_part or not _DEPENDENCY.fullmatch(line):
            raise NotALockFile


def _yarn(text: str) -> Iterator[Entry]:
    return _yarn_since_2(text) if re.search(r"^__metadata:", text, re.M) else _yarn_1(text)


READERS: Final[dict[str, Callable[[str], Iterator[Entry]]]] = {
    "package-lock.json": _npm,
    "npm-shrinkwrap.json": _npm,
    "pnpm-lock.yaml": _pnpm,
    "yarn.lock": _yarn,
    "bun.lock": _bun,
}
