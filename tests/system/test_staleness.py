"""What Vite serves in the end is the last edit: pairs of edits as close together as people and machines make them.

Vite serves the older of two writes within 50 ms of each other, for ever: 8 of 8 at 15 ms for a file just rewritten.
So the file on disk proves nothing; what is asked is what Vite serves.
"""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.profiles import NIGHTLY
from tests.system.stack import Stack, until

pytestmark = pytest.mark.system

PAIRS = 1_000 if NIGHTLY else 40
EDITORS = 4


def edit_in_pairs(stack: Stack, editor: int, pairs: int) -> list[str]:
    """Make `pairs` double edits on files of this editor's own; the ones of which Vite kept serving the first."""
    dice = random.Random(editor)
    stale = []
    for n in range(pairs):
        path = f"src/stale/{editor}-{n % 5}.ts"
        first, last = (f"export const mark = 'e{editor} n{n} {which}'\n" for which in ("first", "last"))
        stack.save(path, first)
        # Asked for at once, so that Vite has transformed the first and has something old to keep.
        stack.fetch(path)
        # The distance between the two edits is what is varied; nothing is waited for.
        time.sleep(dice.uniform(0.005, 0.060))
        stack.save(path, last)
        try:
            until("the last edit is served", lambda p=path, t=f"e{editor} n{n} last": stack.serves(p, t))
        except AssertionError:
            stale.append(path)
    return stale


def test_of_two_quick_edits_the_last_is_what_vite_serves(stack: Stack) -> None:
    with ThreadPoolExecutor(EDITORS) as pool:
        found = list(pool.map(lambda e: edit_in_pairs(stack, e, PAIRS // EDITORS), range(EDITORS)))
    assert found == [[] for _ in range(EDITORS)]
