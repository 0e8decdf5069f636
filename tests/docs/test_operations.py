"""docs/operations.md explains all that the agent can say: every problem, every state, every exit code.

After a change of a remedy: `python -m tests.docs.test_operations` writes that column again.
"""

from __future__ import annotations

import re
from typing import get_args

from agent.cli.main import EXITS
from agent.core import errors
from agent.core.errors import AgentError
from agent.core.model import REMEDIES, ProblemKind
from agent.devserver.state import Phase
from agent.link.types import LinkState
from agent.telemetry.status import AgentState
from orchestrator_stub.sessions import lifecycle
from tests.docs.reading import ROOT

DOC = ROOT / "docs" / "operations.md"


def rows(heading: str) -> list[list[str]]:
    """The cells of the table rows below `heading`."""
    section = re.split(r"(?m)^## ", DOC.read_text().split(f"## {heading}\n", 1)[1])[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def with_remedies(text: str) -> str:
    for kind, remedy in REMEDIES.items():
        text = re.sub(rf"(?m)^(\| `{kind}` \|[^|]*\|)[^|]*\|", lambda m, r=remedy: f"{m[1]} {r} |", text)
    return text


def test_every_kind_of_problem_says_what_happened_what_to_do_and_where_to_look() -> None:
    table = {named(cells[0])[0]: cells for cells in rows("The agent: problems") if named(cells[0])}
    assert sorted(table) == sorted(get_args(ProblemKind))
    for kind, cells in table.items():
        assert len(cells) == 4, kind
        assert len(cells[1]) > 10, kind
        assert named(cells[3]), kind
    assert with_remedies(DOC.read_text()) == DOC.read_text(), "python -m tests.docs.test_operations"


def test_every_state_is_explained() -> None:
    explained = [name for cells in rows("The agent: states") for name in named(cells[0])]
    assert sorted(explained) == sorted([*AgentState, *LinkState, *Phase])


def test_every_exit_code_is_explained() -> None:
    explained = {int(cells[0]) for cells in rows("The agent: exit codes") if cells[0].isdigit()}
    classes = [
        each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, AgentError)
    ]
    assert {each.exit_code for each in classes} | {0} == explained - {130}
    assert {int(code) for code in re.findall(r"\b(\d{1,2})  ", EXITS)} == explained - {130}


def test_every_state_and_end_of_a_session_is_explained() -> None:
    text = DOC.read_text()
    assert [state for state in lifecycle.State if state not in text] == []
    code = "".join(
        (ROOT / "orchestrator_stub" / name).read_text()
        for name in ("sessions/lifecycle.py", "sessions/controller.py")
    )
    ends = set(re.findall(r'"([a-z]+_[a-z]+): ', code))
    assert len(ends) >= 4
    assert sorted(end for end in ends if end not in text) == []


if __name__ == "__main__":
    DOC.write_text(with_remedies(DOC.read_text()))
