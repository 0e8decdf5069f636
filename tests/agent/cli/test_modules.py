"""`preview-agent modules`: the key that every machine of one kind makes, and a layer that projects can share."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from agent.cli.main import command
from agent.modules import archive
from tests.agent.devserver.installs import needs_npm, with_dependency, write

pytestmark = needs_npm


def locked(root: Path) -> Path:
    """A project whose lock file names no package: it can be installed without a network."""
    write(root)
    content = {
        "name": "p",
        "version": "1.0.0",
        "lockfileVersion": 3,
        "packages": {"": {"name": "p", "version": "1.0.0"}},
    }
    (root / "package-lock.json").write_text(json.dumps(content))
    return root


def test_the_key_follows_from_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = []
    for name in ("one", "two"):
        assert command(["modules", "key", str(locked(tmp_path / name))]) == 0
        keys.append(capsys.readouterr().out)
    assert keys[0] == keys[1]
    assert len(keys[0].strip()) == 40


def test_a_layer_to_share_is_packed_from_the_lock_file_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, layer = locked(tmp_path / "project"), tmp_path / "layer"
    (root / "node_modules").mkdir()
    (root / "node_modules/evil.js").write_text("what the project itself put there")
    assert command(["modules", "pack", str(root), str(layer)]) == 0
    said = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert command(["modules", "key", str(root)]) == 0
    assert said["key"] == capfd.readouterr().out.strip()
    assert said["bytes"] == layer.stat().st_size
    (tmp_path / "out").mkdir()
    archive.unpack(io.BytesIO(layer.read_bytes()), str(tmp_path / "out"))
    assert not (tmp_path / "out/node_modules/evil.js").exists()
    assert (root / "node_modules/evil.js").exists(), "and the project is as it was"


@pytest.mark.parametrize("what", ["no lock file", "a directory", "nothing to install", "it is there"])
def test_what_cannot_be_packed_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    root, layer = tmp_path / "project", tmp_path / "layer"
    match what:
        case "no lock file":
            write(root, dependencies={"a": "1"})
        case "a directory":
            with_dependency(root)
        case "nothing to install":
            write(root)
        case _:
            locked(root)
            layer.touch()
    assert command(["modules", "pack", str(root), str(layer)]) != 0
    assert capsys.readouterr().err.startswith("preview-agent: ")
    assert os.path.exists(layer) is (what == "it is there")
