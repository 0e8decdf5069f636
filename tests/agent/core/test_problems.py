"""Every kind of problem has its remedy and its one owner, and every kind is one that the code can raise.

That the code raises no other is the type checker's to say (`Problem.kind` is a `ProblemKind`), in `make check`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from agent.core.model import PROBLEM_OWNERS, REMEDIES, Problem, ProblemKind, ProblemOwner
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems

ROOT = Path(__file__).parents[3]
AGENT = ROOT / "agent"


def test_every_kind_has_one_line_of_what_to_do() -> None:
    assert get_type_hints(Problem)["kind"] == ProblemKind
    assert set(REMEDIES) == set(get_args(ProblemKind))
    for kind, remedy in REMEDIES.items():
        assert "\n" not in remedy, kind
        assert 20 <= len(remedy) <= 110, (kind, len(remedy))
        assert remedy[-1] != ".", kind


def test_no_kind_is_left_over() -> None:
    code = "".join(path.read_text() for path in AGENT.rglob("*.py") if path.name != "model.py")
    assert [kind for kind in REMEDIES if f'"{kind}"' not in code] == []


# --- owners


def owns(owner: ProblemOwner) -> list[ProblemKind]:
    return [kind for kind, each in PROBLEM_OWNERS.items() if each == owner]


@pytest.fixture
def problems() -> Problems:
    return Problems(Metrics())


def test_every_kind_has_one_owner_and_every_owner_is_a_module() -> None:
    assert set(PROBLEM_OWNERS) == set(get_args(ProblemKind))
    assert set(PROBLEM_OWNERS.values()) == set(get_args(ProblemOwner))
    for owner in get_args(ProblemOwner):
        assert (AGENT / owner.replace(".", "/")).with_suffix(".py").is_file(), owner


def test_the_document_names_the_owner_of_each_kind() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    for owner in get_args(ProblemOwner):
        assert f"| `{owner}` | {', '.join(f'`{kind}`' for kind in sorted(owns(owner)))} |" in text, owner


def test_nobody_takes_another_owners_handle() -> None:
    """A handle is taken by the module it is named after; the registry itself is changed through handles alone."""
    for path in AGENT.rglob("*.py"):
        code = path.read_text()
        module = ".".join(path.relative_to(AGENT).with_suffix("").parts)
        assert set(re.findall(r'\.owned_by\("([a-z_.]+)"\)', code)) <= {module}, path
        assert module == "telemetry.status" or not re.search(r"\b_?problems\.remove\(", code), path


def test_an_owner_opens_and_closes_its_own(problems: Problems) -> None:
    workspace = problems.owned_by("sync.workspace")
    workspace.add(Problem("path_unusable", "a twin", "a"))
    workspace.add(Problem("path_unusable", "a twin", "b"))
    workspace.add(Problem("disk_full", "no space"))
    assert len(problems.open) == 3
    workspace.clear("path_unusable", paths=["a", "elsewhere"])
    assert set(problems.open) == {("path_unusable", "b"), ("disk_full", None)}
    workspace.clear(paths=["b"])
    workspace.clear("disk_full")
    assert not problems.open


@pytest.mark.parametrize("owner", get_args(ProblemOwner))
def test_an_owner_can_neither_open_nor_close_anothers(problems: Problems, owner: ProblemOwner) -> None:
    for kind, other in PROBLEM_OWNERS.items():
        problems.owned_by(other).add(Problem(kind, "is wrong", "a"))
    mine = problems.owned_by(owner)
    for kind, other in PROBLEM_OWNERS.items():
        if other != owner:
            with pytest.raises(ValueError, match=other):
                mine.add(Problem(kind, "is wrong", "a"))
            with pytest.raises(ValueError, match=other):
                mine.clear(kind)
    mine.clear(paths=["a"])
    assert {kind for kind, _ in problems.open} == set(PROBLEM_OWNERS) - set(owns(owner))
