"""The file system that contestants write to: a new one for each, so that none meets what another has left behind.

On a file system in use the same program is up to six times slower from one minute to the next: a disk that is still
writing the last round's files holds up this round's, and ext4 without a journal steps over every inode freed in the
last minutes (`recently_deleted`). Both befall whoever comes next. So a turn, or a contestant, gets an ext4 made for it
with mkfs's defaults, in memory, mounted from a loop device; what is timed is then the programs and the file system's
own work, and no disk hides either.

That takes root. Elsewhere the ground is a directory of the disk, and `note` says so.

Nothing stays mounted, not even after SIGKILL: the mounts are in a mount namespace of this process, and the image has
no name once it is mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/dev/shm")
NEWNS = 0x00020000
"""`CLONE_NEWNS` of sched.h."""

NEW = "on a new ext4 in memory"


class Ground:
    """Where to make new places of up to `size` bytes. Make it before any thread: the namespace is the caller's."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lack = _lack(size)

    @property
    def note(self) -> str:
        """What the places are, for whoever reads the figures."""
        return NEW if self.lack is None else f"on this disk, since {self.lack}"

    @contextlib.contextmanager
    def fresh(self) -> Iterator[Path]:
        """An empty directory on a file system of its own, or on this disk where there can be none."""
        with contextlib.ExitStack() as stack:
            if self.lack is None:
                name = stack.enter_context(_mounted(self.size))
            else:
                name = stack.enter_context(tempfile.TemporaryDirectory(prefix="preview-bench-"))
            place = Path(name, "place")
            place.mkdir()
            os.sync()
            yield place


@contextlib.contextmanager
def _mounted(size: int) -> Iterator[str]:
    """A directory on which a new file system is mounted. Raises `CalledProcessError` where it cannot be."""
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as name:
        try:
            with _image(size) as image:
                command = ["mount", "-o", "loop", str(image), name]
                subprocess.run(command, check=True, capture_output=True, text=True)
            yield name
        finally:  # an interruption may have come before there was anything to unmount
            subprocess.run(["umount", "-l", name], stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def _image(size: int) -> Iterator[Path]:
    """A file that holds a new ext4, all of its tables written, and no name afterwards."""
    descriptor, name = tempfile.mkstemp(prefix="preview-bench-", dir=MEMORY)
    try:
        os.truncate(descriptor, size)
        options = ["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
        subprocess.run(["mkfs.ext4", *options, name], check=True, capture_output=True, text=True)
        yield Path(name)
    finally:
        os.unlink(name)
        os.close(descriptor)


@functools.cache
def _own_namespace() -> str | None:
    """Make mounts ours alone; what stands in the way, if something does."""
    if ctypes.CDLL(None, use_errno=True).unshare(NEWNS):
        return f"this process may not have mounts of its own ({os.strerror(ctypes.get_errno())})"
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, text=True)
    return f"mounts cannot be made private ({done.stderr.strip()})" if done.returncode else None


def _lack(size: int) -> str | None:
    """Why there can be no new file system here; None when one was made, mounted and written to."""
    if os.geteuid() != 0:
        return "only root can mount another"
    for program in ("mkfs.ext4", "mount", "umount"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not MEMORY.is_dir() or shutil.disk_usage(MEMORY).free < size:
        return f"{MEMORY} has no {size / 1e9:.1f} GB free"
    if (reason := _own_namespace()) is not None:
        return reason
    try:
        with _mounted(64 << 20):
            return None
    except subprocess.CalledProcessError as error:
        return f"no image can be mounted here ({error.stderr.strip()})"
