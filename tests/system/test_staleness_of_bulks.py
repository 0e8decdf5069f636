"""What Vite serves after a bulk is the bulk, each file of it, however many there are and however often.

A bulk keeps what it replaces until the whole has landed. How it does that can be seen by a watcher: kept by a second
link, 9 of 2,100 files went on being served as they were before.
"""

from __future__ import annotations

from functools import partial

import pytest

from tests.system.stack import Stack, until

pytestmark = [pytest.mark.system, pytest.mark.nightly]

FILES = 10
BULKS = 100


def test_of_every_bulk_every_file_is_served(stack: Stack) -> None:
    paths = [f"src/bulk/{n}.ts" for n in range(FILES)]
    stale: list[tuple[int, str]] = []
    for bulk in range(BULKS):
        text = f"bulk {bulk} is served"
        content = f"export const mark = '{text}'\n"
        changes = [{"action": "update", "file_path": path, "content": content} for path in paths]
        stack.rpc("apply_project_files", changes=changes)
        for path in paths:
            try:
                until("the bulk is served", partial(stack.serves, path, text))
            except AssertionError:
                stale.append((bulk, path))
    assert stale == []
