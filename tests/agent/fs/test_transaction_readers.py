"""What other processes see while the agent writes, and what a kill leaves: whole files, always."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from random import Random

import pytest

from agent.core.model import Tree, digest_of
from agent.fs.turns import at_once
from agent.sync.ledger import Ledger, LedgerState
from tests.agent.disks import Agent, opened, write
from tests.profiles import NIGHTLY

# --- readers

READER = textwrap.dedent(
    """
    import hashlib, os, sys
    path, stop = sys.argv[1:]
    reads = torn = missing = 0
    os.write(1, b"go\\n")
    while not os.path.exists(stop):
        for _ in range(50):
            try:
                with open(path, "rb", buffering=0) as file:
                    data = file.read()
            except FileNotFoundError:
                missing += 1
                continue
            reads += 1
            torn += hashlib.sha256(data[64:]).hexdigest().encode() != data[:64]
    print(reads, torn, missing)
    """
)


def test_no_reader_ever_sees_a_torn_or_missing_file(agent: Agent, root: Path, tmp_path: Path) -> None:
    """10,000 rewrites of up to 64 KB (1,000 by day), alone and in transactions, under two readers that never pause."""

    def content(n: int) -> bytes:
        body = bytes([n % 256]) * (n * 7919 % 65536)
        return hashlib.sha256(body).hexdigest().encode() + body

    contents = [content(n) for n in range(64)]
    agent.apply(write("src/a", contents[0]))
    stop = tmp_path / "stop"
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, root / "src/a", stop], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"go\n"
        for n in range(10_000 if NIGHTLY else 1_000):
            operations = [write("src/a", contents[n % 64])]
            if n % 10 == 0:
                operations.append(write("src/b", "another"))
            result = agent.apply(*operations)
            assert not result.problems
    finally:
        stop.touch()
        counts = [reader.communicate()[0].split() for reader in readers]
    for reads, torn, missing in counts:
        assert int(reads) > 200
        assert (int(torn), int(missing)) == (0, 0)


@pytest.mark.usefixtures("keeping")
def test_nothing_happens_to_a_file_before_its_new_content_is_there(agent: Agent, root: Path) -> None:
    """A watcher looks when the first event comes. Were it one of ours (a second link), it would find the old content.

    The kernel's first word on the old file must be that it is no longer at its path, or has lost its last name.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("inotify is Linux's")
    attributes, modified, deleted, moved = 0x4, 0x2, 0x400, 0x800
    agent.put({"a": "old", "b": "old"})
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK)
    try:
        mask = attributes | modified | deleted | moved
        assert libc.inotify_add_watch(watcher, os.fsencode(root / "a"), mask) >= 0
        result = agent.apply(write("a", "new"), write("b", "new"))
        assert len(result.done) == 2
        raw = os.read(watcher, 4096)
    finally:
        os.close(watcher)
    events = [struct.unpack_from("<iIII", raw, at)[1] for at in range(0, len(raw), 16)]
    assert events[0] == moved or events[:2] == [attributes, deleted]


# --- SIGKILL

WRITER = textwrap.dedent(
    """
    import os, random, signal, sys
    from pathlib import Path
    from agent.fs.project_dir import ProjectDir
    from agent.sync.ledger import Ledger, LedgerState
    from agent.core.model import Cursor, Entry, RelPath, Remove, Write, digest_of

    home = Path(sys.argv[1])
    disk, ledger = ProjectDir(home / "project", home / "staging"), Ledger(home / "state/ledger.db")
    state = ledger.load()
    disk.open(state.directories if state else ())
    disk.clear_staging()
    known = dict(state.stats) if state else {}
    entries = state.tree.entries if state else {}
    at = state.tree.cursor.revision if state else 0
    if state:
        disk.discard(state.leftovers)
    chance = random.Random(at)
    steps = int(sys.argv[2])

    def die(event, arguments):
        # Before each call that changes a name: the kill falls between any two of them.
        global steps
        if event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            steps -= 1
            if not steps:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    while True:
        at += 1
        operations = {}
        for _ in range(chance.randrange(1, 6)):
            path = RelPath(chance.choice(["a", "b", "d/a", "d/e/b", "f/g"]) + str(chance.randrange(4)))
            if chance.random() < 0.3:
                operations[path] = Remove(path, Entry(at, None))
            else:
                content = f"{path} at {at}".encode()
                operations[path] = Write(path, Entry(at, digest_of(content), len(content)), content)
        batch = list(operations.values())
        ledger.intend([o.path for o in batch if isinstance(o, Write) and o.path not in known])
        result = disk.apply(batch, known)
        for done in result.done:
            known.pop(done.operation.path, None)
            if done.stat:
                known[done.operation.path] = done.stat
        ledger.record(result.done, Cursor("e", at), made=result.made, gone=result.gone)
    """
)


def test_a_kill_at_any_point_loses_work_but_never_truth(tmp_path: Path) -> None:
    """What a restart finds: every file is whole, and as recorded, or known to be in doubt, or known to be ours."""
    chance = Random(7)
    in_doubt = 0
    for _ in range(200 if NIGHTLY else 10):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(chance.randrange(1, 200))]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL

        ledger = Ledger(tmp_path / "state/ledger.db")
        state = ledger.load()
        ledger.close()
        state = state or LedgerState(Tree(), {})
        with opened(tmp_path / "project", tmp_path / "staging") as agent:
            agent.disk.clear_staging()
            audit = at_once(agent.disk.audit_steps(state.tree, state.stats))
            claimed = state.tree.files()
            doubted = {drift.path for drift in audit.drifts}
            on_disk = agent.disk.scan()
            assert on_disk.keys() <= claimed.keys() | state.intended
            assert claimed.keys() == audit.stats.keys() | doubted
            for path in on_disk:
                content = (tmp_path / "project" / path).read_bytes()
                assert content.startswith(f"{path} at ".encode())
                assert (digest_of(content) == claimed[path].digest) if path in audit.stats else True
            in_doubt += len(doubted) + len(state.intended)
    assert in_doubt > 0, "no kill ever fell between the disk and the ledger: this run proved nothing"
