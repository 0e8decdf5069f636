"""Computes the key of an install from everything that decides its result. Pure: equal inputs give equal keys on every
machine.

The *install key* names a node_modules on one kind of machine, as the cache beside the project keeps it. The *layer key*
adds what native packages are built against, and is what the orchestrator keeps archives by; to it a key says nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, Final

KEY_FORM: Final = 3
"""Raised when the same project is to be another install: 3 leaves out what is secret in an .npmrc."""
LAYER_FORM: Final = 1
"""Raised when an archive of one agent cannot be read by the next."""
BUNDLE_FORM: Final = 1
"""The same for the archive of what Vite bundles ahead."""
_KEY_LENGTH: Final = 40
_SECRET: Final = re.compile(
    rb"^[^\S\n]*[^\n=:#;]*(?:[^\n=]*:)?[\"']?(?:_auth|_authToken|_password|username|email|certfile|keyfile|cert|key|otp|token"
    rb"|npmAuthToken|npmAuthIdent|npmLoginToken)[\"']?[^\S\n]*[=:][^\n]*(?:\n|\Z)",
    re.M | re.I,
)
"""A line of .npmrc, .yarnrc, .yarnrc.yml or bunfig.toml that has a credential."""
_USERINFO: Final = re.compile(rb"(?<=://)[^/@\s\"']*@")


@dataclass(frozen=True, slots=True)
class Platform:
    """What native packages depend on. `node_abi`: `process.versions.modules`; `libc`: glibc, musl or another's name."""

    node_abi: str
    system: str
    machine: str
    libc: str


def install_key(
    what: Mapping[str, Any], files: Iterable[tuple[str, bytes]], packages: Mapping[str, Any] | None = None
) -> str:
    """Return the key of an install.

    Args:
        what: The manager, the kind of machine, whether scripts run, and the fields of package.json that decide.
        files: Names and contents of the lock file and of what else decides; credentials in them do not count.
        packages: The same fields of a workspace's packages, by path; None: it is none.
    """
    whole = hashlib.sha256(json.dumps([KEY_FORM, what], sort_keys=True).encode())
    for name, content in files:
        content = without_secrets(content) if name.startswith((".npmrc", ".yarnrc", "bunfig")) else content
        whole.update(f"\0{name}\0{len(content)}\0".encode())
        whole.update(content)
    if packages is not None:
        whole.update(json.dumps(packages, sort_keys=True).encode())
    return whole.hexdigest()[:_KEY_LENGTH]


def without_secrets(content: bytes) -> bytes:
    """Return a package manager's settings without their credentials, which change while what is installed does not."""
    return _USERINFO.sub(b"", _SECRET.sub(b"", content))


def layer_key(install: str, platform: Platform) -> str:
    """Return the key of the layer for an install key on a platform."""
    whole = json.dumps([LAYER_FORM, install, *astuple(platform)]).encode()
    return hashlib.sha256(whole).hexdigest()[:_KEY_LENGTH]


def bundle_key(layer: str, root: str, imports: Iterable[str], configs: Iterable[tuple[str, bytes]]) -> str:
    """Return the key of what Vite bundles ahead.

    Args:
        layer: The key of the layer it is made of.
        root: The project's directory: Vite takes it into a hash of its own, and bundles anew in another one.
        imports: The packages that the sources import.
        configs: Names and contents of the settings files at the top.
    """
    whole = hashlib.sha256(json.dumps([BUNDLE_FORM, layer, root, list(imports)]).encode())
    for name, content in configs:
        whole.update(f"\0{name}\0{len(content)}\0".encode(errors="surrogateescape"))
        whole.update(content)
    return whole.hexdigest()[:_KEY_LENGTH]
