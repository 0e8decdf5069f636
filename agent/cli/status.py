"""`preview-agent status`: shows the running agent's report on one screen, for people who look at a machine.

Reads `/status` over HTTP like anybody else, and nothing else of the agent. On a terminal lines are wrapped to
its width and the words that matter are coloured (unless NO_COLOR is set); into a pipe goes plain text, one screen after
another. What the report quotes, the dev server's output and paths, loses its control characters first: a project must
not control the operator's terminal.
"""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import httpx
import orjson

from agent.core.errors import Unavailable
from agent.core.model import REMEDIES
from agent.net import IDENTITY

SPARKS = "▁▂▃▄▅▆▇█"
MARGIN = 13
"""Columns before the text of a row."""
MOST_BYTES = 16 * 2**20
"""Of a report. One with 200 lines of the longest kind and 200 problems has less than two million."""
MOST_PATHS = 3
"""Shown of one kind of problem; a thousand refused paths have one remedy."""
EVERY = 1.0
"""Seconds between two screens with `--watch`."""
MOST_LAGS = 24
"""Drawn: as many as leave the row's words on a line of 80 columns."""

Row = tuple[str, str, str]
"""Label, text, colour."""

GREEN, YELLOW, RED, PLAIN = "32", "33", "31", ""
COLOURS = {
    **dict.fromkeys(("serving", "live", "ready"), GREEN),
    **dict.fromkeys(("halted", "stopped", "failed", "refused"), RED),
}
"""Of states; what is on its way somewhere is yellow."""

_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Style:
    """How a screen is drawn. `columns` None: lines are not wrapped."""

    columns: int | None = None
    colour: bool = False

    def paint(self, text: str, colour: str) -> str:
        """Return `text`, coloured where there is colour."""
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and colour else text

    def row(self, label: str, text: str, colour: str = PLAIN) -> list[str]:
        """Return one row in its colour, wrapped."""
        whole = f"{label:<{MARGIN}}{text}"
        lines = [whole]
        if self.columns is not None:
            indent = " " * min(MARGIN, self.columns // 3)
            lines = textwrap.wrap(whole, self.columns, subsequent_indent=indent, break_on_hyphens=False)
        return [self.paint(line, colour) for line in lines]


PIPE = Style()


def style_of(out: TextIO, environ: Mapping[str, str]) -> Style:
    """Choose how to draw on `out`: the width of its terminal; colour unless NO_COLOR is set (no-color.org)."""
    if not out.isatty():
        return PIPE
    colour = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    return Style(max(20, os.get_terminal_size(out.fileno()).columns), colour)


def read_status(url: str) -> dict[str, Any]:
    """Read the report at `url` (the health server's base). Raises `Unavailable` when no agent answers."""
    try:
        report = orjson.loads(_read(f"{url.rstrip('/')}/status"))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OverflowError) as error:
        raise Unavailable(f"the agent at {url}", type(error).__name__) from None
    if not isinstance(report, dict) or "agent_version" not in report:
        raise Unavailable(f"the agent at {url}", "what answers there is something else")
    return report


def _read(url: str) -> bytes:
    body = bytearray()
    with httpx.stream("GET", url, headers=IDENTITY, timeout=5, trust_env=False) as answer:
        answer.raise_for_status()
        for piece in answer.iter_raw():
            body += piece
            if len(body) > MOST_BYTES:
                raise ValueError("no report is as large")
    return bytes(body)


def render(report: Mapping[str, Any], *, now: float, style: Style = PIPE) -> list[str]:
    """Return the screen's lines for `report`. `now` in Unix seconds."""
    report = _printable(report)
    state, mode = report["state"], report["hydrate"]["mode"] or "no tree yet"
    lines = [
        f"{style.paint(state, COLOURS.get(state, YELLOW))} {'' if report['ready'] else '(not ready)   '}"
        f"preview-agent {report['agent_version']}, up {_span(report['uptime_seconds'])}, {mode}"
    ]
    for label, text, colour in (*_parts(report, now), *_problems(report["problems"])):
        lines += style.row(label, text, colour)
    return lines


def _parts(report: Mapping[str, Any], now: float) -> Iterator[Row]:
    """Yield what each part of the agent is doing."""
    link, lags = report["link"], report["recent_lags_seconds"]
    behind = report["head_revision"] - report["revision"]
    head = "at the head" if behind <= 0 else f"{behind} behind the head, {report['head_revision']}"
    lag = f"last {1000 * lags[-1]:.0f} ms, worst {1000 * max(lags):.0f} ms" if lags else "no event yet"
    why = _because(None if link["state"] == "live" else link["why"])
    yield "  project", report["project_id"], PLAIN
    yield "  session", report["session_id"], PLAIN
    yield "  tree", f"revision {report['revision']} ({head}), {report['files']} files", PLAIN
    yield "  lag", f"{sparkline(lags[-MOST_LAGS:])}   {lag}", PLAIN
    yield (
        "  link",
        f"{link['state']}{why} for {_span(now - link['since'])}; last frame {_ago(link['last_frame_at'], now)},"
        f" event {_ago(link['last_event_at'], now)}, catch-up {_ago(link['last_catch_up_at'], now)}",
        COLOURS.get(link["state"], YELLOW),
    )
    if report.get("shadow"):
        yield _shadow(report["shadow"], now)
    else:
        dev = report["dev_server"]
        told = f"{dev['state']}{_because(dev['reason'])} at {dev['url']}, restarted {_times(dev['restarts'])}"
        yield "  dev server", told, COLOURS.get(dev["state"], YELLOW)
    if report.get("write_back"):
        yield from _write_back(report["write_back"])
    if report["catch_up"]:
        yield "  catch-up", f"wanted: {', '.join(report['catch_up'])}", PLAIN


def _shadow(shadow: Mapping[str, Any], now: float) -> Row:
    """Return the row that stands in the dev server's place."""
    if not shadow["looks"]:
        return "  shadow", f"of {shadow['live_dir']}: not compared yet", YELLOW
    found = ", ".join(f"{count} {rule}" for rule, count in shadow["differences"].items() if count)
    since = shadow["equal_since"]
    result = f"equal for {_span(now - since)}" if since is not None else found
    flight = f", {shadow['unsettled']} in flight" if shadow["unsettled"] else ""
    looked = f"{shadow['files']} files, looked {_ago(shadow['looked_at'], now)}"
    colour = YELLOW if since is None else PLAIN
    return "  shadow", f"of {shadow['live_dir']}: {result}{flight}; {looked}", colour


def _write_back(given: Mapping[str, Any]) -> Iterator[Row]:
    """Yield what tools made and the project has not taken yet, and why."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(given["states"].items()) if count)
    why = _because(given["halted"] or given["failure"])
    colour = YELLOW if given["halted"] or given["failure"] else PLAIN
    waiting = f"{given['offers_waiting']} to be answered"
    yield "  write-back", f"{states or 'nothing waits'}; {waiting}{why}", colour
    for path in given["paths"][:MOST_PATHS]:
        rule = f" ({path['rule']})" if path["rule"] else ""
        yield "", f"{path['file_path']}: {path['state']}{rule}", PLAIN
    if len(given["paths"]) > MOST_PATHS:
        yield "", f"… and {len(given['paths']) - MOST_PATHS} more in --json", PLAIN


def _problems(problems: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Yield each kind once, with its first paths and its remedy."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for problem in problems:
        kinds.setdefault(problem["kind"], []).append(problem)
    for kind, found in kinds.items():
        yield "  problem", kind + (f", {_times(len(found))}" if len(found) > 1 else ""), RED
        for problem in found[:MOST_PATHS]:
            yield "", _in_one_line(problem), PLAIN
        if len(found) > MOST_PATHS:
            yield "", f"… and {len(found) - MOST_PATHS} more in --json", PLAIN
        remedy = REMEDIES.get(kind)  # type: ignore[call-overload]
        if remedy:
            yield "", f"→ {remedy}", YELLOW


def _in_one_line(problem: Mapping[str, Any]) -> str:
    """Return one problem in one line: of a log's tail what looks like the reason."""
    path, detail = problem["file_path"], str(problem["detail"] or "")
    lines = [line.strip() for line in detail.splitlines() if line.strip()]
    told = " / ".join([line for line in lines if "error" in line.lower()][:3] or lines[-3:])
    return told if not path or path in told else f"{path}: {told}"


def sparkline(values: Sequence[float]) -> str:
    """Draw one character a value, on a scale from zero to the largest."""
    top = max(values, default=0.0)
    return "".join(SPARKS[min(7, int(8 * value / top))] if top else SPARKS[0] for value in values) or "–"


def show(
    url: str, out: TextIO, err: TextIO, *, as_json: bool, watch: bool, environ: Mapping[str, str]
) -> int:
    """Print the status of the agent at `url`; with `watch` again every second until interrupted.

    Returns 0 when it is ready, 1 when it is not, 69 when nobody answers: with `watch`, at the last screen.
    """
    code, terminal = 69, Terminal(out)
    try:
        while True:
            lines: list[str] = []
            try:
                report = read_status(url)
            except Unavailable as error:
                code, sorry = 69, f"{error}; is it running, and is this its HEALTH_PORT?"
                if not watch or as_json:
                    err.write(f"{sorry}\n")
                    err.flush()
                else:
                    lines = textwrap.wrap(sorry, style_of(out, environ).columns or len(sorry))
            else:
                code = 0 if report["ready"] else 1
                if as_json:
                    option = orjson.OPT_INDENT_2 if out.isatty() and not watch else 0
                    lines = [orjson.dumps(report, option=option).decode()]
                else:
                    lines = render(report, now=time.time(), style=style_of(out, environ))
            terminal.draw(lines, again=watch and not as_json)
            if not watch:
                return code
            time.sleep(EVERY)
    except KeyboardInterrupt:
        terminal.end()
        return code


class Terminal:
    """What stands on the terminal, to be terminal over in place; into a pipe, one screen after another."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._height = 0
        self._size: os.terminal_size | None = None

    def draw(self, lines: Sequence[str], *, again: bool) -> None:
        """Draw `lines`; with `again` over those of the last time, and no more of them than the terminal has."""
        if not again:
            self._out.write("".join(f"{line}\n" for line in lines))
        elif not self._out.isatty():
            self._out.write("".join(f"{line}\n" for line in [*lines, ""]))
        else:
            size = os.get_terminal_size(self._out.fileno())
            if len(lines) >= size.lines:
                lines = [*lines[: size.lines - 2], f"… {len(lines) - size.lines + 2} more lines"]
            home = f"\x1b[{self._height}A" if self._height else ""
            if self._size not in (None, size):
                home = "\x1b[2J\x1b[H"  # the terminal has wrapped what was there in its own way
            body = "".join(f"\x1b[K{line}\n" for line in lines)
            # Without automatic wrapping a line wider than its characters is cut, and the count of lines stays right.
            self._out.write(f"\r{home}\x1b[?7l{body}\x1b[?7h\x1b[J")
            self._height, self._size = len(lines), size
        self._out.flush()

    def end(self) -> None:
        """The last screen stays, and the prompt comes below it."""
        if self._height:
            self._out.write("\n")
            self._out.flush()


def _printable(value: Any) -> Any:
    """Return `value` without what a terminal would take for a command."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("", value)
    if isinstance(value, dict):
        return {key: _printable(each) for key, each in value.items()}
    return [_printable(each) for each in value] if isinstance(value, list) else value


def _span(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _ago(moment: float | None, now: float) -> str:
    return "never" if moment is None else f"{_span(now - moment)} ago"


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def _because(reason: str | None) -> str:
    return f" ({reason})" if reason else ""
