"""Every link leads somewhere, and every file, module and test that a document names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.reading import DOCUMENTS, ROOT, anchors, blocks, links, spans

FOLDERS = (
    "agent",
    "orchestrator_stub",
    "tests",
    "bench",
    "docs",
    "supabase",
    "examples",
    "requirements",
    ".ci",
)
NAMED = re.compile(rf"(?<![\w@/])(?:\.\./)*((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./\-*]+)(?:::(\w+))?")
MODULE = re.compile(r"(agent|orchestrator_stub)\.([a-z_]+)(?:\.(\w+))?(?:\.\w+)?")
MEMBER = re.compile(r"([a-z_]+)\.(\w+)(?:\.(\w+))?")
"""As docs/architecture.md writes it: `plan.step`, `disk.Disk.apply`."""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    lost = []
    for line, target in links(path):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors(there)):
            lost.append(f"{path.name}:{line}: {target}")
    assert lost == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_that_is_named_exists(path: Path) -> None:
    lost = []
    for code in [*spans(path), *blocks(path)]:
        for name, test in NAMED.findall(code.text):
            found = sorted(ROOT.glob(name.rstrip("./") if "*" in name else name.rstrip(".")))
            if not found and not (ROOT / name).exists():
                lost.append(f"{code.place}: {name}")
            elif test and not any(re.search(rf"def {test}\b", file.read_text()) for file in found):
                lost.append(f"{code.place}: {name}::{test}")
    assert lost == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_that_is_named_exists(path: Path) -> None:
    lost = []
    said = "".join(file.read_text() for file in (ROOT / "agent").glob("*.py"))
    for code in spans(path):
        if f'"{code.text}"' in said:
            continue  # the name of an event in the log
        for package, module, name in MODULE.findall(code.text):
            file = ROOT / package / f"{module}.py"
            if not file.exists() and not (ROOT / package / module).is_dir():
                lost.append(f"{code.place}: {package}.{module}")
            elif name and file.exists() and not re.search(rf"\b{name}\b", file.read_text()):
                lost.append(f"{code.place}: {package}.{module}.{name}")
    assert lost == []


def test_every_member_that_the_architecture_names_exists() -> None:
    lost = []
    for code in spans(ROOT / "docs" / "architecture.md"):
        named = MEMBER.fullmatch(code.text.removesuffix("()"))
        file = ROOT / "agent" / f"{named[1]}.py" if named else None
        if named and file and file.exists():
            text = file.read_text()
            lost += [f"{code.place}: {code.text}" for name in named.groups()[1:] if name and name not in text]
    assert lost == []


def test_the_modules_of_the_agent_are_all_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.stem for path in (ROOT / "agent").glob("*.py") if not path.stem.startswith("__")}
    assert sorted(name for name in modules if f"`{name}`" not in text) == []
