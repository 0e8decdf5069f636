"""The ledger: what was recorded is what is loaded, whatever was done to the process or to the file."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from agent.core.errors import RootUnusable, Unavailable
from agent.core.model import Cursor, Entry, RelPath, Remove, Tree, Write, digest_of
from agent.fs.inspect import FileStat
from agent.fs.transaction import Done
from agent.sync.ledger import Ledger, LedgerState
from tests.profiles import examples

ROWS = 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state/ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger(path)
    yield ledger
    ledger.close()


def written(path: str, version: int, content: bytes = b"x", looks: FileStat | None = None) -> Done:
    entry = Entry(version, digest_of(content), len(content))
    return Done(
        Write(RelPath(path), entry, content), looks or FileStat(version, len(content), 10**18, 10**18)
    )


def reload(path: Path) -> LedgerState | None:
    ledger = Ledger(path)
    try:
        return ledger.load()
    finally:
        ledger.close()


names = st.sampled_from([RelPath(p) for p in ("a", "b", "dir/c", "dir/deep/d", "ü.ts", "sp ace")])
stats = st.builds(FileStat, *[st.integers(0, 2**63 - 1)] * 4)
cursors = st.builds(
    Cursor,
    st.none() | st.text(max_size=8),
    st.integers(0, 2**53),
    st.frozensets(st.integers(1, 2**53), max_size=3),
)
digests = st.binary(max_size=4).map(digest_of)
entries = st.builds(
    Entry,
    st.integers(0, 2**53),
    digests,
    st.integers(0, 2**53),
    st.booleans(),
    st.integers(0, 9),
    st.booleans(),
)
tombstones = st.builds(Entry, st.integers(0, 2**53), st.none(), revision=st.integers(0, 9))


@examples(40, 1_000)
@given(
    st.lists(st.tuples(st.dictionaries(names, entries | tombstones), stats, cursors), max_size=6),
    st.booleans(),
)
def test_what_was_recorded_is_loaded(
    tmp_path_factory: pytest.TempPathFactory,
    batches: list[tuple[dict[RelPath, Entry], FileStat, Cursor]],
    whole: bool,
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    ledger = Ledger(path)
    entries: dict[RelPath, Entry] = {}
    looks: dict[RelPath, FileStat] = {}
    cursor = Cursor()
    for changed, stat, cursor in batches:
        done = []
        for at, entry in changed.items():
            entries[at] = entry
            looks.pop(at, None)
            if entry.is_file:
                looks[at] = stat
                done.append(Done(Write(at, entry, b""), stat))
            else:
                done.append(Done(Remove(at, entry), None))
        ledger.record(done, cursor)
        if whole:
            ledger.replace(Tree(cursor, Map(entries)), looks)
    ledger.close()

    state = reload(path)
    shutil.rmtree(path.parent)
    if not batches:
        assert state is None
    else:
        assert state is not None
        assert state.tree == Tree(cursor, Map(entries))
        assert state.stats == looks


def test_no_ledger_is_none_and_the_first_record_makes_one(ledger: Ledger, path: Path) -> None:
    assert ledger.load() is None
    assert not path.exists()
    ledger.record([written("a", 1)], Cursor("e", 1))
    ledger.close()
    state = reload(path)
    assert state is not None
    assert state.tree.cursor == Cursor("e", 1)


def test_directories_come_and_go(ledger: Ledger, path: Path) -> None:
    ledger.record([], Cursor("e", 1), made=[RelPath("a"), RelPath("a/b"), RelPath("c")])
    ledger.record([], Cursor("e", 2), gone=[RelPath("a/b"), RelPath("never")])
    ledger.close()
    state = reload(path)
    assert state is not None
    assert state.directories == {"a", "c"}


def test_intentions_last_until_the_next_record(ledger: Ledger, path: Path) -> None:
    ledger.record([written("a", 1)], Cursor("e", 1))
    ledger.intend([RelPath("new"), RelPath("new"), RelPath("dir/new")])
    ledger.close()

    ledger = Ledger(path)
    state = ledger.load()
    assert state is not None
    assert state.intended == {"new", "dir/new"}
    ledger.record([written("new", 1)], Cursor("e", 2))
    ledger.close()
    state = reload(path)
    assert state is not None
    assert state.intended == frozenset()


def test_leftovers_are_what_was_announced_and_is_no_file_of_the_tree(ledger: Ledger, path: Path) -> None:
    tombstone = Done(Remove(RelPath("deleted"), Entry(2, None)), None)
    ledger.record([written("kept", 1), tombstone], Cursor("e", 1))
    ledger.intend([RelPath("kept"), RelPath("deleted"), RelPath("new")])
    ledger.close()
    state = reload(path)
    assert state is not None
    assert state.leftovers == {"deleted", "new"}


def test_what_was_noted_goes_with_the_next_record(ledger: Ledger, path: Path) -> None:
    ledger.note([written("a", 1)], made=[RelPath("dir")])
    ledger.note([written("a", 2), written("b", 1)], gone=[RelPath("dir")])
    ledger.record([], Cursor("e", 3))
    ledger.close()
    state = reload(path)
    assert state is not None
    assert {p: e.version for p, e in state.tree.entries.items()} == {"a": 2, "b": 1}
    assert state.directories == frozenset()


def test_intentions_before_anything_was_recorded_are_known_too(ledger: Ledger, path: Path) -> None:
    ledger.intend([RelPath("first")])
    ledger.close()
    state = reload(path)
    assert state == LedgerState(Tree(), {}, frozenset(), frozenset({RelPath("first")}))


def test_one_owner_at_a_time(ledger: Ledger, path: Path) -> None:
    ledger.record([], Cursor("e", 1))
    second = Ledger(path)
    with pytest.raises(RootUnusable, match="locked"):
        second.load()
    with pytest.raises(Unavailable, match="locked"):
        second.record([], Cursor("e", 2))
    second.close()
    assert path.exists()


def test_a_state_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RootUnusable, match="cannot open the ledger"):
        Ledger(tmp_path / "file/ledger.db").record([], Cursor())


# --- damage


@pytest.fixture
def sound(path: Path) -> bytes:
    ledger = Ledger(path)
    tree = Tree(Cursor("e", 7), Map({RelPath(f"f{n}"): Entry(n, digest_of(b"x"), 1) for n in range(ROWS)}))
    ledger.replace(tree, {p: FileStat(1, 1, 1, 1) for p in tree.entries})
    ledger.close()
    assert not Path(f"{path}-wal").exists()
    return path.read_bytes()


def test_a_ledger_cut_anywhere_is_whole_or_none(path: Path, sound: bytes) -> None:
    whole = reload(path)
    assert whole is not None
    assert len(whole.tree.entries) == ROWS
    nones = 0
    for length in sorted({0, 1, 15, 16, 100, *range(0, len(sound), 509), len(sound) - 1}):
        path.write_bytes(sound[:length])
        assert reload(path) in (None, whole), f"cut to {length} of {len(sound)} bytes"
        nones += not path.exists()
    assert nones > 20


def test_a_ledger_with_flipped_bytes_never_raises(path: Path, sound: bytes) -> None:
    chance = random.Random(4)
    nones = 0
    for _ in range(60):
        torn = bytearray(sound)
        for _ in range(20):
            torn[chance.randrange(len(torn))] ^= 1 << chance.randrange(8)
        path.write_bytes(torn)
        nones += reload(path) is None
    assert nones > 20


@pytest.mark.parametrize("junk", [b"", b"not a database at all" * 100, bytes(4096)])
def test_junk_is_none_and_can_be_written_over(path: Path, junk: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(junk)
    ledger = Ledger(path)
    assert ledger.load() is None
    ledger.record([written("a", 1)], Cursor("e", 1))
    ledger.close()
    state = reload(path)
    assert state is not None
    assert set(state.tree.entries) == {"a"}


def test_a_format_of_the_future_is_not_believed(path: Path, sound: bytes) -> None:
    with sqlite3.connect(path) as sql:
        sql.execute("pragma user_version = 99")
    sql.close()
    assert reload(path) is None


def test_a_path_that_is_never_written_is_not_believed(path: Path, sound: bytes) -> None:
    with sqlite3.connect(path) as sql:
        sql.execute("update files set path = '../../etc/passwd' where path = 'f1'")
    sql.close()
    assert reload(path) is None


# --- a full disk


def test_what_could_not_be_recorded_goes_with_the_next_record(ledger: Ledger, path: Path) -> None:
    """The file size limit is the kernel's own refusal to write more; lifted, the disk has space again."""
    ledger.record([written("a", 1)], Cursor("e", 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = Path(f"{path}-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (big, hard))
    try:
        with pytest.raises(Unavailable, match="cannot record"):
            ledger.record([written("b", 1)], Cursor("e", 2), made=[RelPath("dir")])
        with pytest.raises(Unavailable, match="cannot note intentions"):
            ledger.intend([RelPath("c")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    ledger.record([written("c", 1)], Cursor("e", 3))
    ledger.close()

    state = reload(path)
    assert state is not None
    assert set(state.tree.entries) == {"a", "b", "c"}
    assert state.directories == {"dir"}
    assert state.tree.cursor == Cursor("e", 3)


# --- SIGKILL

RECORDER = textwrap.dedent(
    """
    import os, sys
    from pathlib import Path
    from agent.fs.inspect import FileStat
    from agent.fs.transaction import Done
    from agent.sync.ledger import Ledger
    from agent.core.model import Cursor, Entry, RelPath, Write, digest_of

    ledger = Ledger(Path(sys.argv[1]))
    state = ledger.load()
    at = state.tree.cursor.revision if state else 0
    while True:
        at += 1
        entry = Entry(at, digest_of(b"%d" % at), at)
        stat = FileStat(at, at, at, at)
        paths = [RelPath(p) for p in ("a", "b", f"c{at % 50}")]
        ledger.intend(paths[2:])
        ledger.record([Done(Write(p, entry, b""), stat) for p in paths], Cursor("e", at))
        os.write(1, b"%d\\n" % at)
    """
)


def recording_child(path: Path) -> subprocess.Popen[bytes]:
    child = subprocess.Popen([sys.executable, "-c", RECORDER, path], stdout=subprocess.PIPE, cwd=os.getcwd())
    assert child.stdout is not None
    return child


def last_said(child: subprocess.Popen[bytes], said: bytes) -> int:
    """The newest revision whose record returned before the kill: what the child wrote, whole lines only."""
    assert child.stdout is not None
    lines = (said + child.stdout.read()).rpartition(b"\n")[0].splitlines()
    return int(lines[-1])


def assert_true_up_to(path: Path, at_least: int) -> int:
    """Nothing recorded is lost, and no batch is there in part."""
    state = reload(path)
    assert state is not None
    revision = state.tree.cursor.revision
    assert revision >= at_least
    for name in ("a", "b", f"c{revision % 50}"):
        entry = state.tree.entries[RelPath(name)]
        assert (entry.version, entry.digest, entry.size) == (revision, digest_of(b"%d" % revision), revision)
        assert state.stats[RelPath(name)] == FileStat(*[revision] * 4)
    return revision


def kill_while_recording(path: Path, chance: random.Random) -> int:
    child = recording_child(path)
    assert child.stdout is not None
    said = child.stdout.readline()
    # Not a wait for something to happen: where in its work the child is hit is the point.
    target = int(said) + chance.randrange(200)
    while int(said.splitlines()[-1]) < target:
        said += child.stdout.readline()
    child.kill()
    child.wait()
    recorded = last_said(child, said)
    child.stdout.close()
    return assert_true_up_to(path, recorded)


def test_sigkill_at_random_points_loses_nothing_recorded(path: Path) -> None:
    chance = random.Random(4)
    revision = 0
    for _ in range(6):
        now = kill_while_recording(path, chance)
        assert now > revision
        revision = now


@pytest.mark.nightly
def test_sigkill_at_random_points_many_times(path: Path) -> None:
    chance = random.Random()
    for _ in range(200):
        kill_while_recording(path, chance)


STATE_CHANGING = "pwrite64,write,fdatasync,fsync,ftruncate,unlink,unlinkat,rename,renameat"


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, to kill at a chosen system call")
def test_sigkill_at_each_system_call_that_changes_a_file(path: Path) -> None:
    """The first fifty of a fresh ledger's life: made, written ahead, recorded. None loses what was recorded."""
    reached = 0
    for number in range(1, 51):
        shutil.rmtree(path.parent, ignore_errors=True)
        inject = f"{STATE_CHANGING}:signal=KILL:when={number}"
        command = [
            "strace",
            "-f",
            "-qq",
            "-o",
            os.devnull,
            "-e",
            f"trace={STATE_CHANGING}",
            "-e",
            f"inject={inject}",
        ]
        run = subprocess.run(
            [*command, sys.executable, "-c", RECORDER, path], capture_output=True, check=False, timeout=60
        )
        if "ptrace" in run.stderr.decode():
            pytest.skip(f"this machine does not let strace attach: {run.stderr.decode().strip()}")
        lines = run.stdout.rpartition(b"\n")[0].splitlines()
        said = int(lines[-1]) if lines else 0
        state = reload(path)
        if said:
            assert assert_true_up_to(path, said) <= said + 1
            reached += 1
        elif state is not None and state.tree.cursor.revision:
            assert_true_up_to(path, 1)
    assert reached > 10
