"""Files whose size others choose: neither the event loop nor the memory pays for it."""

from __future__ import annotations

import asyncio
import os
import stat
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from immutables import Map

from agent.core.messages import Changes
from agent.core.model import Change, Cursor, Digest, RelPath, Tree, digest_of
from agent.core.reconcile import catch_up
from agent.fs import transaction, turns
from agent.fs.inspect import CHUNK, UNREAD, DirectoryView, Drift, FileStat, digest_steps
from agent.fs.turns import at_once
from agent.sync.drift import DriftWatch, Observed
from agent.sync.ledger import Ledger, LedgerState
from agent.sync.workspace import Workspace
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from tests.agent.disks import Agent, in_staging, kinds, remove, seen, write
from tests.agent.sync.test_shadow import shadow_of
from tests.trees import open_here

HUGE = 2**40
"""Bytes, and no block of the disk. Hashing them takes half an hour: a test that reads them does not end."""


def inflate(path: Path) -> None:
    try:
        os.truncate(path, HUGE)
    except OSError as error:
        pytest.skip(f"no file of 1 TB can be made in {path.parent}: {error.strerror}")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


# --- reading


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_file_of_its_size_is_read_in_pieces(tmp_path: Path, directory: int, size: int) -> None:
    (tmp_path / "a").write_bytes(bytes(size))
    assert at_once(digest_steps(directory, "a", size)) == (
        digest_of(bytes(size)),
        FileStat.of((tmp_path / "a").stat()),
    )
    assert len(list(digest_steps(directory, "a", size))) == max(0, (size - 1) // CHUNK)


@pytest.mark.parametrize("now", [0, 2 * CHUNK, 3 * CHUNK - 1, 3 * CHUNK + 1, HUGE])
def test_a_file_of_another_size_or_of_one_that_changes_is_not_read_on(
    tmp_path: Path, directory: int, now: int
) -> None:
    (tmp_path / "a").write_bytes(bytes(3 * CHUNK))
    before = FileStat.of((tmp_path / "a").stat())
    steps = digest_steps(directory, "a", 3 * CHUNK)
    next(steps)
    os.truncate(tmp_path / "a", now)
    assert at_once(steps) == (UNREAD, before)
    assert at_once(digest_steps(directory, "a", 3 * CHUNK)) == (UNREAD, FileStat.of((tmp_path / "a").stat()))


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
async def test_what_is_no_file_is_never_opened(agent: Agent, root: Path, kind: int) -> None:
    """A pipe would wait, and a device give without end."""
    agent.put({"a": ""})
    (root / "a").unlink()
    special(root / "a", kind)
    audit = at_once(agent.disk.audit_steps(Tree(Cursor("e", 1), Map(agent.tree)), agent.known))
    assert audit.drifts == (Drift(RelPath("a"), "not_a_file"),)
    assert shadow_of(root, {"a": ""}).read(shadow_of(root, {"a": ""}).wanted()) == {}


def special(path: Path, kind: int) -> None:
    try:
        os.mknod(path, kind | 0o666, os.makedev(1, 5) if kind == stat.S_IFCHR else 0)
    except PermissionError:
        pytest.skip("making a device needs root")


# --- a transaction


@pytest.mark.usefixtures("keeping")
def test_a_transaction_replaces_what_became_huge_and_undoes_it(agent: Agent, root: Path) -> None:
    agent.put({"ours": "1", "gone": "1", "b": "1"})
    (root / "foreign").touch()
    for name in ("ours", "gone", "foreign"):
        inflate(root / name)
    (root / "way").mkdir()
    before = {path.name: path.stat().st_ino for path in root.iterdir()}

    def full(source: str, name: str, **at: int) -> None:
        if name == "z":
            raise OSError(28, "no space")
        real(source, name, **at)

    real = os.rename
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "rename", full)
        result = agent.apply(
            write("ours", "2", version=2), remove("gone"), write("foreign", "2"), write("z", "2")
        )
    assert result.rolled_back
    assert "undo_failed" not in {problem.kind for problem in result.problems}
    assert {path.name: path.stat().st_ino for path in root.iterdir()} == before
    assert (root / "ours").stat().st_size == (root / "foreign").stat().st_size == HUGE

    result = agent.apply(write("ours", "2", version=2), remove("gone"), write("foreign", "2"))
    assert kinds(result) == [
        ("drift", "ours", "changed"), ("drift", "foreign", "appeared"), ("drift", "gone", "changed"),
    ]  # fmt: skip
    assert seen(root) == {"ours": "2", "foreign": "2", "b": "1", "way/": ""}
    inflate(root / "ours")
    agent.apply(write("ours", "3", version=3))
    assert seen(root)["ours"] == "3"
    assert not in_staging(root.parent / "staging")


@pytest.mark.usefixtures("keeping")
@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR])
def test_a_transaction_puts_back_what_was_no_file(agent: Agent, root: Path, kind: int) -> None:
    agent.put({"a": "1"})
    (root / "a").unlink()
    special(root / "a", kind)
    before = (root / "a").lstat()

    def full(source: str, name: str, **at: int) -> None:
        if name == "z":
            raise OSError(28, "no space")
        real(source, name, **at)

    real = os.rename
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "rename", full)
        assert agent.apply(write("a", "2", version=2), write("z", "2")).rolled_back
    after = (root / "a").lstat()
    assert (after.st_ino, after.st_mode, after.st_rdev) == (before.st_ino, before.st_mode, before.st_rdev)
    assert kinds(agent.apply(write("a", "2", version=2), write("z", "2"))) == [("drift", "a", "not_a_file")]
    assert seen(root) == {"a": "2", "z": "2"}


def test_a_copy_is_made_piece_by_piece(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the file system cannot exchange names; the file is the one that we put there."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(38, os.strerror(38))

    monkeypatch.setattr(transaction, "exchange", refuse)
    agent.apply(write("a", bytes(32 * 2**20), executable=True))
    operations = (write("a", "2", version=2), write("b", "2"))
    tracemalloc.start()
    try:
        result = agent.apply(*operations)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kinds(result) == []
    assert peak < 4 * 2**20
    assert seen(root) == {"a": "2", "b": "2"}


def test_a_copy_that_is_put_back_is_the_same(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(38, os.strerror(38))

    def full(source: str, name: str, **at: int) -> None:
        if name == "z":
            raise OSError(28, "no space")
        real(source, name, **at)

    content = os.urandom(3 * 2**20 + 1)
    agent.apply(write("a", content, executable=True))
    real = os.rename
    monkeypatch.setattr(transaction, "exchange", refuse)
    monkeypatch.setattr(os, "rename", full)
    assert agent.apply(write("a", "2", version=2), write("z", "2")).rolled_back
    assert (root / "a").read_bytes() == content
    assert os.access(root / "a", os.X_OK)


def test_past_so_many_bytes_a_transaction_reads_no_more(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "MAX_READ_BYTES", 25)
    for name in ("a", "b", "c"):
        (root / name).write_text("0123456789")
    result = agent.apply(*(write(name, "0123456789") for name in ("a", "b", "c")))
    assert kinds(result) == [("drift", "c", "appeared")], "a and b hold what is wanted; c was not read"
    assert seen(root) == dict.fromkeys("abc", "0123456789")
    (root / "small").write_text("x")
    assert kinds(agent.apply(write("small", "x"))) == [], "the next transaction reads again"


# --- a start


async def test_a_start_takes_what_became_huge_for_unconfirmed(agent: Agent, root: Path) -> None:
    agent.put({"a": "1", "b": "1"})
    inflate(root / "a")
    ledger = Ledger(root.parent / "ledger.sqlite")
    workspace = Workspace(agent.disk, ledger, Problems(Metrics()))
    recorded = Tree(Cursor("e", 5), Map(agent.tree))
    tree, drifts = await workspace.audit(LedgerState(recorded, agent.known))
    now = agent.disk.stat(RelPath("a"))
    assert drifts == (Drift(RelPath("a"), "changed", UNREAD, now),)
    entry = tree.entries[RelPath("a")]
    assert (entry.digest, entry.size, entry.provisional) == (UNREAD, HUGE, True)
    # What is recorded of it is believed again, and a check after a touch does not read it either.
    workspace.record_whole(tree)
    ledger.close()
    loaded = ledger.load()
    assert loaded is not None
    assert loaded.tree.entries == tree.entries
    os.utime(root / "a")
    _, again = await workspace.audit(loaded)
    assert [(drift.path, drift.digest) for drift in again] == [("a", UNREAD)]
    # The database says that it is deleted: it is ours to remove.
    plan = catch_up(tree, Changes("e", 6, 5, (Change(RelPath("a"), None, 1),)))
    workspace.apply(plan.operations, tree.entries)
    assert seen(root) == {"b": "1"}
    ledger.close()


async def test_what_is_adopted_has_the_size_that_it_has(agent: Agent, root: Path) -> None:
    """Else the next check took it for another by its size."""
    agent.put({"a": "1"})
    ledger = Ledger(root.parent / "ledger.sqlite")
    workspace = Workspace(agent.disk, ledger, Problems(Metrics()))
    content = b"0"
    tree = Tree(Cursor("e", 5), Map(agent.tree))
    for content in (b"9", b"10"):
        (root / "a").write_bytes(content)
        found = agent.disk.stat(RelPath("a"))
        digest = digest_of(content)
        tree = workspace.unconfirmed(tree, [Drift(RelPath("a"), "changed", digest, found)])
    os.utime(root / "a")
    again, drifts = await workspace.audit(LedgerState(tree, workspace.stats))
    assert drifts == ()
    assert again.entries[RelPath("a")].size == len(content)


async def test_a_start_that_reads_everything_lets_others_have_their_turn(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN", 0.0)
    agent.put({f"f{number}": "x" * CHUNK for number in range(20)})
    agent.apply(write("large", bytes(8 * CHUNK)))
    workspace = Workspace(agent.disk, Ledger(root.parent / "ledger.sqlite"), Problems(Metrics()))
    for path in root.iterdir():
        os.utime(path)
    working = asyncio.create_task(
        workspace.audit(LedgerState(Tree(Cursor("e", 1), Map(agent.tree)), agent.known))
    )
    had = 0
    while not working.done():
        await asyncio.sleep(0)
        had += 1
    assert working.result()[1] == ()
    assert had >= 20 + 7, "one for each file, and for each piece of the large one"


# --- the watch


class Watching:
    """A drift watch that sweeps when the test says so."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.seen: list[Observed] = []
        self.watch = DriftWatch(agent.disk, lambda: (Map(agent.tree), agent.known), self.seen.append)

    async def sweep(self) -> None:
        await self.watch._sweep()

    @property
    def open(self) -> dict[str, Digest | None]:
        return {path: drift.digest for path, drift in self.watch.open.items()}


async def test_the_watch_reports_what_became_huge_and_that_it_is_right_again(
    agent: Agent, root: Path
) -> None:
    agent.put({"a": "1", "b": "1"})
    watching = Watching(agent)
    inflate(root / "a")
    await watching.sweep()
    assert watching.open == {"a": UNREAD}
    os.utime(root / "a")
    await watching.sweep()
    agent.apply(write("a", "2", version=2))
    await watching.sweep()
    assert watching.open == {}
    assert watching.seen[-1].settled == ("a",)


async def test_the_watch_reads_a_large_file_in_turns_with_others(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN", 0.0)
    agent.apply(write("large", bytes(16 * CHUNK)))
    (root / "large").write_bytes(b"1" * 16 * CHUNK)
    watching = Watching(agent)
    sweeping = asyncio.create_task(watching.sweep())
    had = 0
    while not sweeping.done():
        await asyncio.sleep(0)
        had += 1
    assert had >= 15
    assert watching.open == {"large": digest_of(b"1" * 16 * CHUNK)}


@pytest.mark.parametrize("theirs", [b"1", b"0"])
async def test_what_we_wrote_while_the_watch_read_is_not_reported_as_it_was(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch, theirs: bytes
) -> None:
    """Neither as drift, nor with the stat that it had before."""
    monkeypatch.setattr(turns, "TURN", 0.0)
    agent.put({"a": "1"})
    agent.apply(write("large", b"0" * 16 * CHUNK))
    (root / "large").write_bytes(theirs * 16 * CHUNK)
    (root / "a").write_text("2")
    watching = Watching(agent)
    sweeping = asyncio.create_task(watching.sweep())
    for _ in range(8):
        await asyncio.sleep(0)
    assert not sweeping.done()
    assert [drift.path for told in watching.seen for drift in told.drifts] == ["a"], (
        "told before anybody else"
    )
    agent.apply(write("large", "ours", version=2), write("a", "3", version=2))
    await sweeping
    assert watching.open == {"a": digest_of(b"2")}
    assert not any("large" in told.touched for told in watching.seen)
    await watching.sweep()
    assert watching.open == {}


async def test_a_look_that_is_given_up_leaves_nothing_open(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "TURN", 0.0)
    agent.apply(write("large", bytes(16 * CHUNK)))
    os.utime(root / "large")

    def holds() -> int:
        return sum(name.startswith(str(root / "large")) for name in open_here())

    sweeping = asyncio.create_task(Watching(agent).sweep())
    while not holds():
        assert not sweeping.done()
        await asyncio.sleep(0)
    sweeping.cancel()
    await asyncio.gather(sweeping, return_exceptions=True)
    assert holds() == 0


# --- shadow mode


def test_shadow_mode_tells_by_the_size_and_starts_anew_with_each_change(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    shadow = shadow_of(tmp_path, {"a": "a", "b": "b"}, settle=0.0)
    inflate(tmp_path / "a")
    (tmp_path / "b").write_text("more")
    found = shadow.read(shadow.wanted())
    assert found == {name: FileStat.of((tmp_path / name).stat()) for name in ("a", "b")}
    shadow.compare(shadow.wanted(), found)
    assert shadow.comparison.counts()["differs"] == 2
    since = shadow.comparison.open[RelPath("b")].since
    (tmp_path / "b").write_text("even more")
    shadow.compare(shadow.wanted(), shadow.read(shadow.wanted()))
    assert shadow.comparison.open[RelPath("b")].since > since


def test_shadow_mode_ends_in_the_middle_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "x" * 8 * CHUNK
    (tmp_path / "a").write_text(text)
    shadow = shadow_of(tmp_path, {"a": text})
    real = DirectoryView.digest_steps
    pieces = 0

    def counted(self: DirectoryView, path: RelPath, size: int):  # type: ignore[no-untyped-def]
        nonlocal pieces
        steps = real(self, path, size)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            pieces += 1
            shadow._stopping = pieces == 3
            yield

    monkeypatch.setattr(DirectoryView, "digest_steps", counted)
    assert shadow.read(shadow.wanted()) == {}
    assert pieces == 3


def test_shadow_mode_reads_no_file_that_grows_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "x" * 8 * CHUNK
    (tmp_path / "a").write_text(text)
    shadow = shadow_of(tmp_path, {"a": text})
    real = os.read

    def slow(descriptor: int, size: int) -> bytes:
        with (tmp_path / "a").open("ab") as file:
            file.write(b"y" * CHUNK)
        return real(descriptor, size)

    with monkeypatch.context() as growing:
        growing.setattr(os, "read", slow)
        found = shadow.read(shadow.wanted())
    assert list(found) == ["a"]
    assert isinstance(found[RelPath("a")], FileStat)
