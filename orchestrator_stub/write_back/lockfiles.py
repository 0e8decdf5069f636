"""Says what is wrong with a lock file that a container offers: pure, from its bytes and those of the one before.

Whoever installs by a lock file runs what it names. So each entry that is new must come from a registry that is known
(the public ones, those of the settings, those that the lock file before installs from), with the hash of its bytes. An
entry that the lock file before had as well is not asked: a person put it there, or it was asked when it came.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from orchestrator_stub.write_back.lock_readers import READERS, Entry, NotALockFile

PUBLIC: Final = frozenset(f"registry.{domain}" for domain in ("npmjs.org", "yarnpkg.com"))
"""Hosts that lock files name, whichever registry is used in their place."""

_HASH: Final = re.compile(r"^(sha512|sha384|sha256|sha1)-[A-Za-z0-9+/]+={0,2}(\?\S*)?( |$)")
_CHECKSUM: Final = re.compile(r"^(\w+/)?[0-9a-f]{64,128}$")


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
    allowed = set(PUBLIC | hosts)
    if before is not None:
        with suppress(NotALockFile):  # a person's; the one that is offered is judged by itself
            for entry in entries(before):
                known.add(entry.said)
                allowed.add(_host(entry.source))
    allowed.discard("")
    try:
        rules = [
            rule
            for entry in entries(content)
            if entry.said not in known and (rule := _broken(entry, allowed))
        ]
    except NotALockFile:
        return "lock_format"
    return rules[0] if rules else None


def is_lock(path: str) -> bool:
    """Whether a path is a lock file's."""
    return path.rpartition("/")[2] in READERS


def _broken(entry: Entry, allowed: AbstractSet[str]) -> str | None:
    if entry.source is not None and _host(entry.source) not in allowed:
        return "lock_registry"
    if entry.digest is None:
        return "lock_integrity" if entry.needs_digest else None
    return None if _HASH.match(entry.digest) or _CHECKSUM.match(entry.digest) else "lock_integrity"


def _host(source: str | None) -> str:
    """The host of an address that a registry's may be; empty: it is none."""
    try:
        parts = urlsplit(source or "")
        is_plain = parts.scheme in ("http", "https") and not parts.username
        return parts.hostname or "" if is_plain else ""
    except ValueError:
        return ""
