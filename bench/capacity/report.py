"""Writes what a run found for the size that was asked for: a table, a picture, and what it cannot say and why."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

from bench.capacity.estimate import Interval, Line, Refused, fit_sizes, line_of, mean_of
from bench.capacity.run import Measured
from bench.harness.svg import FAINT, svg

PLACE: Final = Path(__file__).parents[2] / "docs" / "scale"
BEGIN, END = "<!-- capacity: written by `make capacity` -->", "<!-- capacity: end -->"

NOT_LINEAR: Final = """\
- Commits share a flush of the log when many wait for one, and heartbeats a statement: more load costs less of each.
- Locks, the vacuum of what was overwritten, and garbage collection cost more with size, late and all at once.
- The time that something takes is not carried on: it stays as it is until something is full, and then it is not."""


@dataclass(frozen=True, slots=True)
class Cost:
    """One row: what so many sessions need of something. `each` of one session, `whole` of all, in `unit`."""

    name: str
    unit: str
    each: Interval
    whole: Interval
    bent: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a run says. `left_out`: sizes and rows of which nothing is said, and why."""

    sessions: int
    costs: tuple[Cost, ...]
    kinds: Mapping[str, Mapping[str, Interval]]
    storms: Mapping[str, Mapping[str, float]]
    left_out: tuple[str, ...]


def report_of(measured: Measured, sessions: int) -> Report:
    """Judge a run and carry it on to `sessions`. Raises `Refused` when it can say nothing."""
    kept, left_out = fit_sizes(measured.sizes)
    windows = [(size, used) for size, used in measured.windows if size in kept]
    memory = [(size, used) for size, used in measured.memory if size in kept]
    rows: list[tuple[str, str, float, Sequence[tuple[float, float]]]] = []
    for name in windows[0][1].cpu:
        rows.append((f"{name}: processor", "cores", 1.0, [(n, u.cpu[name] / u.seconds) for n, u in windows]))
    rows.append(("log of the database", "MB/s", 1e-6, [(n, u.wal / u.seconds) for n, u in windows]))
    for name in memory[0][1]:
        rows.append((f"{name}: memory", "GB", 1e-9, [(n, float(m[name])) for n, m in memory]))
    costs = []
    for name, unit, scale, points in rows:
        try:
            line = line_of(points)
        except Refused as why:
            left_out.append(f"{name}: {why}")
            continue
        costs.append(_cost(name, unit, scale, line, sessions))
    kinds: dict[str, dict[str, Interval]] = {}
    for kind, blocks in measured.kinds.items():
        kinds[kind] = {name: mean_of([used.cpu[name] * 1e3 for used in blocks]) for name in blocks[0].cpu}
        kinds[kind]["log"] = mean_of([used.wal / 1e3 for used in blocks])
    storms = {
        name: {**{part: seconds * 1e3 for part, seconds in used.cpu.items()}, "log": used.wal / 1e3}
        for name, used in measured.storms.items()
    }
    left_out += [f"{what}: {count} times" for what, count in measured.failures.items()]
    return Report(sessions, tuple(costs), kinds, storms, tuple(left_out))


def _cost(name: str, unit: str, scale: float, line: Line, sessions: int) -> Cost:
    return Cost(name, unit, line.slope.times(scale), line.at(sessions).times(scale), line.bent)


def table_of(report: Report) -> str:
    """The report as Markdown."""
    lines = [
        f"| what | a session | {report.sessions:,} sessions | |", "|---|---|---|---|",
        *(
            f"| {c.name} | {_small(c.each, c.unit)} | {_range(c.whole)} {c.unit} | {c.bent or 'a line'} |"
            for c in report.costs
        ),
        "", "Each by itself, in milliseconds of a processor and kilobytes of the log:", "",
    ]  # fmt: skip
    parts = list(next(iter(report.kinds.values()), {}))
    if parts:
        lines += [f"| request | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
        for kind, each in report.kinds.items():
            lines.append(f"| {kind} | {' | '.join(_range(each[part]) for part in parts)} |")
        for storm, seconds in report.storms.items():
            lines.append(f"| {storm} | {' | '.join(f'{seconds[part]:.2g}' for part in parts)} |")
    for storm, seconds in report.storms.items():
        spent = sum(value for part, value in seconds.items() if part != "log") / 1e3
        whole = (
            f"a third of {report.sessions:,} take {spent * report.sessions / 3:,.0f} s of processors in all"
        )
        lines += ["", f"Storm, {storm}: {whole}, without TLS."]
    lines += ["", "What does not grow in a straight line, and is not carried on:", "", NOT_LINEAR]
    if report.left_out:
        lines += ["", "Left out of this run:", "", *(f"- {each}" for each in report.left_out)]
    return "\n".join(lines) + "\n"


def picture_of(measured: Measured, report: Report) -> str:
    """Processor time by size, with the lines through it, as SVG."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2)
        for place, (axis, names) in enumerate(
            zip(axes, (list(measured.windows[0][1].cpu), ["log"]), strict=True)
        ):
            for name in names:
                points = [
                    (n, used.wal / used.seconds / 1e6 if place else used.cpu[name] / used.seconds)
                    for n, used in measured.windows
                ]
                dots = axis.scatter([n for n, _ in points], [y for _, y in points], s=8, label=name)
                try:
                    line = line_of(points)
                except Refused:
                    continue
                sizes = [0, max(n for n, _ in points)]
                axis.plot(
                    sizes, [line.at(n).value for n in sizes], color=dots.get_facecolor()[0], linewidth=1
                )
            axis.set_title(
                "log, MB a second" if place else "processor, cores", loc="left", color=FAINT, fontsize=8
            )
            axis.set_xlabel("sessions")
            axis.set_ylim(bottom=0)
            axis.set_xlim(left=0)
            axis.grid(axis="y")
            axis.legend(loc="upper left")
        figure.tight_layout()

    return svg(7.0, 2.8, draw)


def keep(measured: Measured, report: Report, about: Mapping[str, Any], place: Path = PLACE) -> list[str]:
    """Write what was measured, the picture, and the table into `README.md`; the files that were written."""
    (place / "capacity.json").write_text(json.dumps({**about, **measured.as_json()}, indent=1) + "\n")
    (place / "capacity.svg").write_text(picture_of(measured, report))
    page = place / "README.md"
    written = f"{BEGIN}\n\n{_about(about)}\n\n![Cores and log by sessions](capacity.svg)\n\n{table_of(report)}\n{END}"
    text, found = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: written, page.read_text(), flags=re.S
    )
    if not found:
        raise ValueError(f"{page} has no place for the table")
    page.write_text(text)
    return ["capacity.json", "capacity.svg", "README.md"]


def _about(about: Mapping[str, Any]) -> str:
    machine = about.get("machine", {})
    return (
        f"Measured {about.get('at', '?')} on {machine.get('cores', '?')} cores of {machine.get('cpu', '?')}."
    )


def _small(each: Interval, unit: str) -> str:
    """Of one session, in a unit that fits."""
    scale, name = {"cores": (1e6, "µs/s"), "MB/s": (1e6, "B/s"), "GB": (1e6, "KB")}[unit]
    return f"{_range(each.times(scale))} {name}"


def _range(interval: Interval) -> str:
    half = (interval.high - interval.low) / 2
    return f"{interval.value:,.3g} ± {half:,.2g}"
