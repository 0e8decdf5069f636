"""Marked secrets, and the search for them in everything that is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

SHAPES = (
    re.compile(rb"eyJ[\w-]{8,}\.eyJ[\w-]{8,}"),
    re.compile(rb"canary-[\w-]+"),
    re.compile(rb"sb_secret_\w+"),
)
"""A JWT, whoever signed it; a mark of ours; a secret key of Supabase's."""

CREDENTIALS = (
    b"REALTIME_TOKEN",
    b"SNAPSHOT_URL",
    b"REALTIME_API_KEY",
    b"SESSION_API_URL",
    b"OTEL_EXPORTER_OTLP_HEADERS",
)
"""Variables of the agent that the project's programs never see."""


def leaks(said: bytes | str, secrets: Iterable[str] = ()) -> list[str]:
    """What `said` gives away: anything of a secret's shape, and `secrets` themselves, plain or as in a URL."""
    raw = said.encode() if isinstance(said, str) else said
    found = [match[0].decode(errors="replace") for shape in SHAPES for match in shape.finditer(raw)]
    for secret in secrets:
        found += [secret for form in {secret, quote(secret, safe="")} if form.encode() in raw]
    return sorted(set(found))


def leaking(places: Mapping[str, bytes | str], secrets: Iterable[str] = ()) -> dict[str, list[str]]:
    """Every place that gives something away, and what."""
    known = list(secrets)
    return {place: found for place, said in places.items() if (found := leaks(said, known))}


def shown_by(pid: int, *parts: str) -> dict[str, bytes]:
    """What `/proc` shows of a process; what is gone or closed shows nothing."""
    shown = {}
    for part in parts:
        try:
            shown[f"/proc/{pid}/{part}"] = Path(f"/proc/{pid}/{part}").read_bytes()
        except OSError:
            continue
    return shown
