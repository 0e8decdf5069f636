"""`preview-agent status`: the running agent's own report on one screen, for people who look at a machine.

Reads `/status` over HTTP like anybody else; nothing here knows the agent's insides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import orjson

from agent.errors import Unavailable
from agent.problems import REMEDIES

SPARKS = "▁▂▃▄▅▆▇█"


def read_status(url: str) -> dict[str, Any]:
    """The report at `url` (the health server's base). Raises `Unavailable` when nobody answers."""
    try:
        answer = httpx.get(f"{url.rstrip('/')}/status", timeout=5, trust_env=False)
        answer.raise_for_status()
        report: dict[str, Any] = orjson.loads(answer.content)
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(f"the agent at {url}", type(error).__name__) from None
    return report


def render(report: Mapping[str, Any], *, now: float) -> str:
    """The screen for `report`. `now` in Unix seconds."""
    link, dev, hydrate = report["link"], report["dev_server"], report["hydrate"]
    behind = report["head_revision"] - report["revision"]
    head = "at the head" if behind <= 0 else f"{behind} behind {report['head_revision']}"
    mode = hydrate["mode"] or "no tree yet"
    lines = [
        f"{report['state']}{'' if report['ready'] else ' (not ready)'}   preview-agent {report['agent_version']},"
        f" up {_span(report['uptime_seconds'])}",
        f"  project    {report['project_id']}   session {report['session_id']}",
        f"  tree       revision {report['revision']} ({head}), {report['files']} files, {mode}",
        f"  lag        {sparkline(report['recent_lags_seconds'])}  last {_ms(report['last_lag_seconds'])}",
        f"  link       {link['state']} since {_ago(link['since'], now)}; last frame {_ago(link['last_frame_at'], now)},"
        f" event {_ago(link['last_event_at'], now)}, catch-up {_ago(link['last_catch_up_at'], now)}",
        f"  dev server {dev['state']}{_because(dev['reason'])} at {dev['url']}, {dev['restarts']} restarts",
    ]
    if report["catch_up"]:
        lines.append(f"  catch-up   wanted: {', '.join(report['catch_up'])}")
    for problem in report["problems"]:
        where = f" {problem['file_path']}" if problem["file_path"] else ""
        first = str(problem["detail"]).splitlines()[0] if problem["detail"] else ""
        lines.append(f"  ! {problem['kind']}{where}: {first}")
        if problem["kind"] in REMEDIES:
            lines.append(f"      → {REMEDIES[problem['kind']]}")
    return "\n".join(lines)


def sparkline(values: list[float]) -> str:
    """One character a value, on a scale from nothing to the largest."""
    top = max(values, default=0.0)
    return "".join(SPARKS[min(7, int(8 * value / top))] if top else SPARKS[0] for value in values) or "–"


def show(
    url: str,
    *,
    as_json: bool,
    watch: bool,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Print the status of the agent at `url`; with `watch` again every second until interrupted.

    Returns 0 when it is ready, 1 when not, 69 when nobody answers.
    """
    while True:
        try:
            report = read_status(url)
        except Unavailable as error:
            if not watch:
                say(f"{error}; is it running, and is this its HEALTH_PORT?")
                return 69
            text, code = str(error), 69
        else:
            code = 0 if report["ready"] else 1
            text = orjson.dumps(report).decode() if as_json else render(report, now=time.time())
        say(f"\x1b[2J\x1b[H{text}" if watch and not as_json else text)
        if not watch:
            return code
        sleep(1.0)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _ago(moment: float | None, now: float) -> str:
    return "never" if moment is None else f"{_span(max(0.0, now - moment))} ago"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:.0f} ms"


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
