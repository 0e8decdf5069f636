"""A process that starts while its database is away, starting or recovering waits for it; a refusal ends it at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orchestrator_stub.__main__ import main
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.database import reached
from orchestrator_stub.platform.migrations import bootstrap, migrate
from orchestrator_stub.relay.accounts import Operator
from tests.orchestrator.test_serve import settings
from tests.ports import free_port
from tests.system.plane import eventually

DAY = 24 * 3600
"""Seconds: no test would see the end of such a wait."""

Captured = pytest.CaptureFixture[str]


class Restarted:
    """A PostgreSQL that stays in recovery for as long as the test wants: it restores what never comes."""

    def __init__(self, directory: Path) -> None:
        self.recovered = directory / "recovered"
        self.data = directory / "pg"
        until_told = f"until test -e {self.recovered}; do sleep 0.05; done; false"
        options = {"fsync": "off", "hot_standby": "off", "restore_command": until_told}
        self.server = EmbeddedPostgres(self.data, options=options)

    def recover(self) -> asyncio.Task[str]:
        """Start it in recovery; done when that is over, for which `recovered` must be there."""
        (self.data / "recovery.signal").touch()
        return asyncio.create_task(self.server.start())


@pytest.fixture
async def restarted() -> AsyncIterator[Restarted]:
    # A path that is short enough for a socket: the address is the same after each start.
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as directory:
        Path(directory).chmod(0o755)
        away = Restarted(Path(directory))
        yield away
        away.recovered.touch()
        await away.server.stop()


class Running:
    """A command of ours, and what it logs."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self._log = log

    def said(self) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def last_line(self) -> str:
        return self._log.read_text().splitlines()[-1]

    async def waits(self, why: str) -> None:
        async def it_does() -> bool:
            assert self.process.returncode is None, self._log.read_text()
            return any(line["event"] == "database.away" and why in line["reason"] for line in self.said())

        await eventually(f"it waits: {why}", it_does)


@asynccontextmanager
async def command(name: str, log: Path, **environ: str) -> AsyncIterator[Running]:
    with log.open("w") as lines:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orchestrator_stub", name,
            env={"PATH": os.environ["PATH"], "LOG_FORMAT": "json", **environ}, stderr=lines,
        )  # fmt: skip
    try:
        yield Running(process, log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def test_serve_waits_for_a_database_that_is_away_and_then_recovers(
    restarted: Restarted, tmp_path: Path
) -> None:
    dsn = await restarted.server.start()
    await bootstrap(dsn)
    await migrate(dsn)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as database:
        await database.execute("create role stranger login password 'hers'")
    await restarted.server.stop()
    rules = restarted.data / "pg_hba.conf"
    rules.write_text("local all stranger scram-sha-256\n" + rules.read_text())
    port = free_port()
    environ = settings(dsn, PORT=str(port), MACHINES_DIR=str(tmp_path / "machines"), TEMPLATE_DIR="")
    async with command("serve", tmp_path / "log", **environ) as serve:
        await serve.waits("No such file")
        starting = restarted.recover()
        await serve.waits("starting up")
        restarted.recovered.touch()
        await starting

        async def serving() -> bool:
            assert serve.process.returncode is None, serve.last_line()
            return any(line["event"] == "serving" for line in serve.said())

        await eventually("it serves", serving)
        async with httpx.AsyncClient(trust_env=False) as http:
            assert (await http.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
        # Once for each reason, however often it tried.
        assert sum(line["event"] == "database.away" for line in serve.said()) <= 3

        # A password that it refuses is believed, however long we would wait for the database itself.
        stranger = make_conninfo(dsn, user="stranger", password="not hers")
        async with asyncio.timeout(30):
            with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
                await reached(stranger, wait=DAY)


@pytest.mark.parametrize("name", ["serve", "relay"])
async def test_a_stop_ends_the_wait_at_once(name: str, tmp_path: Path) -> None:
    nowhere = f"postgresql://127.0.0.1:{free_port()}/x"
    async with command(name, tmp_path / "log", **environ_of(tmp_path, nowhere)) as process:
        await process.waits("refused")
        process.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.process.wait(), 15) == 0


@pytest.mark.parametrize("name", ["serve", "door", "relay"])
def test_a_database_that_nobody_made_ends_the_process_at_once(
    name: str, postgres_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    unknown = make_conninfo(postgres_dsn, dbname="nobody_made_it")
    for variable, value in environ_of(tmp_path, unknown).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        main([name])
    assert ended.value.code == 1
    said = capsys.readouterr().err.splitlines()
    assert "cannot reach the database" in said[-1]
    assert "nobody_made_it" in said[-1]
    assert not any("database.away" in line for line in said)


def environ_of(directory: Path, dsn: str) -> dict[str, str]:
    """What each of the three commands needs."""
    Operator().write(directory / "nats")
    return settings(
        dsn, PORT="0", PREVIEW_DOMAIN="preview.test", DOOR_KEYS="d:" + "A" * 43 + "=", DOOR_PORT="0",
        NATS_URL="nats://127.0.0.1:9", NATS_KEYS_FILE=str(directory / "nats" / "nats-keys.json"),
        DATABASE_WAIT=str(DAY),
    )  # fmt: skip
