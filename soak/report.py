"""The end of a soak: one result, a JSON file for machines, and a Markdown page with plots for people.

OUT/report.json   OUT/report.md   OUT/memory.svg   OUT/descriptors.svg   OUT/lag.svg   OUT/behind.svg

    python -m soak.report      make the plots of the kept report again from soak/results/report.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from soak import growth
from soak.chart import Line, Mark, line_chart
from soak.growth import DESCRIPTORS, MEMORY, SERVER_DESCRIPTORS, Bounds, Judgement
from soak.run import Outcome
from soak.schedule import Kind
from soak.watch import ProcessRun, quantile

RESULTS = Path(__file__).parent / "results"
"""The report that is kept."""

ROLES = ("agent", "orchestrator", "supabase")

HEAVY = frozenset(
    {Kind.ORCHESTRATOR_RESTARTED, Kind.ORCHESTRATOR_KILLED, Kind.SUPABASE_KILLED, Kind.DATABASE_CRASHED}
)
"""What is marked in red: it meets everybody."""


BLUE, GREEN, PURPLE, RED, LIGHT = "#0969da", "#1a7f37", "#8250df", "#cf222e", "#b6d9ff"


@dataclass(frozen=True, slots=True)
class SoakResult:
    """Whether it passed. `wrong` has every reason why not."""

    wrong: tuple[str, ...]
    memory: dict[str, Judgement]
    descriptors: dict[str, Judgement]
    exit_code: int


def result_of(outcome: Outcome) -> SoakResult:
    """Judge a soak."""
    memory = {role: _judge(outcome, role, MEMORY, ProcessRun.memory) for role in ROLES}
    descriptors = {
        role: _judge(
            outcome, role, DESCRIPTORS if role == "agent" else SERVER_DESCRIPTORS, ProcessRun.descriptors
        )
        for role in ROLES
    }
    wrong = list(outcome.wrong)
    for role in ROLES:
        if memory[role].grows:
            wrong.append(f"the {role}'s memory grows: {_rates(memory[role], 1e6, 'MB')}; {memory[role].why}")
        if descriptors[role].grows:
            wrong.append(
                f"the {role}'s descriptors grow: {_rates(descriptors[role], 1, '')}; {descriptors[role].why}"
            )
    code = 1 if wrong else 130 if outcome.interrupted else 0
    return SoakResult(tuple(wrong), memory, descriptors, code)


def _judge(
    outcome: Outcome, role: str, bounds: Bounds, samples: Callable[[ProcessRun], list[tuple[float, float]]]
) -> Judgement:
    return growth.judge([growth.trend(samples(life)) for life in outcome.lives if life.role == role], bounds)


def write(outcome: Outcome, out: Path) -> str:
    """Write all of it into `out`; the summary as text."""
    out.mkdir(parents=True, exist_ok=True)
    judged = result_of(outcome)
    (out / "report.json").write_text(_lines(_as_json(outcome, judged)))
    draw(out)
    text = "\n".join(_summary(outcome, judged))
    (out / "report.md").write_text("\n".join(_page(outcome, judged)) + "\n")
    return text


def draw(out: Path) -> list[Path]:
    """The plots again, from the report that is in `out`; what was written."""
    drawn = charts(json.loads((out / "report.json").read_text()))
    for name, text in drawn.items():
        (out / name).write_text(text)
    return [out / name for name in drawn]


def _summary(outcome: Outcome, judged: SoakResult) -> Iterator[str]:
    settings = outcome.settings
    yield (
        f"{'FAILED' if judged.wrong else 'interrupted' if outcome.interrupted else 'passed'}: "
        f"{outcome.seconds / 60:.1f} minutes, {settings.agents} agents, seed {settings.seed}; "
        f"{outcome.edits['commits']} commits, {len(outcome.faults)} faults, "
        f"{len(outcome.checks)} looks at equality"
    )
    if missing := sorted(set(Kind) - struck(outcome)):
        yield f"Did not strike: {', '.join(missing)}."
    for each in judged.wrong[:40]:
        yield f"- {each}"


def struck(outcome: Outcome) -> set[Kind]:
    """The kinds of fault that were really made."""
    return {fault.kind for _, fault, said in outcome.faults if not said.startswith("could not")}


def _page(outcome: Outcome, judged: SoakResult) -> Iterator[str]:
    settings = outcome.settings
    yield f"# Soak: {'failed' if judged.wrong else 'interrupted' if outcome.interrupted else 'passed'}"
    yield ""
    yield from _summary(outcome, judged)
    yield ""
    yield (
        f"Again: `python -m soak --minutes {settings.minutes:g} --agents {settings.agents} "
        f"--vite {settings.vite} --seed {settings.seed}`. Machine: {_machine()}."
    )
    yield ""
    yield from _growth(outcome, judged)
    yield from _lag(outcome)
    yield from _equality(outcome)
    yield from _work(outcome)


def _growth(outcome: Outcome, judged: SoakResult) -> Iterator[str]:
    yield "## Growth"
    yield ""
    yield (
        f"The median and the greatest slope of all lives of at least {growth.WARM_UP + growth.LEAST:.0f} s, their "
        f"first {growth.WARM_UP:.0f} s left out (`soak/growth.py` says how). Allowed for memory: "
        f"{MEMORY.role / 1e6:g} and {MEMORY.life / 1e6:g} MB an hour; for descriptors {DESCRIPTORS.role:g} and "
        f"{DESCRIPTORS.life:g}. Less than {MEMORY.step / 1e6:g} MB, or {DESCRIPTORS.step:g} descriptors of an "
        f"agent and {SERVER_DESCRIPTORS.step:g} of a server, over all that was seen are no growth."
    )
    yield ""
    yield "| | lives | judged | memory at the end | memory, an hour | descriptors, an hour |"
    yield "|---|---:|---:|---:|---:|---:|"
    for role in ROLES:
        lives = [life for life in outcome.lives if life.role == role]
        ends = [life.samples[-1][1] / 1e6 for life in lives if life.samples]
        yield (
            f"| {role} | {len(lives)} | {judged.memory[role].judged} | "
            f"{f'{min(ends):.1f} to {max(ends):.1f} MB' if ends else ''} | "
            f"{_rates(judged.memory[role], 1e6, ' MB')} | {_rates(judged.descriptors[role], 1, '')} |"
        )
    yield ""
    for name, what in (("memory", "Resident memory"), ("descriptors", "Open descriptors")):
        yield f"![{what} over time]({name}.svg)"
    yield ""


def _lag(outcome: Outcome) -> Iterator[str]:
    yield "## Lag"
    yield ""
    yield (
        f"From commit to rename, {sum(outcome.lag_buckets.values()):.0f} events that the broadcast itself brought: "
        + ", ".join(
            f"{name} {value * 1000:.0f} ms"
            for name, share in (("median", 0.5), ("95 %", 0.95), ("99 %", 0.99))
            if (value := quantile(outcome.lag_buckets.items(), share)) is not None
        )
    )
    yield "(the agents share the machine's cores with everything else here; faults included)."
    yield ""
    yield "![Lag over time](lag.svg)"
    yield "![Agents behind over time](behind.svg)"
    yield ""


def _equality(outcome: Outcome) -> Iterator[str]:
    yield "## Equality"
    yield ""
    yield "Editor's directory = database = disk = what the agent says (`soak/equality.py`). Seconds from the last save"
    yield "to equality; without a last save after the faults, the agents' next heartbeats are waited for (30 s apart),"
    yield "which find a last event that was lost."
    yield ""
    yield "| at | last save | agents equal | median | slowest |"
    yield "|---:|---|---:|---:|---:|"
    for check in outcome.checks:
        took = list(check.took.values())
        yield (
            f"| {check.at:.0f} s | {'after the faults' if check.spoken else 'during them'} | "
            f"{len(took)} of {outcome.settings.agents} | "
            + (f"{statistics.median(took):.1f} s | {max(took):.1f} s |" if took else "| |")
        )
    yield ""


def _work(outcome: Outcome) -> Iterator[str]:
    yield "## Work and faults"
    yield ""
    yield ", ".join(f"{name} {count}" for name, count in outcome.edits.most_common()) + "."
    yield ""
    kinds = Counter(str(fault.kind) for _, fault, _ in outcome.faults)
    yield ", ".join(f"{name} {count}" for name, count in kinds.most_common()) + "."
    yield ""
    for name, count in outcome.kept.items():
        yield f"- {name}: {count}"
    yield ""
    yield "| what the agents counted | |"
    yield "|---|---:|"
    for name, count in sorted(outcome.totals.items()):
        yield f"| `{name}` | {count} |"
    yield ""
    yield "| what the logs warn of | times |"
    yield "|---|---:|"
    for name, count in sorted(outcome.logs.counts.items()):
        yield f"| `{name}` | {count} |"
    yield ""
    yield "<details><summary>Every fault</summary>"
    yield ""
    for at, fault, said in outcome.faults:
        yield f"- {at:.0f} s: {fault.kind}: {said}"
    yield ""
    yield "</details>"


def charts(whole: Mapping[str, Any]) -> dict[str, str]:
    """The plots by file name, from what `report.json` holds."""
    faults = whole["faults"]
    marks = [
        Mark(
            "server or database restarted",
            [each["at"] for each in faults if each["kind"] in HEAVY],
            RED,
        ),
        Mark("equality checked", [each["at"] for each in whole["checks"]], LIGHT),
        Mark("other fault", [each["at"] for each in faults if each["kind"] not in HEAVY], small=True),
    ]
    colours = dict(zip(ROLES, (BLUE, GREEN, PURPLE), strict=True))

    def by_life(column: int, scale: float) -> list[Line]:
        return [
            Line(
                "agents" if life["role"] == "agent" else life["role"],
                [(sample[0], sample[column] / scale) for sample in life["samples"]],
                colours[life["role"]],
                faint=life["role"] == "agent",
            )
            for life in whole["lives"]
        ]

    def lag(share: float) -> list[tuple[float, float | None]]:
        found = []
        for tick in whole["ticks"]:
            seconds = quantile([(inf if bound is None else bound, n) for bound, n in tick["lags"]], share)
            found.append((tick["at"], None if seconds is None else seconds * 1000))
        return found

    def count(of: str) -> list[tuple[float, float | None]]:
        return [(tick["at"], tick[of]) for tick in whole["ticks"]]

    drawn = {
        "memory": ("Resident memory", "MB", by_life(1, 1e6)),
        "descriptors": ("Open descriptors", "count", by_life(2, 1.0)),
        "lag": ("From commit to rename", "ms", [Line("95 %", lag(0.95), BLUE), Line("median", lag(0.5), GREEN)]),
        "behind": (
            "Agents", "count",
            [Line("with a live link", count("live"), GREEN), Line("behind the database", count("behind"), PURPLE)],
        ),
    }  # fmt: skip
    return {
        f"{name}.svg": line_chart(*what, marks, end=whole["seconds"], log=name == "lag")
        for name, what in drawn.items()
    }


def _as_json(outcome: Outcome, judged: SoakResult) -> dict[str, object]:
    def life_of(life: ProcessRun) -> dict[str, object]:
        memory, descriptors = growth.trend(life.memory()), growth.trend(life.descriptors())
        return {
            "role": life.role,
            "name": life.name,
            "pid": life.pid,
            "memory_trend": asdict(memory) if memory else None,
            "descriptors_trend": asdict(descriptors) if descriptors else None,
            "samples": [[round(at, 1), rss, count] for at, rss, count in life.samples],
        }

    return {
        "format": 1,
        "passed": judged.exit_code == 0,
        "wrong": list(judged.wrong),
        "interrupted": outcome.interrupted,
        "settings": asdict(outcome.settings),
        "machine": _machine(),
        "seconds": round(outcome.seconds, 1),
        "growth": {
            "warm_up_seconds": growth.WARM_UP,
            "least_seconds": growth.LEAST,
            "memory": {"bounds": asdict(MEMORY), **{role: asdict(each) for role, each in judged.memory.items()}},
            "descriptors": {
                "bounds": asdict(DESCRIPTORS),
                **{role: asdict(each) for role, each in judged.descriptors.items()},
            },
        },
        "lag_seconds": {
            name: quantile(outcome.lag_buckets.items(), share)
            for name, share in (("median", 0.5), ("p95", 0.95), ("p99", 0.99))
        },
        "checks": [asdict(check) for check in outcome.checks],
        "edits": dict(outcome.edits),
        "agents_counted": dict(sorted(outcome.totals.items())),
        "kept": dict(outcome.kept),
        "logs": dict(sorted(outcome.logs.counts.items())),
        "faults": [
            {"at": round(at, 1), "kind": fault.kind, "done": said} for at, fault, said in outcome.faults
        ],
        "ticks": [
            {"at": round(tick.at, 1), "behind": tick.behind, "live": tick.live, "dev_servers": tick.dev_servers,
             "lags": [[bound if bound != float("inf") else None, count] for bound, count in tick.lags]}
            for tick in outcome.ticks
        ],
        "lives": [life_of(life) for life in outcome.lives],
    }  # fmt: skip


def _lines(whole: Mapping[str, object]) -> str:
    """JSON with a line for each member, and for each element of a member that is a list."""

    def member(value: object) -> str:
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(json.dumps(each, ensure_ascii=False) for each in value) + "\n ]"
        return json.dumps(value, ensure_ascii=False)

    return (
        "{\n "
        + ",\n ".join(f"{json.dumps(name)}: {member(value)}" for name, value in whole.items())
        + "\n}\n"
    )


def _rates(judgement: Judgement, scale: float, unit: str) -> str:
    if judgement.median is None or judgement.worst is None:
        return "too short to say"
    return f"{judgement.median / scale:+.1f}{unit}, at most {judgement.worst / scale:+.1f}{unit}"


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {platform.python_version()}"


if __name__ == "__main__":
    print("made again: " + ", ".join(str(path) for path in draw(RESULTS)))
