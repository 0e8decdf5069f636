"""What `dev` takes for a project."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator_stub.devstack.terminal import CannotStart, DevOptions


@pytest.mark.parametrize(
    "file",
    ["package.json", "index.html", "frontend/package.json", "apps/web/package.json", "site/index.html"],
)
def test_a_directory_with_anything_that_may_be_previewed(tmp_path: Path, file: str) -> None:
    (tmp_path / "app" / file).parent.mkdir(parents=True)
    (tmp_path / "app" / file).write_text("{}")
    DevOptions(tmp_path / "app", tmp_path / "state").check()


@pytest.mark.parametrize("file", ["README.md", "a/b/c/package.json"])
def test_one_without_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / "app" / file).parent.mkdir(parents=True)
    (tmp_path / "app" / file).write_text("{}")
    with pytest.raises(CannotStart, match=r"has no package\.json and no index\.html"):
        DevOptions(tmp_path / "app", tmp_path / "state").check()
