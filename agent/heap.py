"""How much memory glibc keeps that nobody uses. Nothing happens on another libc."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8
_M_MMAP_THRESHOLD: Final = -3
_M_TRIM_THRESHOLD: Final = -1
"""mallopt(3)."""

_MAPPED: Final = 32 << 20
"""Bytes from which a block gets pages of its own: the most that glibc sets by itself (`DEFAULT_MMAP_THRESHOLD_MAX`)."""

_KEPT: Final = 64 << 20
"""Bytes free at the top of the heap from which they go back unasked; twice the above, as glibc has it."""


def settle() -> None:
    """One arena, and what is free is kept for the next event until `trim`.

    One arena instead of one a thread: two short-lived threads would each keep theirs for good. And glibc starts out
    with returning everything above 128 KB at once, so that each event of 100 KB got 46 pages anew: a seventh of its
    way to the disk (572 against 488 µs).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def trim() -> None:
    """Return to the system what is free."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def trim_every(seconds: float) -> None:
    """Return what bursts took, as often as this: 13 µs when that is nothing, 60 µs for each megabyte otherwise."""
    while True:
        await asyncio.sleep(seconds)
        trim()
