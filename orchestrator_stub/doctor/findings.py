"""What an examination found, and how it is printed: on one screen, or as JSON lines."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Final

SECONDS: Final = 20.0
"""For all of one part: above two timeouts of a peer that never answers, and below a person's patience."""


class Mark(StrEnum):
    """How it is: `ok`; `warn`, it works and will hurt; `bad`, previews will not work; `skip`, it could not be asked."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked into. `what` is a sentence; `remedy` says what to do, and is empty when nothing is."""

    part: str
    mark: Mark
    what: str
    remedy: str = ""


class Report:
    """The findings of one part, in the order in which they were made."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.findings: list[Finding] = []

    def ok(self, what: str) -> None:
        self.findings.append(Finding(self.part, Mark.OK, what))

    def warn(self, what: str, remedy: str) -> None:
        self.findings.append(Finding(self.part, Mark.WARN, what, remedy))

    def bad(self, what: str, remedy: str) -> None:
        self.findings.append(Finding(self.part, Mark.BAD, what, remedy))

    def skip(self, what: str, remedy: str = "") -> None:
        self.findings.append(Finding(self.part, Mark.SKIP, what, remedy))


Examination = Callable[[Report], Awaitable[None]]


async def examine(parts: Sequence[tuple[str, Examination]]) -> list[Finding]:
    """Run all examinations beside each other and give their findings in the order of `parts`.

    One that raises, or takes longer than `SECONDS`, is a finding of its own beside what it found before.
    """
    reports = [Report(part) for part, _ in parts]

    async def run(report: Report, examination: Examination) -> None:
        try:
            async with asyncio.timeout(SECONDS):
                await examination(report)
        except TimeoutError:
            report.bad(
                f"no answer within {SECONDS:g} s", "see whether a firewall drops what is sent, then try again"
            )
        except Exception as error:
            report.bad(
                f"the examination itself failed: {type(error).__name__}",
                "report this with the version in use",
            )

    async with asyncio.TaskGroup() as tasks:
        for report, (part, examination) in zip(reports, parts, strict=True):
            tasks.create_task(run(report, examination), name=f"doctor {part}")
    return [finding for report in reports for finding in report.findings]


def lines(findings: Iterable[Finding], *, as_json: bool) -> list[str]:
    """The findings as they are printed, each with its remedy below it, and a last line that sums them up."""
    findings = list(findings)
    if as_json:
        return [json.dumps(asdict(finding)) for finding in findings]
    printed, part = [], ""
    for finding in findings:
        if finding.part != part:
            part = finding.part
            printed.append(part)
        printed.append(f"  {finding.mark:<5} {finding.what}")
        if finding.remedy:
            printed.append(f"        -> {finding.remedy}")
    counts = {mark: sum(finding.mark is mark for finding in findings) for mark in Mark}
    if counts[Mark.BAD]:
        last = f"{counts[Mark.BAD]} to put right before previews work"
    else:
        last = "previews can work from here"
    rest = [f"{counts[mark]} {word}" for mark, word in ((Mark.WARN, "to look at"), (Mark.SKIP, "not asked"))]
    return [*printed, "", ", ".join([last, *(text for text in rest if not text.startswith("0 "))])]


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing is `bad`."""
    return all(finding.mark is not Mark.BAD for finding in findings)
