"""A file that cannot be read is not one that is gone: descriptors, rights, disks and directories that fail."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import watchfiles.main

from orchestrator_stub.devstack import editor as editor_module
from orchestrator_stub.devstack.editor import Sent
from orchestrator_stub.platform.source_files import in_few_words
from tests.fakes.descriptors import no_descriptors
from tests.orchestrator.devstack.test_editor import Desk, Watched, at_a_desk

NOBODY = 65534


@pytest.fixture
async def desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with at_a_desk(database, tmp_path) as made:
        yield made


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The editor reads without root's way round all rights; the database's and the storage's ends keep theirs."""
    if os.geteuid() != 0:
        return
    setfsuid = ctypes.CDLL(None).setfsuid

    def as_nobody(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            setfsuid(NOBODY)  # of this thread alone
            try:
                return function(*arguments, **named)
            finally:
                setfsuid(0)

        return call

    for name in ("read_file", "list_files"):
        monkeypatch.setattr(editor_module, name, as_nobody(getattr(editor_module, name)))
    # The thread that it starts, and that watches, has the rights of the one that makes it.
    monkeypatch.setattr(watchfiles.main, "RustNotify", as_nobody(watchfiles.main.RustNotify))
    monkeypatch.setattr(editor_module, "directories", as_nobody(editor_module.directories))


@pytest.fixture
def open_desk(desk: Desk, unprivileged: None) -> Iterator[Desk]:
    """A desk where everybody can go, and whose editor has nobody's rights."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        desk.root = Path(place) / "app"
        desk.root.mkdir()
        yield desk


async def test_what_cannot_be_read_for_want_of_descriptors_is_not_deleted(desk: Desk) -> None:
    for n in range(20):
        desk.put(f"src/{n}.ts", f"{n}")
    editor = desk.editor()
    await editor.send_all()
    desk.put("src/3.ts", "changed")
    (desk.root / "src/4.ts").unlink()
    before = await desk.files()
    with no_descriptors():
        sent = await editor.send_all()
        again = await editor.send_all()
    assert (sent.updated, sent.deleted) == (0, 1), "what is gone is seen to be gone"
    assert [line.split(":")[0] for line in sent.skipped] == [
        "the note of what was sent",
        "the whole directory",
    ]
    assert all("Too many open files" in line for line in sent.skipped)
    assert again.skipped == (), "it is said once"
    assert await desk.files() == {path: text for path, text in before.items() if path != "src/4.ts"}
    assert await editor.send_all() == Sent(updated=1)
    assert (await desk.files())["src/3.ts"] == "changed"
    assert not await desk.editor().send_all(), "what was sent was noted once it could be"


async def test_what_could_not_be_read_is_tried_again_without_another_save(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor_module, "TRY_AGAIN", 0.05)
    desk.put("a.ts", "one")
    (desk.root / "new").mkdir()
    async with Watched(desk) as watched:
        with (desk.root / "a.ts").open("w") as file, (desk.root / "new/b.ts").open("w") as other:
            await desk.until(lambda files: files["a.ts"] == "" and "new/b.ts" in files)
            with no_descriptors():
                for each in (file, other):
                    each.write("two")
                    each.flush()
                async with asyncio.timeout(15):
                    while sum("cannot be read" in line for sent in watched.sent for line in sent.skipped) < 2:
                        await asyncio.sleep(0.01)
            await desk.until(lambda files: (files["a.ts"], files["new/b.ts"]) == ("two", "two"))
    said = [line for sent in watched.sent for line in sent.skipped]
    assert len(said) == len(set(said)), "each is said once"


async def test_a_file_and_a_directory_without_rights_are_not_deleted(open_desk: Desk) -> None:
    desk = open_desk
    for path in ("src/a.ts", "src/deep/b.ts", "half/c.ts", "closed.ts", "open.ts"):
        desk.put(path, "x")
    editor = desk.editor()
    await editor.send_all()
    before = await desk.files()
    (desk.root / "src").chmod(0o000)
    (desk.root / "half").chmod(0o311)
    (desk.root / "closed.ts").chmod(0o000)
    desk.put("half/new.ts", "x")
    desk.put("open.ts", "y")
    sent = await editor.send_all()
    assert (sent.updated, sent.deleted) == (1, 0), sent
    assert [line.split(":")[0] for line in sent.skipped] == ["closed.ts", "half/", "src/"]
    assert all("Permission denied" in line for line in sent.skipped)
    assert await editor.send_all() == Sent(), "nothing new"
    assert await desk.files() == {**before, "open.ts": "y"}
    # Another life of the editor does not take it for deleted either, and says it again.
    other = desk.editor()
    sent = await other.send_all()
    assert (sent.updated, sent.deleted) == (0, 0)
    assert "Permission denied" in " ".join(sent.skipped)
    (desk.root / "half").chmod(0o755)
    (desk.root / "src").chmod(0o755)
    (desk.root / "src/a.ts").unlink()
    assert await other.send_all() == Sent(updated=1, deleted=1)
    assert set(await desk.files()) == {"src/deep/b.ts", "half/c.ts", "half/new.ts", "closed.ts", "open.ts"}


async def test_rights_that_come_back_are_noticed(open_desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editor_module, "TRY_AGAIN", 0.05)
    desk = open_desk
    desk.put("src/a.ts", "one")
    (desk.root / "gone").mkdir()
    for name in ("src", "gone"):
        (desk.root / name).chmod(0o000)
    async with Watched(desk) as watched:
        assert set(await desk.files()) == {"watched"}
        assert set(watched.editor._unread) == {"src/", "gone/"}
        (desk.root / "src").chmod(0o755)
        (desk.root / "gone").rmdir()
        await desk.until(lambda files: files.get("src/a.ts") == "one")
        desk.put("src/a.ts", "two")
        await desk.until(lambda files: files["src/a.ts"] == "two")
        async with asyncio.timeout(15):
            while watched.editor._unread:
                await asyncio.sleep(0.02)


async def test_a_directory_that_is_too_deep_to_open_is_left_out_and_not_tried_again(desk: Desk) -> None:
    desk.put("a.ts", "x")
    before = os.getcwd()
    os.chdir(desk.root)
    try:
        for _ in range(25):
            os.mkdir("d" * 200)
            os.chdir("d" * 200)
    finally:
        os.chdir(before)
    editor = desk.editor()
    sent = await editor.send_all()
    assert sent.updated == 1
    assert [line.split(": ")[1] for line in sent.skipped] == ["its name is too long"]
    assert not editor._unread


async def test_a_directory_that_cannot_be_listed_is_shown_as_a_terminal_can(open_desk: Desk) -> None:
    (open_desk.root / "a\u202eb").mkdir(mode=0o000)
    [line] = (await open_desk.editor().send_all()).skipped
    assert line.startswith("a\\u202eb/: cannot be read now")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ELOOP, errno.ENFILE, errno.ETIMEDOUT])
async def test_whatever_else_keeps_a_file_from_being_read_is_no_deletion(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for path in ("a.ts", "b.ts"):
        desk.put(path, "x")
    editor = desk.editor()
    await editor.send_all()
    real = os.open

    def broken(path: Any, *arguments: Any, **named: Any) -> int:
        if os.fspath(path) == str(desk.root / "a.ts"):
            raise OSError(number, os.strerror(number))
        return real(path, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", broken)
        sent = await editor.send_all()
    assert (sent.updated, sent.deleted) == (0, 0)
    [line] = sent.skipped
    assert line.startswith("a.ts: ")
    assert os.strerror(number) in line
    assert not await editor.send_all()
    assert set(await desk.files()) == {"a.ts", "b.ts"}


async def test_what_is_another_thing_now_is_a_deletion(desk: Desk) -> None:
    """Gone, a link, a loop of links, a directory, a pipe, a socket; below a file, below a link."""
    names = ("gone", "link", "loop", "directory", "pipe", "socket")
    for path in (*names, "d/file", "e/file", "f/file", "kept"):
        desk.put(path, "x")
    editor = desk.editor()
    await editor.send_all()
    for name in names:
        (desk.root / name).unlink()
    for name in ("d", "e", "f"):
        shutil.rmtree(desk.root / name)
    (desk.root / "link").symlink_to("kept")
    (desk.root / "loop").symlink_to("loop")
    (desk.root / "directory").mkdir()
    os.mkfifo(desk.root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(desk.root / "socket"))
        (desk.root / "d").write_text("x")
        (desk.root / "e").symlink_to(".")
        (desk.root / "f").symlink_to("f")
        assert await editor.send_all() == Sent(updated=1, deleted=9)
    assert set(await desk.files()) == {"kept", "d"}


async def test_a_directory_that_is_gone_as_a_whole_empties_no_project(desk: Desk) -> None:
    for n in range(5):
        desk.put(f"src/{n}.ts", "x")
    editor = desk.editor()
    await editor.send_all()
    aside = desk.root.rename(desk.root.with_name("aside"))
    sent = await editor.send_all()
    assert (sent.updated, sent.deleted) == (0, 0)
    assert len(sent.skipped) == 1
    aside.rename(desk.root)
    assert not await editor.send_all()
    assert len(await desk.files()) == 5


def test_many_are_said_in_few_words() -> None:
    many = {f"{n}.ts": "no" for n in range(20)}
    assert list(in_few_words({**many, "a/x": "no", "a/": "no", "b": "never"})) == [
        "0.ts and 20 more: no",
        "b: never",
    ]
    assert list(in_few_words({**many, "/": "no"})) == ["the whole directory: no"]
    assert list(in_few_words({"a": "no", "ab/": "no"})) == ["a: no", "ab/: no"]


async def test_a_baseline_that_cannot_be_read_is_not_an_empty_one(desk: Desk) -> None:
    """Taken for empty, it would have the directory overwrite what others saved meanwhile."""
    desk.put("a.ts", "ours")
    await desk.editor().send_all()
    with no_descriptors(), pytest.raises(OSError, match="Too many open files"):
        desk.editor()
