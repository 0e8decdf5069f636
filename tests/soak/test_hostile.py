"""The hostile project of a soak: it names every path that it touched, and leaves no obstacle."""

from __future__ import annotations

import random
from pathlib import Path

from soak.hostile import Hostile


def test_what_it_did_is_named_and_what_stands_in_the_way_is_gone(tmp_path: Path) -> None:
    files = [tmp_path / "src" / "features" / f"f{number}.js" for number in range(20)]
    files[0].parent.mkdir(parents=True)
    before = {}
    for path in files:
        path.write_text("ours\n")
        before[path] = path.stat()
    hostile = Hostile(tmp_path, random.Random(3))
    assert hostile.act(3.0) > 5
    for path in files:
        if str(path.relative_to(tmp_path)) not in hostile.touched:
            assert path.stat() == before[path]
        assert not path.is_dir()
        assert not path.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
