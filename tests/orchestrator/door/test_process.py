"""The door as a process: inside `serve`, and alone with nothing but the database and its keys."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import httpx
import psycopg
import pytest

from orchestrator_stub.config import DoorSettings, SettingsError
from orchestrator_stub.process import CannotServe
from orchestrator_stub.server.control_plane import door_keyring
from tests.orchestrator.door.world import KEYS
from tests.orchestrator.test_serve import settings
from tests.ports import free_port


def run(command: str, environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator_stub", command],
        env={"PATH": os.environ["PATH"], **environ}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def door_environ(dsn: str, port: int) -> dict[str, str]:
    return {"DATABASE_URL": dsn, "PREVIEW_DOMAIN": "preview.test", "DOOR_KEYS": KEYS, "DOOR_PORT": str(port)}


def label_of(dsn: str) -> str:
    """The name of a project whose session is being started."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("insert into auth.users (id) values (gen_random_uuid())")
        connection.execute(
            "insert into public.user_profiles (id) select id from auth.users on conflict do nothing"
        )
        made = connection.execute(
            "insert into public.projects (owner_id) select id from auth.users returning id"
        )
        project = made.fetchone()
        assert project is not None
        connection.execute(
            "insert into preview.sessions (project_id, state, expires_at, run)"
            " select %s, 'provisioning', now() + interval '1 hour', '{\"plain\": {\"public\": true}, \"sealed\": {}}'"
            " where preview.give_head(%s)", (project[0], project[0]),
        )  # fmt: skip
        found = connection.execute("select preview.door_label(%s)", project).fetchone()
        assert found is not None
        return str(found[0])


@pytest.mark.parametrize("command", ["door", "serve"])
def test_it_opens_and_stops_in_order(dsn: str, command: str) -> None:
    port, metrics = free_port(), free_port()
    environ = door_environ(dsn, port) | {"LOG_FORMAT": "json"}
    if command == "serve":
        environ = settings(dsn, **environ, PORT=str(metrics), MACHINE_DRIVER="local", TEMPLATE_DIR="")
    else:
        environ["DOOR_METRICS_PORT"] = str(metrics)
    process = run(command, environ)
    host = f"{label_of(dsn)}.preview.test"
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                if httpx.get(f"http://127.0.0.1:{port}/.preview-door/livez", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.05)
        page = httpx.get(f"http://127.0.0.1:{port}/", headers={"Host": host, "Accept": "text/html"})
        assert "Starting your preview" in page.text
        told = httpx.get(f"http://127.0.0.1:{metrics}/metrics").text
        assert 'preview_orchestrator_door_requests_total{outcome="waiting"} 1.0' in told
        with httpx.stream(
            "GET", f"http://127.0.0.1:{port}/.preview-door/events", headers={"Host": host}
        ) as events:
            assert next(events.iter_lines()).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("DATABASE_URL", "DATABASE_URL"),
        ("PREVIEW_DOMAIN", "PREVIEW_DOMAIN is needed"),
        ("DOOR_KEYS", "DOOR_KEYS is needed"),
    ],
)
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, missing: str, said: str) -> None:
    """Of a door alone; it needs no key of Supabase's."""
    for name, value in door_environ("postgresql://127.0.0.1:1/x", 1).items():
        monkeypatch.setenv(name, value)
    assert door_keyring(DoorSettings.from_environment()).signer() is not None
    monkeypatch.delenv(missing)
    with pytest.raises(SettingsError) as raised:
        DoorSettings.from_environment()
    assert [said in each for each in raised.value.problems] == [True]


def test_a_domain_and_keys_that_are_none_are_said() -> None:
    given = {"database_url": "postgresql://127.0.0.1:1/x", "door_keys": "a:c2VjcmV0"}
    for domain in ("https://preview.test", "Preview.test", "*.preview.test", "preview.test/", "preview test"):
        with pytest.raises(ValueError, match="host name"):
            DoorSettings(preview_domain=domain, **given)
    with pytest.raises(CannotServe, match="DOOR_KEYS") as raised:
        door_keyring(DoorSettings(preview_domain="preview.test", **given))
    assert "c2VjcmV0" not in str(raised.value)
