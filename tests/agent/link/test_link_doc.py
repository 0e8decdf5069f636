"""docs/link.md says what the code does: the transition table is the code's, and the tests it names exist.

After a change of the table: `python -m tests.agent.link.test_link_doc` writes it again.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

from agent.link.types import TRANSITIONS, Cause, LinkState
from tests.agent.link.test_link_faults import FAULTS

ROOT = Path(__file__).parents[3]
DOC = ROOT / "docs" / "link.md"
BEGIN = "<!-- transitions: made by tests/agent/link/test_link_doc.py from agent.link.types.TRANSITIONS -->\n"
END = "<!-- end of transitions -->"


def causes() -> dict[Cause, str]:
    """Each cause with its docstring, which Python does not keep."""
    tree = ast.parse((ROOT / "agent" / "link" / "types.py").read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Cause").body
    found: dict[Cause, str] = {}
    for assignment, doc in zip(body[1::2], body[2::2], strict=True):
        assert isinstance(assignment, ast.Assign)
        assert isinstance(assignment.targets[0], ast.Name)
        assert isinstance(doc, ast.Expr)
        assert isinstance(doc.value, ast.Constant)
        found[Cause[assignment.targets[0].id]] = " ".join(str(doc.value.value).split())
    return found


def table() -> str:
    """The transition table: one row for each state, one column for each cause."""
    lines = ["| state \\ cause | " + " | ".join(Cause) + " |", "|---|" + "---|" * len(Cause)]
    for state in LinkState:
        cells = (TRANSITIONS.get((state, cause)) for cause in Cause)
        lines.append(f"| **{state}** | " + " | ".join(str(cell) if cell else "·" for cell in cells) + " |")
    lines.append("")
    lines += [f"- **{cause}**: {text}" for cause, text in causes().items()]
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


def test_the_table_in_the_docs_is_the_codes() -> None:
    assert with_table(DOC.read_text()) == DOC.read_text(), "python -m tests.agent.link.test_link_doc"


def test_every_test_the_docs_name_exists() -> None:
    golden = json.loads((Path(__file__).parent / "golden_frames.json").read_text())["exchanges"]
    known = {f"test_comes_back_from[{fault.__name__}]" for fault in FAULTS}
    known |= {f"test_golden_exchange[{name}]" for name in golden}
    for file in (ROOT / "tests" / "agent").rglob("test_*.py"):
        known |= set(re.findall(r"^(?:async def |def |)([Tt]est_?\w+)(?=\(| = )", file.read_text(), re.M))
    named = re.findall(r"`((?:test_|Test)[^`]*?)` \|$", DOC.read_text(), re.M)
    assert len(named) > 20
    assert [name for name in named if name not in known] == []


if __name__ == "__main__":
    DOC.write_text(with_table(DOC.read_text()))
