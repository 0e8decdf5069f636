"""What the database takes, the agent takes, in the snapshot too that a new machine opens the project with.

One file that only one of them takes makes its whole project one that nobody can open. The numbers are in `limits.json`.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import orjson
import psycopg
import pytest

from agent.config import SnapshotLimits
from agent.core import model
from agent.core.errors import PathRefused
from agent.core.model import parse_path
from agent.fs.project_dir import ProjectDir
from agent.snapshot.download import Downloader
from orchestrator_stub.platform.ignore_rules import NEVER
from orchestrator_stub.platform.limits import (
    ARCHIVE_BYTES,
    FILE_BYTES,
    TOMBSTONE_BYTES,
    differences,
    manifest_bytes,
)
from orchestrator_stub.platform.source_files import path_problem
from orchestrator_stub.snapshots.availability import STORAGE_LIMIT
from tests.system.plane import Plane, Project, eventually, running_plane

LIMITS = json.loads((Path(__file__).parent / "limits.json").read_text())
PATH = LIMITS["path"]
SEGMENT = "s" * PATH["segment_bytes"]


def of_bytes(count: int) -> str:
    """A path of so many bytes in segments of two hundred."""
    return (("s" * 200 + "/") * count)[: count - 1] + "x"


AT_THE_LIMIT = {
    "bytes": of_bytes(PATH["bytes"]),
    "bytes, of two each": "/".join(["é" * 127] * 4) + "/ab",
    "segment": SEGMENT,
    "segment, of two each": "é" * (PATH["segment_bytes"] // 2) + "x",
    "segments": "/".join("d" * PATH["segments"]),
    "segments and bytes": "/".join(["d" * 15] * (PATH["segments"] - 1)) + "/" + "x" * 16,
    **{f"almost {name}": f"a/{name}x/b" for name in PATH["protected"]},
}
ONE_OVER = {
    "bytes": (of_bytes(PATH["bytes"] + 1), "too_long"),
    "segment": (f"a/{SEGMENT}s", "segment_too_long"),
    "segment, of two each": ("é" * (PATH["segment_bytes"] // 2 + 1), "segment_too_long"),
    "segments": ("/".join("d" * (PATH["segments"] + 1)), "too_deep"),
    "segments, by far": ("d/" * 400 + "x", "too_deep"),
    **{f"below {name}": (f"a/{name}/b", "protected") for name in PATH["protected"]},
}


def bitmap(width: int, height: int) -> bytes:
    """A white one, as a paint program saves it."""
    size = width * height * 3
    head = struct.pack("<2sIHHI", b"BM", 54 + size, 0, 0, 54)
    return (
        head
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, size, 2835, 2835, 0, 0)
        + b"\xff" * size
    )


BLANK = {
    "a blank bitmap": bitmap(2000, 1500),
    "zeros": b"0" * 9_000_000,
    "equal rows": b'{"id":1,"name":"Test User","email":"test@example.com","active":true},\n' * 130_000,
}


@pytest.fixture
async def plane(database: str, tmp_path: Path) -> AsyncIterator[Plane]:
    async with running_plane(database, tmp_path / "plane") as plane:
        yield plane


def test_the_agents_numbers_are_these() -> None:
    assert {
        "bytes": model.MAX_PATH_BYTES,
        "segment_bytes": model.MAX_SEGMENT_BYTES,
        "segments": model.MAX_SEGMENTS,
        "protected": sorted(model.PROTECTED),
    } == PATH
    for path in AT_THE_LIMIT.values():
        assert parse_path(path) == path
    for path, rule in ONE_OVER.values():
        with pytest.raises(PathRefused) as refused:
            parse_path(path)
        assert refused.value.rule == rule


def test_the_databases_are_too(database: str) -> None:
    with psycopg.connect(database) as connection:
        for path, wanted in [*((path, None) for path in AT_THE_LIMIT.values()), *ONE_OVER.values()]:
            (rule,) = connection.execute("select preview.path_problem(%s)", (path,)).fetchone() or ()
            assert rule == wanted, path


def test_what_make_dev_leaves_out_is_what_the_database_would_refuse() -> None:
    assert [path for path in AT_THE_LIMIT.values() if path_problem(path)] == []
    assert [
        rule
        for path, rule in ONE_OVER.values()
        if not (path_problem(path) or not NEVER.isdisjoint(path.split("/")))
    ] == []


async def opened(project: Project, directory: Path) -> dict[str, bytes]:
    """What a new machine reads from the snapshot it is given, file by file."""
    agent = await project.session(directory / "machine")
    disk = ProjectDir(directory / "project", directory / "staging")
    disk.open()
    try:
        async with httpx.AsyncClient(trust_env=False) as http:
            told = {
                name.lower(): value
                for name, value in agent.environ.items()
                if name.startswith("SNAPSHOT_MAX_")
            }
            limits = SnapshotLimits.model_validate(told)
            download = Downloader(disk, http, limits, str(project.id))
            snapshot = await download.fetch(agent.environ["SNAPSHOT_URL"])
        assert snapshot.staged.keys() == snapshot.manifest.files.keys()
        places = {path: directory / "staging" / name for path, name in snapshot.staged.items()}
        return {path: (at / path if at.is_dir() else at).read_bytes() for path, at in places.items()}
    finally:
        disk.clear_staging()
        disk.close()


async def test_a_project_of_all_that_is_at_the_limit_is_opened(plane: Plane, tmp_path: Path) -> None:
    project = await plane.project({})
    for path in AT_THE_LIMIT.values():
        await project.save(path, path)
    assert await opened(project, tmp_path) == {path: path.encode() for path in AT_THE_LIMIT.values()}


@pytest.mark.parametrize("case", ONE_OVER)
async def test_what_is_over_it_is_refused_when_it_is_saved(plane: Plane, tmp_path: Path, case: str) -> None:
    path, rule = ONE_OVER[case]
    project = await plane.project({"a.txt": "1"})
    answer = await plane.http.post(
        "/rest/v1/rpc/upsert_project_file",
        json={"project_uuid": str(project.id), "p_file_path": path, "p_content": "x"},
    )
    assert (answer.status_code, json.loads(answer.json()["details"])["rule"]) == (400, rule)
    assert await opened(project, tmp_path) == {"a.txt": b"1"}


@pytest.mark.parametrize(
    ("case", "as_binary"),
    [
        ("a blank bitmap", True),
        ("zeros", True),
        ("zeros", False),
        ("equal rows", True),
        ("equal rows", False),
    ],
)
async def test_what_packs_well_is_no_bomb(plane: Plane, tmp_path: Path, case: str, as_binary: bool) -> None:
    content = BLANK[case]
    project = await plane.project({})
    if as_binary:
        digest = hashlib.sha256(content).hexdigest()
        stored = await plane.http.post(
            f"/storage/v1/object/project-assets/{project.id}/{digest}", content=content
        )
        assert stored.is_success, stored.text
        change = {"file_path": "public/blank", "encoding": "base64", "content_hash": digest}
        await project.rpc("apply_project_files", changes=[change])
    else:
        await project.save("public/blank", content.decode())
    assert await opened(project, tmp_path) == {"public/blank": content}


LOGO = b"\x89PNG" + bytes(range(256))


async def with_an_asset(plane: Plane, content: bytes = LOGO) -> tuple[Project, str]:
    """A project with a text and a picture, and where the picture's bytes are in Storage."""
    project = await plane.project({"a.txt": "1"})
    digest = hashlib.sha256(LOGO).hexdigest()
    place = f"/storage/v1/object/project-assets/{project.id}/{digest}"
    assert (await plane.http.post(place, content=content)).is_success
    change = {"file_path": "logo.png", "encoding": "base64", "content_hash": digest}
    await project.rpc("apply_project_files", changes=[change])
    return project, place


async def spoil(plane: Plane, place: str, how: str) -> None:
    assert (await plane.http.delete(place)).is_success
    if how == "wrong_bytes":
        assert (await plane.http.post(place, content=LOGO[:-1] + b"x")).is_success


@pytest.mark.parametrize("how", ["lost", "wrong_bytes"])
async def test_a_file_whose_bytes_cannot_be_had_is_its_own_problem(
    plane: Plane, tmp_path: Path, how: str
) -> None:
    project, place = await with_an_asset(plane)
    await spoil(plane, place, how)
    assert await opened(project, tmp_path / "spoilt") == {"a.txt": b"1"}
    agent = await project.session(tmp_path / "agent")
    agent.start()
    try:

        async def problems() -> object:
            report = await agent.status()
            found = report and [
                (p["kind"], p["rule"], p["file_path"])
                for p in report["problems"]
                if p["kind"] != "nothing_to_serve"
            ]
            return report if found == [("content_unavailable", how, "logo.png")] else None

        await eventually("the file is named", problems)
        # A heartbeat compares no hash that nobody can have: no question follows.
        await project.save("b.txt", "2")

        async def landed() -> object:
            return agent.files() == {"a.txt": b"1", "b.txt": b"2"}

        await eventually("the next save lands", landed)
        assert (await agent.status() or {})["catch_up"] == []
        await plane.http.delete(place)
        assert (await plane.http.post(place, content=LOGO)).is_success
        async with await psycopg.AsyncConnection.connect(plane.dsn, autocommit=True) as connection:
            await connection.execute(
                "update preview.unavailable_content set found_at = found_at - interval '1 hour'"
            )
        fresh = tmp_path / "fresh"
        await project.save("c.txt", "3")
        assert await opened(project, fresh) == {"a.txt": b"1", "b.txt": b"2", "c.txt": b"3", "logo.png": LOGO}

        async def healed() -> object:
            report = await agent.status()
            kinds = {p["kind"] for p in report["problems"]} if report else set()
            return kinds == {"nothing_to_serve"} and agent.files().get("logo.png") == LOGO

        await eventually("the running agent has it too", healed, 30)
    finally:
        await agent.stop()


async def test_a_file_that_is_lost_while_an_agent_follows_holds_up_nothing(
    plane: Plane, tmp_path: Path
) -> None:
    """Its bytes go between the save and the question for them: the save after it arrives all the same."""
    project = await plane.project({"a.txt": "1"})
    agent = await project.session(tmp_path / "agent")
    agent.start()
    try:
        await agent.equal()
        assert agent.process is not None
        agent.process.send_signal(signal.SIGSTOP)
        digest = hashlib.sha256(LOGO).hexdigest()
        place = f"/storage/v1/object/project-assets/{project.id}/{digest}"
        assert (await plane.http.post(place, content=LOGO)).is_success
        change = {"file_path": "logo.png", "encoding": "base64", "content_hash": digest}
        await project.rpc("apply_project_files", changes=[change])
        await plane.http.delete(place)
        big = "x" * 300_000
        await project.save("big.txt", big)
        agent.process.send_signal(signal.SIGCONT)

        async def landed() -> object:
            report = await agent.status()
            found = report and [
                (p["kind"], p["file_path"]) for p in report["problems"] if p["kind"] != "nothing_to_serve"
            ]
            return agent.files().get("big.txt") == big.encode() and found == [
                ("content_unavailable", "logo.png")
            ]

        await eventually("the save after it lands, and the file is named", landed)
    finally:
        await agent.stop()


async def test_a_row_from_before_the_depth_was_bounded_is_its_own_problem(
    plane: Plane, tmp_path: Path
) -> None:
    project = await plane.project({"a.txt": "1", "deep.txt": "2", "e.txt": "3"})
    deep = "/".join("d" * (PATH["segments"] + 6))
    async with await psycopg.AsyncConnection.connect(plane.dsn, autocommit=True) as connection:
        await connection.execute("alter table public.project_files disable trigger all")
        names = await connection.execute(
            "select conname from pg_constraint where conrelid = 'public.project_files'::regclass and contype = 'c'"
        )
        for (name,) in await names.fetchall():
            await connection.execute(f'alter table public.project_files drop constraint "{name}"')
        await connection.execute(
            "update public.project_files set file_path = %s where file_path = 'deep.txt'", (deep,)
        )
    assert await opened(project, tmp_path) == {"a.txt": b"1", "e.txt": b"3"}


async def test_what_makes_an_archive_too_large_for_storage_is_left_out_of_it(
    plane: Plane, tmp_path: Path
) -> None:
    project, _ = await with_an_asset(plane)
    large = random.Random(1).randbytes(20_000)
    digest = hashlib.sha256(large).hexdigest()
    await plane.http.post(f"/storage/v1/object/project-assets/{project.id}/{digest}", content=large)
    change = {"file_path": "large.bin", "encoding": "base64", "content_hash": digest}
    await project.rpc("apply_project_files", changes=[change])
    async with await psycopg.AsyncConnection.connect(plane.dsn, autocommit=True) as connection:
        await connection.execute(
            "update storage.buckets set file_size_limit = 8000 where id = 'project-snapshots'"
        )
    assert await opened(project, tmp_path) == {"a.txt": b"1", "logo.png": LOGO}


async def test_texts_that_make_an_archive_too_large_are_left_out_and_are_back_when_there_is_room(
    plane: Plane, tmp_path: Path
) -> None:
    """Assets go first, then the largest texts: the rest of the project opens."""
    noise = {f"noise/{n}.txt": random.Random(n).randbytes(3000 + n).hex() for n in range(4)}
    project = await plane.project({"a.txt": "1", **noise, "z.txt": "2"})
    few = {"a.txt": b"1", "z.txt": b"2"}

    async def execute(statement: str) -> None:
        async with await psycopg.AsyncConnection.connect(plane.dsn, autocommit=True) as connection:
            await connection.execute(statement.encode())

    await execute("update storage.buckets set file_size_limit = 8000 where id = 'project-snapshots'")
    found = await opened(project, tmp_path / "small")
    assert few.items() <= found.items()
    assert 1 <= len(found.keys() & noise.keys()) < len(noise)
    await execute("update storage.buckets set file_size_limit = null where id = 'project-snapshots'")
    await execute("update preview.unavailable_content set found_at = found_at - interval '1 hour'")
    await project.save("b.txt", "3")
    everything = {path: content.encode() for path, content in noise.items()}
    assert await opened(project, tmp_path / "large") == {**few, "b.txt": b"3", **everything}


def test_every_limit_is_read_in_one_place_and_is_one_that_the_agent_takes(database: str) -> None:
    with psycopg.connect(database) as connection:
        limits = dict(connection.execute("select name, value from preview.limits").fetchall())
    numbers = {
        f"{of}.{name}": value for of, names in LIMITS.items() if of != "env" for name, value in names.items()
    }
    assert limits == {name: value for name, value in numbers.items() if isinstance(value, int)}
    assert differences(limits) == []
    reader = SnapshotLimits()
    assert reader.snapshot_max_file_bytes == FILE_BYTES >= max(limits["file.bytes"], limits["asset.bytes"])
    assert reader.snapshot_max_compressed_bytes == ARCHIVE_BYTES >= STORAGE_LIMIT
    manifest = manifest_bytes(limits["project.files"], limits["project.path_bytes"])
    assert reader.snapshot_max_entries >= limits["project.files"] + 1
    assert reader.snapshot_max_bytes >= limits["project.bytes"] + manifest
    assert reader.snapshot_max_manifest_bytes >= manifest


async def set_limits(plane: Plane, **limits: int) -> None:
    async with await psycopg.AsyncConnection.connect(plane.dsn, autocommit=True) as connection:
        for name, value in limits.items():
            await connection.execute(f"update preview.settings set {name} = %s".encode(), (value,))


async def test_a_project_as_large_as_may_be_is_opened_and_the_next_file_is_refused(
    plane: Plane, tmp_path: Path
) -> None:
    files = {"a.txt": "1", "b/c.txt": "22", "d.txt": "333"}
    await set_limits(
        plane, max_project_files=3, max_project_bytes=6, max_project_path_bytes=len("a.txtb/c.txtd.txt")
    )
    project = await plane.project(files)
    wanted = {path: content.encode() for path, content in files.items()}
    assert await opened(project, tmp_path / "at") == wanted
    for arguments, limit, would_be in (
        ({"p_file_path": "e", "p_content": ""}, "project.files", 4),
        ({"p_file_path": "a.txt", "p_content": "12"}, "project.bytes", 7),
    ):
        answer = await plane.http.post(
            "/rest/v1/rpc/upsert_project_file", json={"project_uuid": str(project.id), **arguments}
        )
        assert answer.status_code == 413, answer.text
        told = json.loads(answer.json()["details"])
        assert (told["limit"], told["would_be"], told["most"]) == (limit, would_be, would_be - 1)
        assert "Delete files first" in answer.json()["hint"]
    assert await opened(project, tmp_path / "still") == wanted


async def test_what_was_saved_under_a_larger_limit_is_opened_and_a_raised_one_reaches_the_next_machine(
    plane: Plane, tmp_path: Path
) -> None:
    project = await plane.project({"a": "1", "b": "22", "c": "333"})
    await set_limits(plane, max_project_files=1, max_project_bytes=1, max_project_path_bytes=1)
    assert await opened(project, tmp_path / "over") == {"a": b"1", "b": b"22", "c": b"333"}
    await set_limits(plane, max_project_files=70_000, max_file_bytes=2**27)
    agent = await project.session(tmp_path / "raised")
    assert agent.environ["SNAPSHOT_MAX_ENTRIES"] == "70001"
    assert agent.environ["SNAPSHOT_MAX_FILE_BYTES"] == str(2**27)


def test_a_manifest_of_the_longest_entries_is_as_long_as_was_said_at_most() -> None:
    entry = {
        "file_path": '"' * PATH["bytes"], "content_hash": "0" * 64, "size": 10**9, "version": 10**9, "executable": True
    }  # fmt: skip
    for count in (1, 1000):
        assert len(orjson.dumps({"files": [entry] * count})) <= (
            manifest_bytes(count, count * PATH["bytes"]) - TOMBSTONE_BYTES + len('{"files":[]}')
        )
