"""Every kind of problem has its remedy, and every kind is one that the code can raise.

That the code raises no other is the type checker's to say (`Problem.kind` is a `ProblemKind`), in `make check`.
"""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

from agent.core.model import REMEDIES, Problem, ProblemKind

AGENT = Path(__file__).parents[3] / "agent"


def test_every_kind_has_one_line_of_what_to_do() -> None:
    assert get_type_hints(Problem)["kind"] == ProblemKind
    assert set(REMEDIES) == set(get_args(ProblemKind))
    for kind, remedy in REMEDIES.items():
        assert "\n" not in remedy, kind
        assert 20 <= len(remedy) <= 110, (kind, len(remedy))
        assert remedy[-1] != ".", kind


def test_no_kind_is_left_over() -> None:
    code = "".join(path.read_text() for path in AGENT.rglob("*.py") if path.name != "problems.py")
    assert [kind for kind in REMEDIES if f'"{kind}"' not in code] == []
