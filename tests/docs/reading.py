"""Reading our own Markdown: code, links, anchors. As much of the language as we write, no more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

DOCUMENTS = sorted(
    {
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / name / "README.md" for name in ("supabase", "tests/scenarios")),
        *(ROOT / "docs").rglob("*.md"),
    }
)
"""What a person reads."""

FENCE = re.compile(r"^( *)```(\w*)\s*$")


@dataclass(frozen=True, slots=True)
class Code:
    """A block (`lang`: what stands behind the fence) or a span (`lang` None) of code."""

    path: Path
    line: int
    lang: str | None
    text: str

    @property
    def place(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> Iterator[Code]:
    """The fenced blocks, with the fence's own indentation taken away."""
    opened: tuple[int, str, str, list[str]] | None = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened = (number, fence[1], fence[2], [])
        elif fence and not fence[2]:
            at, _, lang, lines = opened
            yield Code(path, at, lang, "\n".join(lines))
            opened = None
        else:
            opened[3].append(line.removeprefix(opened[1]))
    assert opened is None, f"{path}: a fence is never closed"


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The lines outside of fenced blocks, numbered."""
    inside = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def spans(path: Path) -> Iterator[Code]:
    """Inline code, one line at a time; a bar in a table is written with a backslash."""
    for number, line in prose(path):
        for text in re.findall(r"`([^`]+)`", line):
            yield Code(path, number, None, text.replace("\\|", "|"))


def links(path: Path) -> Iterator[tuple[int, str]]:
    """The targets of `[…](target)`."""
    for number, line in prose(path):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            yield number, target


def anchors(path: Path) -> set[str]:
    """The headings, as GitHub names them in links."""
    found = set()
    for _, line in prose(path):
        if heading := re.match(r"#+ (.*)", line):
            text = re.sub(r"[^\w\- ]", "", heading[1].strip().lower())
            found.add(text.replace(" ", "-"))
    return found
