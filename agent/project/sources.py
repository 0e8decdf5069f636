"""Says why an install may not be shared between projects: pure, from its lock file and its npm settings.

A shared layer stands for an install in every project that has the same key. So each package must be one whose bytes
the lock file names by their hash, from the registry that npm is set up for here: then whoever installs by that lock
gets the same, or nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

_REGISTRY: Final = re.compile(rb"^\s*(?:@[^:=]+:)?registry\s*=", re.M)
SHOWN: Final = 10
"""Reasons that are told of one project; more say nothing new."""


def not_shareable(lock: bytes | None, npmrc: bytes, registries: Sequence[str]) -> list[str]:
    """Return why an install may not be shared, a sentence each; none, when it may.

    Args:
        lock: The package-lock.json; None: there is none.
        npmrc: The project's .npmrc.
        registries: The registry that npm uses here, and npm's default, which lock files name whichever is used in its
            place (npm's `replace-registry-host`).
    """
    if lock is None:
        return ["there is no package-lock.json: what is installed is not said"]
    try:
        packages = json.loads(lock)["packages"]
    except (ValueError, KeyError, TypeError, RecursionError):
        packages = None
    if not isinstance(packages, dict):
        return ["package-lock.json cannot be read, or is of a version before 2"]
    reasons = [".npmrc names a registry of its own"] if _REGISTRY.search(npmrc) else []
    return [*reasons, *_reasons(packages, tuple(f"{each.rstrip('/')}/" for each in registries if each))][
        :SHOWN
    ]


def _reasons(packages: Mapping[str, Any], registries: tuple[str, ...]) -> Iterator[str]:
    for place, package in packages.items():
        if place == "":
            continue
        if not isinstance(package, dict) or not str(place).startswith("node_modules/"):
            yield f"{place} is a directory of the project"
            continue
        if package.get("inBundle") is True:  # its bytes are in another package's
            continue
        resolved, integrity = package.get("resolved"), package.get("integrity")
        if package.get("link") or (isinstance(resolved, str) and resolved.startswith("file:")):
            yield f"{place} is a directory of the project"
        elif resolved is not None and not str(resolved).startswith(registries):
            yield f"{place} is not from the public registry"
        elif not isinstance(integrity, str) or not integrity.startswith(
            ("sha512-", "sha384-", "sha256-", "sha1-")
        ):
            yield f"{place} has no integrity"
