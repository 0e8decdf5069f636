"""Says what is wrong with a lock file that a container offers: pure, from its bytes and those of the one before.

Whoever installs by a lock file runs what it names. So each entry that is new must come from a registry that is known
(the public ones, those of the settings, those that the lock file before named), with the hash of its bytes. An entry
that the lock file before had as well is not asked: a person put it there, or it was asked when it came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

PUBLIC: Final = frozenset(f"registry.{domain}" for domain in ("npmjs.org", "yarnpkg.com"))
"""Hosts that lock files name, whichever registry is used in their place."""

_HASH: Final = re.compile(r"^(sha512|sha384|sha256|sha1)-[A-Za-z0-9+/]+={0,2}(\?\S*)?( |$)")
_CHECKSUM: Final = re.compile(r"^(\w+/)?[0-9a-f]{64,128}$")
_URL: Final = re.compile(r"""https?://[^\s"'{},#]+""")

Entry = tuple[str, str | None, str | None]
"""What one package is from: a text that says all of it, its source (None: the registry that is set up), its hash."""


class NotALockFile(Exception):
    """The text is not what its name says."""


def lock_problem(path: str, content: str, before: str | None, hosts: AbstractSet[str]) -> str | None:
    """The rule that a lock file breaks; None: it may be taken, or is no lock file.

    Args:
        path: Its last segment says which kind it is.
        content: What is offered.
        before: What the project has at the path; None: nothing.
        hosts: Registries that are allowed beside the public ones.
    """
    entries = READERS.get(path.rpartition("/")[2])
    if entries is None:
        return None
    known: set[str] = set()
    allowed = PUBLIC | hosts
    if before is not None:
        allowed |= {urlsplit(url).hostname or "" for url in _URL.findall(before)}
        with suppress(NotALockFile):  # a person's; the one that is offered is judged by itself
            known = {said for said, _, _ in entries(before)}
    try:
        for said, source, digest in entries(content):
            if said in known:
                continue
            if source is not None and not _is_from(source, allowed):
                return "lock_registry"
            if digest is None or not (_HASH.match(digest) or _CHECKSUM.match(digest)):
                return "lock_integrity"
    except NotALockFile:
        return "lock_format"
    return None


def is_lock(path: str) -> bool:
    """Whether a path is a lock file's."""
    return path.rpartition("/")[2] in READERS


def _is_from(source: str, hosts: AbstractSet[str]) -> bool:
    try:
        parts = urlsplit(source)
        return parts.scheme in ("http", "https") and not parts.username and (parts.hostname or "") in hosts
    except ValueError:
        return False


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise NotALockFile from None
    if not isinstance(found, dict):
        raise NotALockFile
    return found


def _npm(text: str) -> Iterator[Entry]:
    lock = _object(text)
    packages = lock.get("packages")
    if not isinstance(packages, dict):
        raise NotALockFile  # of a version before 2, which npm has not written since 2020
    if not isinstance(lock.get("dependencies", {}), dict):
        raise NotALockFile
    for place, package in packages.items():
        if not isinstance(package, dict):
            raise NotALockFile
        resolved = package.get("resolved")
        if package.get("link") is True or package.get("inBundle") is True:
            continue  # a directory of the project; bytes that are in another package's
        if resolved is None and not re.search(r"(^|/)node_modules/", place):
            continue  # the project itself, and its workspaces
        yield (
            f"{place} {json.dumps(package, sort_keys=True)}",
            None if resolved is None else str(resolved),
            _text(package.get("integrity")),
        )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _pnpm(text: str) -> Iterator[Entry]:
    """Of YAML it reads what pnpm writes: `resolution: {…}` on one line, under the package's name."""
    if not re.search(r"^lockfileVersion:", text, re.M):
        raise NotALockFile
    name = ""
    for line in text.splitlines():
        if line.rstrip().endswith(":") and not line.strip().startswith("resolution"):
            name = line.strip()
        found = re.match(r"\s*['\"]?resolution['\"]?\s*:(.*)$", line)
        if found is None:
            if re.search(r"['\"]?\b(tarball|resolution)\b['\"]?\s*:", line):
                raise NotALockFile
            continue
        inside = re.match(r"\s*\{(.*)\}\s*$", found[1])
        if inside is None:
            raise NotALockFile
        fields = dict(re.findall(r"(\w+):\s*'?([^,'{}]+)'?", inside[1]))
        if set(fields) == {"directory", "type"} and fields["type"].strip() == "directory":
            continue
        source = fields.get("tarball") or fields.get("repo")
        yield f"{name} {inside[1]}", source, fields.get("integrity")


def _yarn(text: str) -> Iterator[Entry]:
    for block in re.split(r"\n(?=\S)", text):
        head, _, rest = block.partition("\n")
        if not head or (head.startswith("#") and ":" not in rest):
            continue
        fields = dict(re.findall(r'^  "?(\w+)"?:?\s+"?([^"\n]+)"?\s*$', rest, re.M))
        if "version" not in fields or head.startswith("__metadata"):
            continue
        if "resolution" in fields:  # since Yarn 2
            _, _, source = fields["resolution"].rpartition("@")
            if "workspace:" in fields["resolution"] or source.startswith("portal:"):
                continue
            address = re.search(r"__archiveUrl=(\S+)", fields["resolution"])
            is_plain = "@npm:" in fields["resolution"] or "@patch:" in fields["resolution"]
            from_ = address[1].replace("%3A", ":").replace("%2F", "/") if address else None
            yield block, from_ if is_plain else fields["resolution"], fields.get("checksum")
        else:
            yield block, fields.get("resolved", "nowhere"), fields.get("integrity")


def _bun(text: str) -> Iterator[Entry]:
    packages = _object(re.sub(r",(\s*[}\]])", r"\1", text)).get("packages")
    if not isinstance(packages, dict):
        raise NotALockFile
    for name, package in packages.items():
        if not isinstance(package, list) or not package or not isinstance(package[0], str):
            raise NotALockFile
        if "@workspace:" in package[0]:
            continue
        is_plain = len(package) == 4 and isinstance(package[1], str)
        source = (package[1] or None) if is_plain else package[0]
        yield f"{name} {json.dumps(package, sort_keys=True)}", source, _text(package[-1])


READERS: Final[dict[str, Callable[[str], Iterator[Entry]]]] = {
    "package-lock.json": _npm,
    "npm-shrinkwrap.json": _npm,
    "pnpm-lock.yaml": _pnpm,
    "yarn.lock": _yarn,
    "bun.lock": _bun,
}
