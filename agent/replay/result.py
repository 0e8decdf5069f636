"""Says how replays ended: for a person, as JSON, and as the JUnit XML of CI services. Pure.

Control characters of files and events are written out: what is shown goes to terminals and into XML.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import orjson

from agent.core.model import RelPath, digest_of
from agent.replay.faults import FaultPlan

MOST_LINES = 60
"""Lines of differences printed; a tree that is all wrong needs no thousand."""
MOST_OF_A_FILE = 14
"""Lines of one file's diff."""
DIFFED = 200_000
"""Bytes of a file up to which it is compared line by line."""

_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(slots=True)
class Result:
    """How a replay ended. `differences`: lines of a diff, empty when it ended as it should.

    `dev_server`: its state at the end, when there was one. `shown`: kinds of problems that were open at some time, and
    reasons of catch-ups. `unreadable`: why the scenario could not be run at all.
    """

    name: str
    seconds: float = 0.0
    delivered: int = 0
    committed: int = 0
    faults: int = 0
    catch_ups: int = 0
    tree_hash: str = ""
    expected_hash: str = ""
    dev_server: str | None = None
    shown: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    unreadable: str | None = None

    @property
    def ok(self) -> bool:
        return not self.differences and self.unreadable is None

    def line(self) -> str:
        """Return one line for a person."""
        if self.unreadable is not None:
            return f"UNREADABLE  {printable(self.unreadable)}"
        what = (
            f"{self.committed} commits, {self.delivered} delivered, {self.faults} faults, "
            f"{self.catch_ups} catch-ups"
        ) + (f", dev server {self.dev_server}" if self.dev_server else "")
        return f"{'ok' if self.ok else 'NOT EQUAL'}  {self.name}: {what}, {self.seconds:.2f} s"

    def lines(self) -> Iterator[str]:
        """Yield that line, then what differs, as much as a person reads."""
        yield self.line()
        for line in self.differences[:MOST_LINES]:
            yield f"    {line}"
        if len(self.differences) > MOST_LINES:
            yield f"    … and {len(self.differences) - MOST_LINES} more lines"


def printable(text: str) -> str:
    """Return `text` with what neither terminals nor XML should get written out."""
    return _UNPRINTABLE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def compare(here: Mapping[RelPath, bytes], wanted: Mapping[RelPath, bytes]) -> list[str]:
    """Return what differs as lines of a diff: `-` is wanted, `+` is what is there."""
    lines: list[str] = []
    for path in sorted(here.keys() | wanted.keys()):
        is_there, should_be = here.get(path), wanted.get(path)
        if is_there == should_be:
            continue
        if is_there is None:
            lines.append(f"- {path}: missing")
        elif should_be is None:
            lines.append(f"+ {path}: should not be there ({len(is_there)} bytes)")
        else:
            lines.append(f"! {path}: {_sizes(is_there, should_be)}")
            lines += _diff(is_there, should_be)
    return [printable(line) for line in lines]


def _sizes(here: bytes, wanted: bytes) -> str:
    return f"{len(here)} bytes ({digest_of(here)[:8]}…) instead of {len(wanted)} ({digest_of(wanted)[:8]}…)"


def _diff(here: bytes, wanted: bytes) -> Iterator[str]:
    """A unified diff of two texts; of anything else, where they part."""
    if max(len(here), len(wanted)) <= DIFFED:
        try:
            old, new = wanted.decode().splitlines(), here.decode().splitlines()
        except UnicodeDecodeError:
            pass
        else:
            diff = list(difflib.unified_diff(old, new, n=1, lineterm=""))[2:]
            yield from (f"    {line[:200]}" for line in diff[:MOST_OF_A_FILE])
            if len(diff) > MOST_OF_A_FILE:
                yield f"    … and {len(diff) - MOST_OF_A_FILE} more lines"
            if not diff:
                yield "    only the ends of lines differ"
            return
    at = next((n for n, (a, b) in enumerate(zip(here, wanted, strict=False)) if a != b), None)
    yield f"    they part at byte {min(len(here), len(wanted)) if at is None else at}"


def as_json(results: Sequence[Result], plan: FaultPlan) -> bytes:
    """Return the report for programs."""
    body = {"faults": asdict(plan), "results": [{**asdict(r), "ok": r.ok} for r in results]}
    return orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def as_junit(results: Sequence[Result], plan: FaultPlan) -> str:
    """Return the report in the form that CI services read."""
    suite = Element("testsuite", name="preview-agent replay", tests=str(len(results)))
    suite.set("failures", str(sum(1 for result in results if result.differences)))
    suite.set("errors", str(sum(1 for result in results if result.unreadable is not None)))
    suite.set("time", f"{sum(result.seconds for result in results):.3f}")
    properties = SubElement(suite, "properties")
    for name, value in asdict(plan).items():
        SubElement(properties, "property", name=name, value=str(value))
    for result in results:
        case = SubElement(
            suite, "testcase", classname="scenario", name=printable(result.name), time=f"{result.seconds:.3f}"
        )
        if result.unreadable is not None:
            SubElement(case, "error", message=printable(result.unreadable))
        elif result.differences:
            failure = SubElement(case, "failure", message=result.differences[0])
            failure.text = "\n".join(result.differences)
        SubElement(case, "system-out").text = result.line()
    indent(suite)
    return tostring(suite, encoding="unicode", xml_declaration=True)
