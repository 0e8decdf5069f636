"""Files that are large, or say so: how long the event loop is kept by comparing and replacing them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from immutables import Map

from agent.core.model import Cursor, Entry, RelPath, Tree, digest_of
from agent.fs.turns import in_turns
from tests.agent.disks import Agent, write
from tests.agent.loops import STALL, longest_turn

LARGE = 256 << 20
"""Bytes of a hole: half a second and more to hash."""


def ours(agent: Agent, root: Path, sizes: dict[str, int]) -> Tree:
    """Files that the agent put there, of these sizes by now, and touched since."""
    entries = {}
    for name, size in sizes.items():
        agent.put({name: "x"})
        os.truncate(root / name, size)
        entries[RelPath(name)] = Entry(1, digest_of(b"something else"), size)
    agent.tree.update(entries)
    return Tree(Cursor("e", 1), Map(entries))


def test_a_start_reads_them_in_turns(agent: Agent, root: Path) -> None:
    tree = ours(agent, root, {"a": LARGE, "b": LARGE})

    async def audit() -> None:
        found = await in_turns(agent.disk.audit_steps(tree, agent.known))
        assert {drift.path for drift in found.drifts} == {"a", "b"}

    assert longest_turn(audit) < STALL


@pytest.mark.parametrize("size", [1 << 40, LARGE, 63 << 20], ids=["1 TB", "256 MB", "63 MB"])
def test_a_save_of_one_reads_what_its_bound_allows(agent: Agent, root: Path, size: int) -> None:
    ours(agent, root, {"a": size})

    async def save() -> None:
        result = agent.apply(write("a", "ours again", version=2), write("b", "1"))
        assert len(result.done) == 2

    assert longest_turn(save) < STALL
    assert (root / "a").read_text() == "ours again"
