"""A directory whose saves become RPCs, against the real endpoints over a real database."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from orchestrator_stub.devstack.editor import Editor, Sent
from orchestrator_stub.devstack.project_client import UserAuth
from orchestrator_stub.platform.source_files import as_text, path_problem, scan
from tests.fakes.serving import Local, serve_local

PNG = bytes(range(256))


class Desk:
    """A person's directory, a project of theirs, and the way between."""

    def __init__(self, local: Local, root: Path, project_id: UUID, user_id: UUID, baseline: Path) -> None:
        self.local = local
        self.root = root
        self.project_id = project_id
        self.baseline = baseline
        self.http = httpx.AsyncClient(
            base_url=local.url,
            headers={"apikey": local.keys.anon_key},
            auth=UserAuth(local.keys.keyring, user_id, time.time),
            timeout=20,
        )

    def editor(self, *include: str) -> Editor:
        return Editor(self.root, self.project_id, self.http, self.baseline, include=include)

    async def save_there(self, path: str, content: str | None) -> None:
        """As another member: a save in the project, or with None a removal."""
        if content is None:
            await self.local.sql("select public.delete_project_file(%s, %s)", self.project_id, path)
        else:
            await self.local.sql(
                "select public.upsert_project_file(%s, %s, %s)", self.project_id, path, content
            )

    def put(self, path: str, content: str | bytes) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    async def files(self) -> dict[str, str | None]:
        """The project as the database has it: path to content, None for a binary."""
        rows = await self.local.sql(
            "select file_path, content from public.list_current_files(%s)", self.project_id
        )
        return dict(rows)

    async def revision(self) -> int:
        rows = await self.local.sql(
            "select revision from public.project_heads where project_id = %s", self.project_id
        )
        return int(rows[0][0])

    async def until(self, condition: Callable[[dict[str, str | None]], object]) -> None:
        async with asyncio.timeout(15):
            while not condition(await self.files()):
                await asyncio.sleep(0.02)


class Lossy(httpx.AsyncBaseTransport):
    """Requests arrive and are done; while `lost` is set, their answers do not come back."""

    def __init__(self, under: httpx.AsyncBaseTransport) -> None:
        self._under = under
        self.lost = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self._under.handle_async_request(request)
        if self.lost:
            await answer.aclose()
            raise httpx.ReadError("the connection broke before the answer", request=request)
        return answer


@asynccontextmanager
async def at_a_desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    """A person with an empty project and an empty directory."""
    async with serve_local(database, tmp_path / "storage") as local:
        user_id, project_id = uuid4(), uuid4()
        await local.sql("insert into auth.users (id) values (%s)", user_id)
        await local.sql("insert into public.user_profiles (id) values (%s)", user_id)
        await local.sql("insert into public.projects (id, owner_id) values (%s, %s)", project_id, user_id)
        root = tmp_path / "app"
        root.mkdir()
        made = Desk(local, root, project_id, user_id, tmp_path / "editor.json")
        yield made
        await made.http.aclose()


@pytest.fixture
async def desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with at_a_desk(database, tmp_path) as made:
        yield made


async def test_an_import_is_one_commit_of_what_is_the_project_s(desk: Desk) -> None:
    desk.put("package.json", "{}\n")
    desk.put("src/App.tsx", "export {}\n")
    desk.put("logo.png", PNG)
    desk.put("run.sh", "#!/bin/sh\n").chmod(0o755)
    for path in (
        "node_modules/a/b.js",
        ".git/HEAD",
        "dist/x.js",
        ".preview-sync/y",
        "src/App.tsx~",
        ".DS_Store",
    ):
        desk.put(path, "no")
    desk.put(".gitignore", "dist\n")
    (desk.root / "link").symlink_to("package.json")
    sent = await desk.editor().send_all()
    assert sent == Sent(updated=5, skipped=("dist/: as git's ignore rules say (--include sends it)",))
    assert await desk.files() == {
        ".gitignore": "dist\n",
        "package.json": "{}\n",
        "src/App.tsx": "export {}\n",
        "logo.png": None,
        "run.sh": "#!/bin/sh\n",
    }
    assert await desk.revision() == 1
    rows = await desk.local.sql("select file_path from public.project_files_current where executable")
    assert rows == [("run.sh",)]
    assert not (await desk.editor().send_all()).updated, "a second start has nothing to send"


@pytest.mark.parametrize("size", [60_000, 200_000, 2_000_000])
async def test_bytes_that_are_stored_already_hold_up_nothing(desk: Desk, size: int) -> None:
    """Storage refuses the second upload of one picture unread; what follows on that connection would wait behind it."""
    picture = b"\0" + random.Random(size).randbytes(size)
    async with asyncio.timeout(15):
        for path in ("one.png", "two.png", "three.png"):
            desk.put(path, picture)
            assert await desk.editor().send_all() == Sent(updated=1)
    assert set(await desk.files()) == {"one.png", "two.png", "three.png"}


async def test_what_changed_while_it_was_down_is_sent_and_what_others_wrote_is_left(desk: Desk) -> None:
    for path in ("kept", "changed", "removed", "theirs"):
        desk.put(path, "one")
    await desk.editor().send_all()
    await desk.local.sql("select public.upsert_project_file(%s, 'theirs', 'theirs')", desk.project_id)
    await desk.local.sql("select public.upsert_project_file(%s, 'new of theirs', 'x')", desk.project_id)
    desk.put("changed", "two")
    (desk.root / "removed").unlink()
    desk.put("new", "new")
    assert await desk.editor().send_all() == Sent(updated=2, deleted=1)
    assert await desk.files() == {
        "kept": "one", "changed": "two", "theirs": "theirs", "new of theirs": "x", "new": "new",
    }  # fmt: skip


async def test_what_the_database_refuses_is_said_and_the_rest_lands(desk: Desk) -> None:
    desk.put("good", "x")
    desk.put("e\u0301", "not composed")
    desk.put("a\\b", "backslash")
    desk.put("d", "a file here")
    await desk.local.sql(
        "select public.upsert_project_file(%s, 'd/e', 'and a directory there')", desk.project_id
    )
    sent = await desk.editor().send_all()
    assert sent.updated == 1
    assert {line.split(":")[0] for line in sent.skipped} == {"e\u0301", "a\\b", "d"}
    assert (await desk.files())["good"] == "x"


class Watched:
    """An editor at work while the block runs."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.sent: list[Sent] = []

    async def __aenter__(self) -> Watched:
        self.editor = self.desk.editor()
        await self.editor.send_all()

        async def follow() -> None:
            async for sent in self.editor.watch():
                self.sent.append(sent)

        self.task = asyncio.create_task(follow())
        # The watch is in place once a first save has come through.
        self.desk.put("watched", "yes")
        await self.desk.until(lambda files: "watched" in files)
        return self

    async def __aexit__(self, *_: Any) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_saves_removals_and_moves_are_followed(desk: Desk) -> None:
    desk.put("src/a.ts", "a")
    async with Watched(desk):
        desk.put("src/b.ts", "b")
        await desk.until(lambda files: files.get("src/b.ts") == "b")
        draft = desk.put("src/a.ts.tmp", "a, safely")
        draft.rename(desk.root / "src/a.ts")
        await desk.until(lambda files: files.get("src/a.ts") == "a, safely")
        (desk.root / "src").rename(desk.root / "source")
        await desk.until(lambda files: set(files) == {"watched", "source/a.ts", "source/b.ts"})
        shutil.rmtree(desk.root / "source")
        await desk.until(lambda files: set(files) == {"watched"})
        desk.put("deep/er/c.ts", "c")
        await desk.until(lambda files: files.get("deep/er/c.ts") == "c")


async def test_what_is_beside_the_project_is_not_followed_into_it(desk: Desk, tmp_path: Path) -> None:
    """A state directory in its default place, and one that a link in the project leads to."""
    outside = tmp_path / "state"
    outside.mkdir()
    (desk.root / ".preview-sync").mkdir()
    (desk.root / "link").symlink_to(outside)
    (desk.root / "src").mkdir()
    (desk.root / "src/link").symlink_to(outside)
    async with Watched(desk):
        for directory in (outside, desk.root / ".preview-sync"):
            for name in ("keys.json", "editor.json"):
                (directory / name).write_text("secret")
        (outside / "postgres").mkdir()
        (outside / "postgres/1").write_text("x")
        desk.put("src/later.ts", "later")
        await desk.until(lambda files: "src/later.ts" in files)
        # A second one: what came with the first has been sent by then.
        desk.put("src/last.ts", "last")
        await desk.until(lambda files: "src/last.ts" in files)
        assert set(await desk.files()) == {"watched", "src/later.ts", "src/last.ts"}


async def test_many_saves_at_once_are_few_commits(desk: Desk) -> None:
    async with Watched(desk):
        before = await desk.revision()
        for n in range(200):
            desk.put(f"src/{n}.ts", f"export const n = {n}\n")
        await desk.until(lambda files: len(files) == 201)
        assert await desk.revision() - before < 50


async def test_a_hundred_quick_saves_end_with_the_last(desk: Desk) -> None:
    async with Watched(desk):
        for n in range(100):
            desk.put("a.ts", f"export const n = {n}\n")
            await asyncio.sleep(0.002)
        await desk.until(lambda files: files.get("a.ts") == "export const n = 99\n")


async def test_a_stack_that_is_away_for_a_moment_loses_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = 2
    real = desk.http.request

    async def request(*args: Any, **kwargs: Any) -> httpx.Response:
        nonlocal failures
        if failures:
            failures -= 1
            raise httpx.ConnectError("refused")
        return await real(*args, **kwargs)

    monkeypatch.setattr(desk.http, "request", request)
    desk.put("a", "a")
    assert await desk.editor().send_all() == Sent(updated=1)
    assert await desk.files() == {"a": "a"}


def test_links_are_no_part_of_a_project(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "a").write_text("")
    assert list(scan(tmp_path)) == ["a"]


def test_paths_and_texts() -> None:
    assert path_problem("src/é.ts") is None
    for path in ("a" * 1025, "b" * 256, "a\\b", "a\nb", "e\u0301", os.fsdecode(b"\xff")):
        assert path_problem(path), path
    assert as_text(b"x\0") is None
    assert as_text(b"\xff") is None
    assert as_text("ü\r\n".encode()) == "ü\r\n"


async def test_after_a_lost_answer_the_old_content_is_sent_again(desk: Desk) -> None:
    """The save was done and its answer lost; then it is undone. The undoing must not pass for what was sent before."""
    lossy = Lossy(httpx.AsyncHTTPTransport())
    desk.http._transport = lossy
    desk.put("changed.ts", "one\n")
    desk.put("removed.ts", "one\n")
    editor = desk.editor()
    await editor.send_all()
    desk.put("changed.ts", "two\n")
    desk.put("made.ts", "two\n")
    (desk.root / "removed.ts").unlink()
    lossy.lost = True
    for path in ("changed.ts", "made.ts", "removed.ts"):
        with pytest.raises(httpx.ReadError):
            await editor.send({path})
    assert await desk.files() == {"changed.ts": "two\n", "made.ts": "two\n"}
    lossy.lost = False
    desk.put("changed.ts", "one\n")
    desk.put("removed.ts", "one\n")
    (desk.root / "made.ts").unlink()
    # Another life of the editor knows it too.
    assert (await desk.editor().send_all()).skipped == ()
    assert await desk.files() == {"changed.ts": "one\n", "removed.ts": "one\n"}


async def test_a_save_that_never_arrived_and_was_undone_is_no_refusal(desk: Desk) -> None:
    editor = desk.editor()
    desk.put("never.ts", "n\n")
    url, desk.http.base_url = desk.http.base_url, httpx.URL("http://127.0.0.1:9")
    with pytest.raises(httpx.ConnectError):
        await editor.send_all()
    desk.http.base_url = url
    (desk.root / "never.ts").unlink()
    assert (await editor.send_all()).skipped == ()
    assert not await editor.send_all()


LATIN = b"caf\xe9"
"""A name that is not UTF-8."""


def plant(directory: Path, kind: str) -> None:
    place = os.fsencode(directory) + b"/" + LATIN
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        with open(place, "wb") as file:
            file.write(b"x")
    elif kind == "directory":
        os.mkdir(place)
    else:
        os.symlink(b"nowhere", place)


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
@pytest.mark.parametrize("below", ["", "src", "node_modules/x"])
async def test_a_name_that_is_not_utf_8_does_not_end_the_watch(desk: Desk, below: str, kind: str) -> None:
    """Also in a directory that is none of the project's: the watch is over all of them."""
    (desk.root / below).mkdir(parents=True, exist_ok=True)
    async with Watched(desk) as watched:
        desk.put("with-it.ts", "saved in the same moment")
        plant(desk.root / below, kind)
        await desk.until(lambda files: "with-it.ts" in files)
        desk.put("src/after.ts", "after")
        await desk.until(lambda files: files.get("src/after.ts") == "after")
        assert not watched.task.done()
        assert watched.editor.renewals > 0
        async with asyncio.timeout(30):
            # Its own looks are no reason to make it again: once it is there, saves come through it.
            for number in range(1000):
                before = watched.editor.renewals
                for again in "ab":
                    desk.put("src/after.ts", f"{number}{again}")
                    await desk.until(lambda files, now=f"{number}{again}": files.get("src/after.ts") == now)
                    await asyncio.sleep(0.3)
                if watched.editor.renewals == before:
                    break
        (desk.root / "with-it.ts").unlink()
        desk.put("new/deep/er/c.ts", "1")
        await desk.until(lambda files: "with-it.ts" not in files and "new/deep/er/c.ts" in files)
        desk.put("new/deep/er/c.ts", "2")
        await desk.until(lambda files: files["new/deep/er/c.ts"] == "2")
        skipped = [line for sent in watched.sent for line in sent.skipped]
        assert len(skipped) == (1 if kind != "link" and below != "node_modules/x" else 0)
        assert all("its name is not UTF-8" in line for line in skipped)
        assert "".join(skipped).isprintable(), "what a terminal cannot show is escaped"


async def test_names_that_are_not_utf_8_without_end_stop_no_save(desk: Desk) -> None:
    async with Watched(desk) as watched:
        done = asyncio.Event()

        async def write() -> None:
            while not done.is_set():
                plant(desk.root, "file")
                await asyncio.sleep(0.01)

        writing = asyncio.create_task(write())
        for number in range(3):
            desk.put("src/a.ts", f"{number}")
            await desk.until(lambda files, number=number: files.get("src/a.ts") == f"{number}")
        done.set()
        await writing
        assert not watched.task.done()
        lines = [line for sent in watched.sent for line in sent.skipped]
        assert len(lines) == 1, "said once"


async def test_what_has_such_a_name_is_left_out_and_said(desk: Desk) -> None:
    desk.put(f"{os.fsdecode(LATIN)}/a.ts", "x")
    desk.put(f"src/{os.fsdecode(LATIN)}.ts", "x")
    desk.put("b\n.ts", "x")
    desk.put("b.ts", "x")
    sent = await desk.editor().send_all()
    assert (sent.updated, set(sent.skipped)) == (
        1,
        {
            "caf\\xe9: its name is not UTF-8",
            "src/caf\\xe9.ts: its name is not UTF-8",
            "b\\n.ts: its name has a backslash or a control character",
        },
    )
    assert (await desk.editor().send_all()).skipped == sent.skipped, "another start says it again"
