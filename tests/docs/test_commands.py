"""Every command of the documents has its way of being tried, is read, and is one that our programs take."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest

from agent.cli.main import _parser as agent_parser
from orchestrator_stub.__main__ import _parser as orchestrator_parser
from tests.docs.commands import PROGRAMS, WAYS, ByTest, Make, OnlyRead, all_commands, program_of
from tests.docs.reading import DOCUMENTS, ROOT, blocks

COMMANDS = all_commands()
OURS = [c for c in COMMANDS if program_of(c.text) in ("preview-agent", "preview-orchestrator")]


def test_every_command_meets_exactly_one_way() -> None:
    assert [command.id for command in COMMANDS if len(command.ways) != 1] == []


def test_no_way_is_left_over() -> None:
    texts = [command.text for command in COMMANDS]
    assert [pattern for pattern, _ in WAYS if not any(re.fullmatch(pattern, text) for text in texts)] == []


def test_no_command_hides_outside_of_a_shell_block() -> None:
    hidden = []
    for path in DOCUMENTS:
        for block in blocks(path):
            if block.lang not in ("sh", "yaml", "ts", "python"):
                hidden += [
                    f"{block.place}: {line}"
                    for line in block.text.splitlines()
                    if program_of(line) in PROGRAMS
                ]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.match(r" {4,}\S+ \S", line) and program_of(line) in PROGRAMS and "```" not in line:
                inside = any(
                    b.path == path and b.line < number <= b.line + b.text.count("\n") + 1
                    for b in blocks(path)
                )
                if not inside:
                    hidden.append(f"{path.name}:{number}: {line.strip()}")
    assert hidden == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_shell_blocks_are_shell(path: Path) -> None:
    for block in blocks(path):
        if block.lang == "sh":
            read = subprocess.run(
                ["bash", "-n"], input=block.text, capture_output=True, text=True, check=False
            )
            assert read.returncode == 0, f"{block.place}: {read.stderr}"


def test_our_own_programs_take_the_arguments() -> None:
    refused = []
    for command in OURS:
        words = command.text.replace("*.jsonl", "x.jsonl").split()
        start = next(i for i, word in enumerate(words) if word.endswith(program_of(command.text))) + 1
        parser = agent_parser() if "preview-agent" in command.text else orchestrator_parser()
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                parser.parse_args(words[start:])
            except SystemExit as ended:
                if ended.code != 0:
                    refused.append(f"{command.id}: {said.getvalue()}")
    assert len(OURS) > 10
    assert refused == []


@pytest.mark.parametrize(
    "target", sorted({c.text.split()[1] for c in COMMANDS if c.text.startswith("make ")}), ids=str
)
def test_make_has_the_target(target: str) -> None:
    asked = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip(), target
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"make {target} " in listed.stdout


def test_the_ways_that_name_a_test_name_one_that_exists() -> None:
    for pattern, way in WAYS:
        if isinstance(way, ByTest):
            path, _, name = way.test.partition("::")
            assert re.search(rf"def {name}\b", (ROOT / path).read_text()), (pattern, way.test)
        elif isinstance(way, Make):
            assert way.by
        elif isinstance(way, OnlyRead):
            assert len(way.needs) > 5
