"""What a hostile project does to the files in an agent's tree, for a while. Its obstacles are gone at the end.

`tests/hostile` does much more, as the project's own programs; here it happens to one of twenty agents under all the
other faults.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


class Hostile:
    """Acts on the files below `tree`/src/features. `touched`: the paths that are not what they were."""

    def __init__(self, tree: Path, dice: random.Random) -> None:
        self._tree = tree
        self._dice = dice
        self.touched: set[str] = set()

    def act(self, seconds: float) -> int:
        """Act for so long; returns how often."""
        until, done = time.monotonic() + seconds, 0
        files = sorted(path for path in (self._tree / "src" / "features").rglob("*.js") if path.is_file())
        while files and time.monotonic() < until:
            path = self._dice.choice(files)
            self.touched.add(str(path.relative_to(self._tree)))
            act: Callable[[Path], None] = self._dice.choice(
                (
                    self.huge,
                    self.far_time,
                    self.changed,
                    self.nested,
                    self.linked,
                    self.closed,
                    self.odd_names,
                    self.flood,
                )
            )
            with suppress(OSError):
                act(path)
                done += 1
            time.sleep(self._dice.uniform(0, 0.1))
        for name in self.touched:
            path = self._tree / name
            if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
                subprocess.run(["rm", "-rf", path], check=False)
        return done

    def huge(self, path: Path) -> None:
        os.truncate(path, 2**40)

    def far_time(self, path: Path) -> None:
        os.utime(path, (2**33 + 2**31, 2**33 + 2**31))

    def changed(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.write(descriptor, b"theirs\n" * self._dice.randrange(1, 1_000))
        os.close(descriptor)

    def closed(self, path: Path) -> None:
        path.chmod(0)

    def nested(self, path: Path) -> None:
        """Empty directories in its place; the deepest path is shorter than the kernel's longest."""
        path.unlink()
        (path / "/".join("d" * self._dice.choice((3, 300)))).mkdir(parents=True)

    def linked(self, path: Path) -> None:
        path.unlink()
        path.symlink_to(self._dice.choice(("/etc/passwd", "..", "nowhere")))

    def odd_names(self, path: Path) -> None:
        name = os.fsencode(path.parent) + b"/\xff\xfe"
        os.mkdir(name)
        os.rmdir(name)

    def flood(self, path: Path) -> None:
        until, number = time.monotonic() + 0.3, 0
        while time.monotonic() < until:
            name = self._tree / f"flood-{number}"
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
            os.unlink(name)
            number += 1
