"""The directory and the project changed both; files and directories changed places; a kill, a full disk, a refusal."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator_stub.devstack.editor import Editor, Sent
from orchestrator_stub.devstack.project_client import ProjectClient
from tests.orchestrator.devstack.test_editor import PNG, Desk, at_a_desk


@pytest.fixture
async def desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with at_a_desk(database, tmp_path) as made:
        yield made


async def test_what_both_sides_changed_is_kept_twice(desk: Desk) -> None:
    for path in ("both", "same", "ours", "theirs", "kept", "brought-back", "gone"):
        desk.put(path, "first")
    await desk.editor().begin()
    desk.put("both", "ours")
    desk.put("same", "as one")
    desk.put("ours", "ours")
    desk.put("brought-back", "ours")
    (desk.root / "kept").unlink()
    (desk.root / "gone").unlink()
    for path, content in (("both", "theirs"), ("same", "as one"), ("theirs", "theirs"), ("kept", "theirs")):
        await desk.save_there(path, content)
    await desk.save_there("brought-back", None)
    await desk.save_there("gone", None)
    sent = await desk.editor().begin()
    assert await desk.files() == {
        "both": "ours", "same": "as one", "ours": "ours", "theirs": "theirs", "kept": "theirs", "brought-back": "ours",
    }  # fmt: skip
    assert (desk.root / "both.conflict-v2").read_text() == "theirs"
    assert sorted(line.split()[0] for line in sent.said) == ["both", "kept"]
    assert "both.conflict-v2" in " ".join(sent.said)
    assert not await desk.editor().begin(), "the next start says nothing of it again"
    assert (desk.root / "both.conflict-v2").exists()


async def test_a_binary_is_kept_too_and_a_first_start_goes_over_nothing(desk: Desk) -> None:
    """Without a baseline (another machine, another state directory) nobody knows which of two is the newer."""
    desk.put("logo.png", PNG)
    desk.put("a.ts", "first")
    await desk.editor().begin()
    desk.baseline.unlink()
    desk.put("logo.png", PNG[::-1])
    desk.put("a.ts", "ours")
    sent = await desk.editor().begin()
    assert (desk.root / "logo.png.conflict-v1").read_bytes() == PNG
    assert (desk.root / "a.ts.conflict-v1").read_text() == "first"
    assert sent.updated == 2
    assert (await desk.files())["a.ts"] == "ours"


async def test_what_cannot_be_kept_is_not_gone_over(desk: Desk) -> None:
    """A name that leaves no room for its ending, as a disk without any."""
    long = "n" * 250
    desk.put(long, "first")
    await desk.editor().begin()
    desk.put(long, "ours")
    await desk.save_there(long, "theirs")
    sent = await desk.editor().begin()
    assert (await desk.files())[long] == "theirs"
    assert any("cannot be kept" in line for line in sent.said)


async def test_a_file_becomes_a_directory_and_a_directory_a_file(desk: Desk) -> None:
    desk.put("a", "file")
    desk.put("b/x", "in it")
    desk.put("b/y/z", "in it")
    editor = desk.editor()
    await editor.begin()
    watching = asyncio.create_task(follow(editor))
    try:
        await asyncio.sleep(0)
        (desk.root / "a").unlink()
        desk.put("a/one", "1")
        desk.put("a/two/three", "3")
        await desk.until(lambda files: set(files) == {"a/one", "a/two/three", "b/x", "b/y/z"})
        shutil.rmtree(desk.root / "b")
        desk.put("b", "a file now")
        await desk.until(
            lambda files: files.get("b") == "a file now" and not any(p.startswith("b/") for p in files)
        )
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_they_may_change_places_while_nobody_watches(desk: Desk) -> None:
    for n in range(30):
        desk.put(f"d/{n}", str(n))
    desk.put("f", "file")
    await desk.editor().begin()
    shutil.rmtree(desk.root / "d")
    (desk.root / "f").unlink()
    desk.put("d", "a file now")
    desk.put("f/x", "in it")
    sent = await desk.editor().begin()
    assert await desk.files() == {"d": "a file now", "f/x": "in it"}
    assert not sent.skipped


async def follow(editor: Editor) -> None:
    async with aclosing(editor.watch()) as sents:  # type: ignore[type-var]
        async for _ in sents:
            pass


async def test_a_file_with_a_directory_s_usual_name_is_followed(desk: Desk) -> None:
    desk.put("build", "#!/bin/sh\n")
    desk.put("src/build/x.ts", "1")
    editor = desk.editor()
    await editor.begin()
    watching = asyncio.create_task(follow(editor))
    try:
        desk.put("build", "#!/bin/sh\n# again\n")
        desk.put("src/build/x.ts", "2")
        await desk.until(lambda files: files == {"build": "#!/bin/sh\n# again\n", "src/build/x.ts": "2"})
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_the_rules_are_followed_as_they_change_and_said_once(desk: Desk) -> None:
    desk.put(".gitignore", "*.local\n")
    desk.put("a.local", "secret")
    desk.put("b.txt", "x")
    editor = desk.editor()
    sent = await editor.begin()
    assert sent.skipped == ("a.local: as git's ignore rules say (--include sends it)",)
    watching = asyncio.create_task(follow(editor))
    try:
        desk.put("c.local", "secret")
        desk.put(".gitignore", "c.local\n")
        await desk.until(lambda files: files.get("a.local") == "secret")
        assert "c.local" not in await desk.files()
        # What was sent and is left out by now stays, as it was sent, until it is gone.
        desk.put(".gitignore", "*.local\n")
        desk.put("a.local", "changed")
        (desk.root / "b.txt").unlink()
        await desk.until(lambda files: "b.txt" not in files)
        assert (await desk.files())["a.local"] == "secret"
        (desk.root / "a.local").unlink()
        await desk.until(lambda files: "a.local" not in files)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_secrets_are_sent_when_they_are_asked_for(desk: Desk) -> None:
    for path in (".env", "web/.env.local", "key.pem", ".npmrc", ".env.example", "sub/.git"):
        desk.put(path, "x")
    sent = await desk.editor().begin()
    assert set(await desk.files()) == {".env.example"}
    assert len(sent.skipped) == 1
    assert "secrets" in sent.skipped[0]
    assert "sub/.git" not in sent.skipped[0]
    await desk.editor(".env", ".env.local").begin()
    assert set(await desk.files()) == {".env.example", ".env", "web/.env.local"}


async def test_a_file_that_is_refused_costs_its_batch_a_few_commits(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(600):
        desk.put(f"src/{n:03}.ts", str(n))
    desk.put("package.json", "{}")
    await desk.local.sql(
        "create function public.no_301() returns trigger language plpgsql as $$ begin"
        " if new.file_path = 'src/301.ts' then raise exception 'no' using errcode = 'PT422';"
        " end if; return new; end $$;"
        " create trigger no_301 before insert on public.project_files for each row execute function public.no_301()"
    )
    saves = 0
    real = ProjectClient.save

    async def counted(self: ProjectClient, *arguments: Any) -> None:
        nonlocal saves
        saves += 1
        await real(self, *arguments)

    monkeypatch.setattr(ProjectClient, "save", counted)
    sent = await desk.editor().begin()
    assert sent.updated == 600
    assert [line for line in sent.skipped if line.startswith("src/301.ts")]
    assert saves < 25


KILLED = """
import asyncio, os, signal, sys, time, uuid
from pathlib import Path
import httpx
from orchestrator_stub.devstack import baseline
from orchestrator_stub.devstack.editor import Editor

async def main(url, key, token, project, root, kept):
    # The save is done, and the note of it is not: that is where the process is killed.
    baseline.Baseline.keep = lambda self: os.kill(os.getpid(), signal.SIGKILL)
    headers = {"apikey": key, "authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers) as http:
        await Editor(Path(root), uuid.UUID(project), http, Path(kept)).begin()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_save_that_was_undone_after_a_kill_is_undone_in_the_project(desk: Desk) -> None:
    desk.put("a.ts", "good")
    await desk.editor().begin()
    desk.put("a.ts", "broken")
    auth = desk.http.auth
    assert isinstance(auth, httpx.Auth)
    signed = next(auth.auth_flow(httpx.Request("GET", desk.local.url)))
    token = signed.headers["authorization"].removeprefix("Bearer ")
    killed = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", KILLED, desk.local.url, desk.local.keys.anon_key, token,
         str(desk.project_id), str(desk.root), str(desk.baseline)],
        check=False, timeout=60,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert await desk.files() == {"a.ts": "broken"}
    desk.put("a.ts", "good")
    await desk.editor().begin()
    assert await desk.files() == {"a.ts": "good"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few kilobytes, for the baseline."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine mounts nothing: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_a_full_disk_ends_no_watch_and_is_said(desk: Desk, small_disk: Path) -> None:
    desk.baseline = small_disk / "editor.json"
    desk.put("a.ts", "1")
    editor = desk.editor()
    await editor.begin()
    full = small_disk / "full"
    with full.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1024)):
            pass
    sents: list[Sent] = []

    async def collect() -> None:
        async for sent in editor.watch():
            sents.append(sent)

    watching = asyncio.create_task(collect())
    try:
        for n in range(2, 5):
            desk.put("a.ts", str(n))
            await desk.until(lambda files, n=n: files == {"a.ts": str(n)})  # type: ignore[misc]
        full.unlink()
        desk.put("a.ts", "last")
        await desk.until(lambda files: files == {"a.ts": "last"})
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    told = [line for sent in sents for line in sent.skipped]
    assert len([line for line in told if "No space" in line]) == 1
    assert not (await desk.editor().begin()).updated
