"""The embedded PostgreSQL: real starts, real stops, and what happens when either goes wrong."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from orchestrator_stub.local_supabase.postgres import SYSTEM_USER, EmbeddedPostgres, EmbeddedPostgresError

FAST = {"fsync": "off"}
LONG = "select count(*) from generate_series(1, 6000000) n where n % 7 = 3"


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data directory that a server made, and left in order; copied for each test."""
    with tempfile.TemporaryDirectory(prefix="preview-test-pg-") as directory:
        data = Path(directory) / "data"
        server = EmbeddedPostgres(data, options=FAST)

        async def once() -> None:
            async with server as dsn, await psycopg.AsyncConnection.connect(dsn) as db:
                await db.execute("create table kept (word text)")
                await db.execute("insert into kept values ('still here')")

        asyncio.run(once())
        yield data


@pytest.fixture
def data(made: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="preview test pg ") as directory:
        copy = (
            Path(directory) / "a directory with spaces and a name too long for a Unix socket's" / ("d" * 60)
        )
        shutil.copytree(made, copy)
        for path in [copy, *copy.rglob("*")]:
            shutil.chown(path, *_ids(made))
        yield copy


def _ids(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid


def wait_for(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


async def test_data_is_kept_and_nothing_else_is_left(data: Path) -> None:
    server = EmbeddedPostgres(data, options=FAST)
    dsn = await server.start()
    pid = server.pid
    assert pid is not None
    sockets = Path(str(conninfo_to_dict(dsn)["host"]))
    assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    async with await psycopg.AsyncConnection.connect(dsn) as db:
        assert await (await db.execute("select word from kept")).fetchone() == ("still here",)
        assert await (await db.execute("show listen_addresses")).fetchone() == ("",)
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert {part.split(b"=")[0] for part in environment.split(b"\0") if part} == {b"PATH", b"LC_ALL", b"TZ"}
    expected = SYSTEM_USER if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    assert pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_name == expected
    assert os.getpgid(pid) != os.getpgid(0), "Ctrl-C in our terminal must not reach it"
    with pytest.raises(EmbeddedPostgresError, match="started already"):
        await server.start()
    await server.stop()
    await server.stop()
    assert not runs(pid)
    assert not sockets.exists()
    assert not (data / "postmaster.pid").exists()
    with pytest.raises(EmbeddedPostgresError, match="not started"):
        server.dsn()


async def test_a_session_in_the_middle_of_something_does_not_hold_up_the_stop(data: Path) -> None:
    server = EmbeddedPostgres(data, options=FAST)
    db = await psycopg.AsyncConnection.connect(await server.start())
    await db.execute("insert into kept values ('never committed')")
    began = time.monotonic()
    await server.stop()
    assert time.monotonic() - began < 30, "it waited for the session"
    await db.close()


async def test_it_starts_again_after_it_was_killed(data: Path) -> None:
    server = EmbeddedPostgres(data, options=FAST)
    dsn = await server.start()
    busy = await psycopg.AsyncConnection.connect(dsn)
    working = asyncio.create_task(
        busy.execute(LONG)
    )  # its process outlives the kill: it is too busy to notice

    def works() -> bool:
        with psycopg.connect(dsn) as other:
            seen = other.execute(
                "select 1 from pg_stat_activity where pid = %s and state = 'active' and query = %s",
                [busy.info.backend_pid, LONG],
            )
            return seen.fetchone() is not None

    await asyncio.to_thread(wait_for, works)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    await server.stop()
    dsn = await server.start()
    await asyncio.wait([working])
    await busy.close()
    async with await psycopg.AsyncConnection.connect(dsn) as db:
        assert await (await db.execute("select word from kept")).fetchone() == ("still here",)
    await server.stop()


PARENT = """
import asyncio, sys
from pathlib import Path
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
async def main():
    server = EmbeddedPostgres(Path(sys.argv[1]), options={"fsync": "off"})
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_it_goes_down_in_order_when_we_are_killed(data: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(data), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    assert runs(pid)
    parent.kill()
    await parent.wait()
    await asyncio.to_thread(wait_for, lambda: not runs(pid))
    assert not (data / "postmaster.pid").exists(), "a clean shutdown removes its lock file"
    async with EmbeddedPostgres(data, options=FAST) as dsn, await psycopg.AsyncConnection.connect(dsn) as db:
        assert await (await db.execute("select word from kept")).fetchone() == ("still here",)


async def test_a_data_directory_in_use_is_refused(data: Path) -> None:
    async with EmbeddedPostgres(data, options=FAST):
        second = EmbeddedPostgres(data, options=FAST)
        with pytest.raises(EmbeddedPostgresError, match=r"postmaster\.pid"):
            await second.start()
        assert second.pid is None


async def test_another_major_version_is_refused(data: Path) -> None:
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedPostgresError, match="made by PostgreSQL 16, this is 18"):
        await EmbeddedPostgres(data).start()


async def test_a_setting_that_is_none_is_told_with_the_servers_words(data: Path) -> None:
    server = EmbeddedPostgres(data, options={"shared_buffers": "none"})
    with pytest.raises(EmbeddedPostgresError, match="shared_buffers"):
        await server.start()
    assert server.pid is None


async def test_somebody_elses_directory_is_left_alone() -> None:
    with tempfile.TemporaryDirectory(prefix="preview-test-pg-") as directory:
        data = Path(directory) / "data"
        data.mkdir()
        (data / "something").write_text("of somebody else's")
        with pytest.raises(EmbeddedPostgresError, match="exists but is not empty"):
            await EmbeddedPostgres(data).start()
        assert (data / "something").exists()
        assert data.stat().st_uid == os.geteuid()
        shutil.rmtree(data)
        draft = data.with_name("data.new")  # what an interrupted start leaves
        draft.mkdir()
        (draft / "PG_VERSION").write_text("18\n")
        async with EmbeddedPostgres(data, options=FAST) as dsn:
            psycopg.connect(dsn).close()
            assert conninfo_to_dict(dsn)["host"] == str(data), "a short name: no directory beside it"
        assert not draft.exists()
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        assert not list(data.glob(".s.PGSQL*"))
