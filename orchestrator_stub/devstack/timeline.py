"""Draws how long each part of a start took: `preview-orchestrator dev --timeline`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import httpx

BAR: Final = 40
"""Characters of the longest bar."""
PARTS: Final = {
    "machine": "until the agent's process",
    "hydrated": "files on the disk",
    "modules": "node_modules in place",
    "dev_server": "dev server started",
    "first_page": "first page",
    "shown": "on a screen",
}


async def start_of(health_url: str, clock: float) -> dict[str, float]:
    """Return when each part ended, in seconds from the start of `dev`; nothing, where the agent does not say.

    Args:
        health_url: The agent's.
        clock: Seconds since the start of `dev`, now.
    """
    async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
        try:
            status = (await http.get(f"{health_url}/status")).json()
            machine = max(0.0, clock - float(status["uptime_seconds"]))
            return {
                "machine": machine,
                **{part: machine + float(end) for part, end in status["start"].items()},
            }
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def bars(ends: Mapping[str, float]) -> str:
    """One line for each part, from where the one before ended. `ends`: seconds from the start, by part."""
    whole = max(ends.values(), default=0.0) or 1.0
    lines, before = [], 0.0
    for part, end in sorted(ends.items(), key=lambda each: each[1]):
        begin, until = round(BAR * before / whole), round(BAR * end / whole)
        bar = " " * begin + "█" * max(1, until - begin)
        lines.append(f"    {PARTS.get(part, part):<26}{bar:<{BAR + 1}} {max(0.0, end - before):6.2f} s\n")
        before = max(before, end)
    return "".join(lines) + f"    {'together':<26}{'':<{BAR + 1}} {before:6.2f} s\n\n"
