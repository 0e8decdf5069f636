"""docs/replay.md's GitHub Actions snippet, run as another project's CI would: in a fresh venv, from the checkout."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.package.checkout import ROOT, copy_checkout


def commands() -> list[str]:
    snippet = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "replay.md").read_text(), re.DOTALL)
    assert snippet is not None
    return [line.split(" #")[0].strip() for line in re.findall(r"- run: (.*)", snippet[1])]


def test_the_snippet_installs_and_replays() -> None:
    install, replay = commands()
    assert install == "pip install ./preview-sync"
    assert replay.startswith("preview-agent replay scenarios/*.jsonl ")


@pytest.mark.nightly
def test_the_snippet_runs_in_a_fresh_venv(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "preview-sync")
    (tmp_path / "scenarios").symlink_to(checkout / "tests" / "scenarios")
    venv.create(tmp_path / "venv", with_pip=True)
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    environ = {
        "PATH": path,
        "HOME": str(tmp_path),
        **{k: v for k, v in os.environ.items() if k[:4] == "PIP_"},
    }
    for command in commands():
        done = subprocess.run(
            ["bash", "-ec", command], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    suite = ET.parse(tmp_path / shlex.split(commands()[1])[-1]).getroot()
    assert suite.get("failures") == suite.get("errors") == "0"
    assert int(suite.get("tests") or 0) == len(list((ROOT / "tests" / "scenarios").glob("*.jsonl")))
    imports = subprocess.run(
        [str(tmp_path / "venv/bin/python"), "-c", "import pytest"], capture_output=True, check=False
    )
    assert imports.returncode != 0, f"{sys.prefix} is not the venv that was tested"
