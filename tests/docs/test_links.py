"""Every link leads somewhere, and every file, module and test that a document names exists."""

from __future__ import annotations

import re
import subprocess
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
MODULE = re.compile(r"(?:agent|orchestrator_stub)(?:\.\w+)+")
MEMBER = re.compile(r"[a-z_]+(?:\.\w+)+")
"""As docs/architecture.md writes it: `core.reconcile`, `reconcile.step`, `fs.transaction`."""


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


def test_every_page_is_one_step_from_the_readme() -> None:
    readme = ROOT / "README.md"
    linked = {
        (ROOT / target.partition("#")[0]).resolve() for _, target in links(readme) if "://" not in target
    }
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*/README.md")]
    reached = linked | {path / "README.md" for path in linked}
    assert [page.name for page in pages if page not in reached] == []


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
def test_every_module_and_directory_that_is_named_in_short_exists(path: Path) -> None:
    """`local_supabase/`, `zip_reader.py`: the end of a path in the repository."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = "".join(f"/{name}\n" for name in names.splitlines() if (ROOT / name).exists())
    lost = [
        f"{code.place}: {code.text}"
        for code in spans(path)
        if (re.fullmatch(r"[\w/]+\.py", code.text) and f"/{code.text}\n" not in known)
        or (re.fullmatch(r"\w[\w/]*/", code.text) and f"/{code.text}" not in known)
    ]
    assert lost == []


def lost_part(base: Path, parts: list[str]) -> str | None:
    """The first part of a dotted name below `base` that is no package, module or word of the module; None: all are."""
    for place, part in enumerate(parts):
        if (base / part).is_dir():
            base /= part
        elif (base / f"{part}.py").exists():
            text = (base / f"{part}.py").read_text()
            return next((name for name in parts[place + 1 :] if not re.search(rf"\b{name}\b", text)), None)
        else:
            return part
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_that_is_named_exists(path: Path) -> None:
    lost = []
    said = "".join(file.read_text() for file in (ROOT / "agent").rglob("*.py"))
    for code in spans(path):
        if f'"{code.text}"' in said:
            continue  # the name of an event in the log
        for name in MODULE.findall(code.text):
            package, *parts = name.split(".")
            if parts[-1] not in ("log", "lock", "sql", "md") and lost_part(ROOT / package, parts) is not None:
                lost.append(f"{code.place}: {name}")
    assert lost == []


def test_every_member_that_the_architecture_names_exists() -> None:
    """`room.module.name`, `module.name`, of either package."""
    lost = []
    modules = [file for package in ("agent", "orchestrator_stub") for file in (ROOT / package).rglob("*.py")]
    for code in spans(ROOT / "docs" / "architecture.md"):
        if MEMBER.fullmatch(code.text.removesuffix("()")) is None or "/" in code.text:
            continue
        first, *parts = code.text.removesuffix("()").split(".")
        if first in ("agent", "orchestrator_stub") or parts[-1] in ("toml", "md", "sh"):
            continue
        rooms = [
            ROOT / package / first
            for package in ("agent", "orchestrator_stub")
            if (ROOT / package / first).is_dir()
        ]
        named = [file for file in modules if file.stem == first]
        found = any(lost_part(room, parts) is None for room in rooms) or any(
            all(re.search(rf"\b{part}\b", file.read_text()) for part in parts) for file in named
        )
        if not found:
            lost.append(f"{code.place}: {code.text}")
    assert lost == []


@pytest.mark.parametrize("package", ["agent", "orchestrator_stub"])
def test_the_modules_are_all_in_the_architecture(package: str) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.stem for path in (ROOT / package).rglob("*.py") if not path.stem.startswith("__")}
    modules |= {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
    in_one_row = {
        path.stem for path in (ROOT / "orchestrator_stub" / "local_supabase" / "realtime").glob("*.py")
    }
    assert sorted(name for name in modules - in_one_row if not re.search(rf"`{name}/?`", text)) == []


def test_no_room_is_too_large() -> None:
    """A stranger finds the place of a change: nine modules at the top, twelve in a room."""
    assert len(list((ROOT / "agent").glob("*.py"))) <= 9
    for room in (
        path for package in ("agent", "orchestrator_stub") for path in (ROOT / package).rglob("__init__.py")
    ):
        if room.parent.parent != ROOT:
            assert len([file for file in room.parent.glob("*.py") if file.stem != "__init__"]) <= 12, (
                room.parent
            )
