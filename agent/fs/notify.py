"""Waits for inotify events of watched directories in a thread that ends with the wait."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress

from watchfiles._rust_notify import RustNotify


async def changed(notify: RustNotify, longest_ms: int, step_ms: int, seconds: float) -> set[str] | None:
    """Return the names of one burst; None when there was none for so many seconds.

    Args:
        notify: watches some directories.
        longest_ms: a burst that does not end is taken this often.
        step_ms: quiet time after which it is taken.
        seconds: for which it is waited.

    Raises:
        WatchfilesRustInternalError: a name is not UTF-8, or the watch failed.
    """
    stop = threading.Event()
    waiting = asyncio.ensure_future(
        asyncio.to_thread(notify.watch, longest_ms, step_ms, int(seconds * 1000), stop)
    )
    try:
        raw = await asyncio.shield(waiting)
    finally:
        stop.set()
        with suppress(asyncio.CancelledError):
            await waiting
    return {place for _, place in raw} if isinstance(raw, set) else None
