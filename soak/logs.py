"""What the processes said: bugs are failures, whatever else went wrong on the way is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BUGS = frozenset({"agent.bug", "agent.task_ended", "agent.cut_off", "request.failed"})
"""Events that are never said when all is as it should be, whatever faults there are."""

WORDS = ("Traceback (most recent call last)", "was never retrieved", "was never awaited")
"""Of a line that is no event: Python's own complaint."""

MOST = 10
"""Lines quoted of each kind."""


@dataclass
class Findings:
    """`counts` by program and event; `wrong` are sentences."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def read_logs(state: Path) -> Findings:
    """All of STATE's logs."""
    found = Findings()
    for log in sorted(state.glob("*.log")):
        program = log.stem.partition("-")[0]
        if program == "postgres":
            continue
        for line, said in _lines(log):
            event = said.get("event", "")
            if said.get("source") == "dev":
                continue
            bug = event in BUGS or (not said and any(word in line for word in WORDS))
            if bug and sum(each.startswith(log.stem) for each in found.wrong) < MOST:
                found.wrong.append(f"{log.stem} said: {line[:600]}")
            if said.get("level") in ("warning", "error"):
                found.counts[f"{program}: {event}"] += 1
            elif event == "agent.stopped":
                found.counts[f"{program}: stopped with exit {said.get('exit')}"] += 1
    return found


def _lines(log: Path) -> Iterator[tuple[str, dict[str, str]]]:
    with log.open(errors="replace") as file:
        for line in file:
            try:
                said = json.loads(line)
            except ValueError:
                said = {}
            yield line.strip(), said if isinstance(said, dict) else {}
