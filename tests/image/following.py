"""Follows a page of the documentation as a reader does: its shell blocks, in order, in one shell."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.docs.commands import ELSEWHERE, section_of
from tests.docs.reading import blocks

MARK = "@@ step"


@dataclass(frozen=True, slots=True)
class Step:
    """One shell block, and what the page says that one sees then."""

    place: str
    commands: str
    shows: tuple[str, ...]


def steps(path: Path, section: str) -> list[Step]:
    """The shell blocks below `## section`, each with the lines of the text block that follows it."""
    found: list[Step] = []
    for block in (each for each in blocks(path) if section_of(each) == section):
        if block.lang == "sh":
            found.append(Step(block.place, re.sub(rf"(?m)^{ELSEWHERE}\n?", "", block.text + "\n"), ()))
        elif block.lang == "text" and found and found[-1].commands.strip():
            found[-1] = replace(found[-1], shows=tuple(block.text.splitlines()))
    return [step for step in found if step.commands.strip()]


def follow(
    written: Sequence[Step], directory: Path, environ: Mapping[str, str], seconds: float
) -> dict[str, str]:
    """Type it all into one shell; what each step said, by its place. Fails at the first that does not do as it says."""
    script = "".join(f"echo; echo '{MARK} {n}'\n{step.commands}\n" for n, step in enumerate(written))
    # What is left in the background is the reader's to end, and here ours.
    whole = f"set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}"
    try:
        done = subprocess.run(
            ["bash", "-c", whole], cwd=directory, env=dict(environ), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        raise AssertionError(f"not within {seconds:.0f} s; it said:\n{said[-4000:]}") from None
    parts = re.split(rf"(?m)^{MARK} \d+\n", done.stdout)[1:]
    told = {step.place: part for step, part in zip(written, parts, strict=False)}
    assert done.returncode == 0, f"{list(told)[-1]} ended with {done.returncode}:\n{parts[-1][-4000:]}"
    for step in written:
        for line in step.shows:
            assert line in told[step.place], f"{step.place}: {line!r} is not in\n{told[step.place][-4000:]}"
    return told
