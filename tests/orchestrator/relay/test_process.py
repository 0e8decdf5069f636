"""The commands: keys are made, a server takes them, relays are started, killed and stopped."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from orchestrator_stub.relay.accounts import OUT, NatsKeys
from orchestrator_stub.relay.embedded import EmbeddedNats
from tests.database.db import Project, acting_as, connect, make_project, upsert
from tests.orchestrator.relay.nats_world import Heard, client, settled, stream_owner, until

Db = psycopg.Connection[Any]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orchestrator_stub", *words]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


class Files:
    """What `nats-keys` wrote, as a server is given it."""

    def __init__(self, directory: Path) -> None:
        made = run("nats-keys", str(directory))
        assert made.returncode == 0, made.stderr
        assert made.stdout.count("\n") == 3
        self.directory = directory
        self.keys = NatsKeys.read(directory / "nats-keys.json")

    def accounts_conf(self) -> str:
        """Included, as docs/transports.md says."""
        return 'include "../keys/accounts.conf"\n'


def relay_of(dsn: str, url: str, files: Files) -> subprocess.Popen[bytes]:
    environment = {
        "DATABASE_URL": dsn,
        "NATS_URL": url,
        "NATS_KEYS_FILE": str(files.directory / "nats-keys.json"),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator_stub", "relay"],
        env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def save(dsn: str, projects: list[Project], until_: float, pause: float = 0.0) -> dict[str, list[str]]:
    """Save all projects in turn until that moment (monotonic seconds); the revisions of each."""
    made: dict[str, list[str]] = defaultdict(list)
    with connect(dsn) as db:
        for project in itertools.cycle(projects):
            with acting_as(db, "authenticated", sub=project.owner):
                revision = upsert(db, project.id, f"f{len(made) % 5}", uuid4().hex)["revision"]
            made[str(project.id)].append(str(revision))
            if time.monotonic() > until_:
                return made
            time.sleep(pause)
    raise AssertionError


def with_nats(dsn: str, number: int) -> list[Project]:
    with connect(dsn) as db:
        db.execute("update preview.settings set transport = 'nats', writes_per_minute = 1000000")
        return [make_project(db) for _ in range(number)]


def waiting(dsn: str) -> int:
    with connect(dsn) as db:
        return db.execute("select from preview.outbox").rowcount


async def test_a_relay_is_started_with_keys_of_the_command_and_stopped(database: str, tmp_path: Path) -> None:
    files = Files(tmp_path / "keys")
    again = run("nats-keys", str(tmp_path / "keys"))
    assert (again.returncode, "File exists" in again.stderr) == (1, True)
    server = EmbeddedNats(tmp_path / "server", operator=files)  # type: ignore[arg-type]
    await server.start()
    projects = with_nats(database, 1)
    relay = relay_of(database, server.url, files)
    try:
        heard = Heard()
        async with client(server.url, stream_owner(server)) as listener:
            await listener.subscribe(f"{OUT}*", cb=heard.take)
            await settled(listener)
            made = await asyncio.to_thread(save, database, projects, time.monotonic())
            await until(lambda: heard.by_project == made, "the event")
        relay.send_signal(signal.SIGTERM)
        _, said = await asyncio.to_thread(relay.communicate, timeout=20)
        assert relay.returncode == 0, said
        assert b"seed" not in said
        assert files.keys.preview.signing.seed.encode() not in said
    finally:
        relay.kill()
        await asyncio.to_thread(relay.communicate)
        await server.stop()


def test_what_is_missing_is_named(database: str, tmp_path: Path) -> None:
    environment = {"DATABASE_URL": database, "NATS_URL": "", "NATS_KEYS_FILE": str(tmp_path / "none.json")}
    missing = run("relay", **environment)
    assert (missing.returncode, missing.stderr) == (
        64, "preview-orchestrator: NATS_URL is needed: it is where events go\n"
    )  # fmt: skip
    unread = run("relay", **{**environment, "NATS_URL": "nats://127.0.0.1:1"})
    assert unread.returncode == 1
    assert "NATS_KEYS_FILE: cannot read" in unread.stderr
    wrong = run("relay", **{**environment, "NATS_URL": "nats://user:secret@h:1"})
    assert wrong.returncode == 64
    assert "secret" not in wrong.stderr


@pytest.mark.nightly
async def test_kills_of_relays_and_of_the_server_lose_double_and_reorder_nothing(
    database: str, tmp_path: Path
) -> None:
    """Two relays, of which one is killed every second, a server that is killed once, and saves all the while."""
    files = Files(tmp_path / "keys")
    server = EmbeddedNats(tmp_path / "server", operator=files)  # type: ignore[arg-type]
    await server.start()
    projects = with_nats(database, 40)
    relays = [relay_of(database, server.url, files) for _ in range(2)]
    try:
        heard = Heard()
        saving = asyncio.create_task(
            asyncio.to_thread(save, database, projects, time.monotonic() + 20, 0.002)
        )
        killed = 0
        for turn in range(12):
            listener = client(server.url, stream_owner(server))
            async with listener as connected:
                # Each time anew, from what the stream has: the killed server's own subscribers are cut off.
                await connected.subscribe(f"{OUT}*", cb=heard.take)
                await settled(connected)
                await asyncio.sleep(1.2)
                if turn == 6:
                    await server.kill()
                    await asyncio.sleep(0.5)
                    await server.start(keep=True)
                    continue
                victim = relays[turn % 2]
                victim.kill()
                await asyncio.to_thread(victim.communicate)
                killed += 1
                relays[turn % 2] = relay_of(database, server.url, files)
                await settled(connected)
        async with client(server.url, stream_owner(server)) as connected:
            await connected.subscribe(f"{OUT}*", cb=heard.take)
            await settled(connected)
            made = await saving
            await until(lambda: waiting(database) == 0, "the outbox to be empty", 60)
            await settled(connected)
            state = (await connected.jetstream().stream_info("PREVIEW")).state
    finally:
        for relay in relays:
            with suppress(ProcessLookupError):
                relay.kill()
            await asyncio.to_thread(relay.communicate)
        await server.stop()
    assert killed == 11
    total = sum(map(len, made.values()))
    assert state.last_seq == total, "stored once each: none missing, none doubled"
    for project, revisions in heard.by_project.items():
        numbers = [int(revision) for revision in revisions]
        assert numbers == sorted(set(numbers)), f"{project} was heard out of order or doubled"
