"""How much memory glibc keeps that nobody uses. Nothing happens on another libc."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8
"""mallopt(3)."""


def keep_one_arena() -> None:
    """Ask for one arena instead of one a thread: two short-lived threads would each keep theirs for good."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Return to the system what is free."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
