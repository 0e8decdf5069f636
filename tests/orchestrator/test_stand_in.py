"""`preview-orchestrator stand-in` and `secrets`, as processes: what a deployment on one machine runs."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from orchestrator_stub.__main__ import main
from orchestrator_stub.door.passes import door_keys
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.migrations import read_migrations
from orchestrator_stub.platform.sealing import SealingKeys
from orchestrator_stub.platform.tokens import Keyring
from tests.orchestrator.test_serve import SECRET
from tests.system.plane import eventually

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "deploy" / ".env.example").read_text()


class Ended(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command of `preview-orchestrator` with a standard input and an environment of its own."""

    def run(name: str, text: str = "", **environ: str) -> Ended:
        for variable in ("DATABASE_URL", "SUPABASE_JWT_SECRET", "PORT"):
            monkeypatch.delenv(variable, raising=False)
        for variable, value in environ.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        with pytest.raises(SystemExit) as ended:
            main([name])
        said = capsys.readouterr()
        return Ended(int(str(ended.value.code)), said.out, said.err)

    return run


def values(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def test_the_secrets_are_filled_in_and_fit_together(command: Command) -> None:
    done = command("secrets", EXAMPLE)
    assert done.code == 0
    made, before = values(done.out), values(EXAMPLE)
    keys = ProjectKeys.of(Keyring.from_secret(made["SUPABASE_JWT_SECRET"]))
    assert (made["SUPABASE_ANON_KEY"], made["SUPABASE_SERVICE_ROLE_KEY"]) == (keys.anon_key, keys.service_key)
    assert SealingKeys.read(made["RUN_SETTINGS_KEYS"])
    assert door_keys(made["DOOR_KEYS"])
    assert made["DOOR_KEYS"] != made["RUN_SETTINGS_KEYS"]
    assert {name for name, value in made.items() if value != before[name]} == {
        "SUPABASE_JWT_SECRET", "SUPABASE_ANON_KEY", "SUPABASE_SERVICE_ROLE_KEY", "RUN_SETTINGS_KEYS", "DOOR_KEYS",
    }  # fmt: skip
    # What is there stays, comments too; and two are never the same.
    assert command("secrets", done.out).out == done.out
    assert values(command("secrets", EXAMPLE).out)["SUPABASE_JWT_SECRET"] != made["SUPABASE_JWT_SECRET"]


def test_keys_are_made_for_the_secret_that_is_given(command: Command) -> None:
    secret = SECRET.replace(" ", "-")
    made = values(command("secrets", f"SUPABASE_JWT_SECRET={secret}\nSUPABASE_ANON_KEY=\n").out)
    assert made["SUPABASE_ANON_KEY"] == ProjectKeys.of(Keyring.from_secret(secret)).anon_key
    refused = command("secrets", "SUPABASE_JWT_SECRET=short\nSUPABASE_ANON_KEY=\n")
    assert (refused.code, refused.out) == (1, "")
    assert "the JWT secret has 5 bytes" in refused.err


def test_every_setting_that_is_missing_is_said(command: Command) -> None:
    done = command("stand-in")
    assert done.code == 64
    assert [line.split(": ")[1] for line in done.err.splitlines()] == ["DATABASE_URL", "SUPABASE_JWT_SECRET"]


def test_a_secret_that_is_too_short_is_one_sentence(command: Command) -> None:
    done = command("stand-in", DATABASE_URL="postgresql:///x", SUPABASE_JWT_SECRET="short", PORT="0")
    assert done.code == 1
    assert done.err.startswith("preview-orchestrator: SUPABASE_JWT_SECRET: the JWT secret has 5 bytes")


@pytest.fixture
async def postgres(tmp_path: Path) -> AsyncIterator[EmbeddedPostgres]:
    """A PostgreSQL that nobody has used yet."""
    server = EmbeddedPostgres(tmp_path / "pg", options={"fsync": "off"})
    yield server
    await server.stop()


async def test_it_waits_for_its_database_makes_the_schema_and_serves(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    dsn = await postgres.start()
    await postgres.stop()
    environ = {
        "PATH": os.environ["PATH"], "DATABASE_URL": dsn, "SUPABASE_JWT_SECRET": SECRET, "PORT": "0",
        "STORAGE_DIR": str(tmp_path / "storage"),
    }  # fmt: skip
    lines = (tmp_path / "log").open("w+")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator_stub", "stand-in", env=environ, stderr=lines
    )

    async def serving() -> str:
        assert process.returncode is None, (tmp_path / "log").read_text()
        said = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
        return next((line["address"] for line in said if line["event"] == "serving"), "")

    async def is_bound() -> bool:
        return "stand-in" in Path(f"/proc/{process.pid}/cmdline").read_text()

    try:
        await eventually("it was started", is_bound)
        await postgres.start()
        address = await eventually("it serves", serving)
        *_, line = (json.loads(each) for each in (tmp_path / "log").read_text().splitlines())
        migrations = read_migrations(ROOT / "supabase" / "migrations")
        assert line["migrations_applied"] == len(migrations)
        keys = ProjectKeys.of(Keyring.from_secret(SECRET))
        headers = {"apikey": keys.anon_key, "Authorization": f"Bearer {keys.service_key}"}
        async with httpx.AsyncClient(base_url=f"http://{address}", headers=headers, trust_env=False) as http:
            assert (await http.get("/livez")).json() == {"alive": True}
            buckets = {bucket["name"] for bucket in (await http.get("/storage/v1/bucket")).json()}
            assert "project-assets" in buckets
            assert (await http.get("/rest/v1/projects", params={"select": "id"})).json() == []
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        assert SECRET not in (tmp_path / "log").read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        lines.close()
