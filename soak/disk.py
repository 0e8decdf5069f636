"""The disk of the machines: a file system of its own, that can be full or without inodes while all else has room.

A tmpfs whose limits are set to what is in use: every write fails with ENOSPC from then on, and no memory is filled for
it. Needs root; without, the machines are on the disk of everything else, and these faults say that they cannot be.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOMY = "size=3g,nr_inodes=600000"
"""Twenty machines, two of them with Vite's node_modules."""


class MachinesDisk:
    """The file system at `place`. `mounted` says whether there is one."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.mounted = False

    def mount(self) -> None:
        """Make it, where that is allowed."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.mounted = os.geteuid() == 0 and self._call("mount", "-t", "tmpfs", "-o", ROOMY, "tmpfs") is None

    def fill(self) -> str | None:
        """Leave no space. Returns why that cannot be."""
        return self._limit(lambda now: f"size={(now.f_blocks - now.f_bfree) * now.f_frsize}")

    def use_up_inodes(self) -> str | None:
        """Leave no inode. Returns why that cannot be."""
        return self._limit(lambda now: f"nr_inodes={now.f_files - now.f_ffree}")

    def clear(self) -> None:
        """Give both back."""
        if self.mounted:
            self._limit(lambda now: ROOMY)

    def unmount(self) -> None:
        """Remove it with all that is on it."""
        if self.mounted:
            self._call("umount", "-l")
            self.mounted = False

    def _limit(self, options: Callable[[os.statvfs_result], str]) -> str | None:
        if not self.mounted:
            return "the machines have no disk of their own: that needs root"
        return self._call("mount", "-o", f"remount,{options(os.statvfs(self.place))}")

    def _call(self, *command: str) -> str | None:
        done = subprocess.run([*command, str(self.place)], capture_output=True, text=True, check=False)
        return None if done.returncode == 0 else done.stderr.strip()
