"""Calls the system where `os` offers less: exchanges two names, and writes every byte of a content."""

from __future__ import annotations

import ctypes
import errno
import os
import sys

CREATE_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
READ_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""Not blocking, so that a FIFO in the place of a file does not hold the event loop."""

NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What systems say that cannot exchange two names: some network and FUSE file systems, gVisor, anything but Linux."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAME_EXCHANGE = 2


def exchange(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """Exchange what two names stand for, in one step: renameat2(2) with RENAME_EXCHANGE.

    Raises `OSError`; its number is one of `NO_EXCHANGE` where the system cannot do it.
    """
    sys.audit("os.rename", source, target, src_dir_fd, dst_dir_fd)
    call = getattr(_LIBC, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(src_dir_fd, os.fsencode(source), dst_dir_fd, os.fsencode(target), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def write_all(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    """Write every byte: one write(2) may be cut short when space runs out. Raises `OSError`."""
    written = os.write(descriptor, content)
    if written != len(content):
        rest = memoryview(content)[written:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def path_of(descriptor: int) -> str:
    """Where the kernel sees an open directory now (`/proc/self/fd/N`); "" where it cannot be asked."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""
