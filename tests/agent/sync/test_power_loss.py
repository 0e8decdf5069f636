"""A loss of power on a real ext4: files that were whole can be empty, and the ledger's claim is not taken for true.

The disk is an image behind a loop device. What has reached the image at a moment is what a machine would find after
losing power then; a copy of it, mounted, replays its journal as that machine would.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core.model import Cursor, digest_of
from agent.fs.turns import at_once
from agent.sync.ledger import Ledger
from tests.agent.disks import opened, write

FILES = [f"src/file{n}.ts" for n in range(20)]


@pytest.mark.parametrize("ledger_is_durable", [True, False])
def test_after_a_loss_of_power_what_is_in_doubt_is_known(
    tmp_path: Path, mount: Callable[..., Path], ledger_is_durable: bool
) -> None:
    image = tmp_path / "disk.img"
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed (Debian: e2fsprogs)")
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    # The journal is committed when the test says so, not when five seconds are over.
    disk = mount("loop", "commit=600", kind="ext4", source=str(image))
    ledger = Ledger(disk / "state/ledger.db")
    ledger.load()
    with opened(disk / "project", disk / "staging") as agent:
        for revision, text in ((1, "old"), (2, "new and longer")):
            for path in FILES:
                done = agent.apply(write(path, f"{path} {text}", version=revision))
                ledger.record(done.done, Cursor("e", revision), made=done.made, gone=done.gone)
            if revision == 1:
                os.sync()
    if ledger_is_durable:
        ledger.close()
    with (disk / "other").open("w") as other:
        os.fsync(other.fileno())
    lost = tmp_path / "lost.img"
    shutil.copyfile(image, lost)
    if not ledger_is_durable:
        ledger.close()

    found = mount("loop", kind="ext4", source=str(lost))
    ledger = Ledger(found / "state/ledger.db")
    state = ledger.load()
    ledger.close()
    assert state is not None
    assert state.tree.cursor.revision == (2 if ledger_is_durable else 1)
    contents = {path: (found / "project" / path).read_bytes() for path in FILES}
    assert b"" in contents.values(), "nothing was lost: this run proved nothing"
    with opened(found / "project", found / "staging") as agent:
        audit = at_once(agent.disk.audit_steps(state.tree, state.stats))
    claimed = state.tree.files()
    assert set(claimed) == set(FILES) == audit.stats.keys() | {drift.path for drift in audit.drifts}
    for path in audit.stats:
        assert digest_of(contents[path]) == claimed[path].digest
