"""`preview-orchestrator serve` and `migrate` as processes: settings, health, numbers, and a stop in order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from uuid import uuid4

import httpx
import psycopg
import pytest

from orchestrator_stub.http.openapi import openapi_document
from orchestrator_stub.platform.migrations import read_migrations
from orchestrator_stub.platform.tokens import Keyring
from tests.orchestrator.sessions.control_world import SERVICE_KEY, bearer
from tests.ports import free_port

SECRET = "a secret of at least thirty-two bytes, for the tests"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator_stub", *arguments],
        env={"PATH": os.environ["PATH"], **environ}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def settings(dsn: str, **changed: str) -> dict[str, str]:
    return {
        "DATABASE_URL": dsn,
        "SUPABASE_URL": "http://127.0.0.1:9",
        "SUPABASE_ANON_KEY": "sb_publishable_x",
        "SUPABASE_SERVICE_ROLE_KEY": SERVICE_KEY,
        "SUPABASE_JWT_SECRET": SECRET,
        **changed,
    }


def write_keys(path: Path, *names: str) -> None:
    """A key set of HS256 keys, the first of which signs, each made of its name."""
    keys = [{"kty": "oct", "alg": "HS256", "kid": n, "k": f"{n:x<43}"} for n in names]
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"keys": keys}))
    draft.rename(path)


def user_token(key: str) -> dict[str, str]:
    """A user's token, signed with this key of `write_keys`."""
    ring = Keyring.from_jwks({"keys": [{"kty": "oct", "kid": key, "k": f"{key:x<43}"}]})
    claims = {"role": "authenticated", "sub": str(uuid4()), "exp": time.time() + 60}
    return bearer(ring.sign(claims))


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def storage() -> Iterator[socket.socket]:
    """A Storage that takes what is sent and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


@pytest.fixture
def service(
    database: str, port: int, tmp_path: Path, storage: socket.socket
) -> Iterator[subprocess.Popen[str]]:
    environ = settings(
        database,
        PORT=str(port),
        MACHINES_DIR=str(tmp_path / "machines"),
        LOG_FORMAT="json",
        SUPABASE_URL=f"http://127.0.0.1:{storage.getsockname()[1]}",
        CREATE_WAIT="1.5",
        TEMPLATE_DIR=str(tmp_path / "empty"),
    )
    (tmp_path / "empty").mkdir()
    keys = tmp_path / "keys.json"
    write_keys(keys, "first")
    del environ["SUPABASE_JWT_SECRET"]
    environ["JWT_KEYS_FILE"] = str(keys)
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator_stub", "serve"],
        env={"PATH": os.environ["PATH"], **environ}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                break
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def test_it_serves_is_watched_and_stops_in_order(
    service: subprocess.Popen[str], port: int, tmp_path: Path
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:
        assert http.get("/livez").json() == {"alive": True}
        assert http.get("/v1/sessions").status_code == 401
        assert http.get("/v1/sessions", headers=bearer(SERVICE_KEY)).json() == {"sessions": []}
        assert http.get("/openapi.json").json() == openapi_document()
        metrics = http.get("/metrics").text
    assert (
        'preview_orchestrator_requests_total{method="GET",route="/v1/sessions",status="401"} 1.0' in metrics
    )
    assert 'preview_orchestrator_sessions{state="ready"} 0.0' in metrics
    assert "snapshot_build_seconds" in metrics
    service.send_signal(signal.SIGTERM)
    assert service.wait(timeout=15) == 0
    assert service.stderr is not None
    said = service.stderr.read()
    assert f'"template": "{tmp_path / "empty"}"' in said
    assert SERVICE_KEY not in said
    assert SECRET not in said


def test_keys_are_rotated_without_a_restart(
    service: subprocess.Popen[str], port: int, tmp_path: Path
) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:

        def known(key: str) -> bool:
            # 403: believed, and told that a user lists the sessions of one project.
            return {403: True, 401: False}[http.get("/v1/sessions", headers=user_token(key)).status_code]

        assert (known("first"), known("second")) == (True, False)
        write_keys(tmp_path / "keys.json", "second", "first")
        assert (known("first"), known("second")) == (True, True)
        write_keys(tmp_path / "keys.json", "second")
        assert (known("first"), known("second")) == (False, True)
        (tmp_path / "keys.json").write_text("half a key s")
        assert known("second"), "a torn file is not believed"


def test_a_key_that_cannot_be_used_is_said_and_keeps_no_other_alive(
    service: subprocess.Popen[str], port: int, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as http:

        def told(kind: str) -> bool:
            return f'preview_orchestrator_key_problems{{kind="{kind}"}} 1.0' in http.get("/metrics").text

        keys = {
            "keys": [{"kty": "oct", "kid": "second", "k": f"{'second':x<43}"}, {"kty": "RSA", "kid": "r"}]
        }
        assert not told("skipped")
        draft = tmp_path / "draft"
        draft.write_text(json.dumps(keys))
        draft.rename(path)
        # The scrape looks by itself: nobody has shown a token yet.
        assert told("skipped")
        assert http.get("/v1/sessions", headers=user_token("first")).status_code == 401
        assert http.get("/v1/sessions", headers=user_token("second")).status_code == 403
        path.write_text("half a key s")
        assert told("unread")
        assert http.get("/v1/sessions", headers=user_token("second")).status_code == 403
    service.send_signal(signal.SIGTERM)
    assert service.wait(timeout=15) == 0
    assert service.stderr is not None
    lines = [json.loads(line) for line in service.stderr.read().splitlines()]
    assert [(x["event"], x["level"]) for x in lines if x["event"].startswith("keys.")] == [
        ("keys.skipped", "error"), ("keys.unread", "error"),
    ]  # fmt: skip


def test_a_request_under_way_is_answered_before_the_stop(
    service: subprocess.Popen[str], port: int, database: str, storage: socket.socket
) -> None:
    user, project = uuid4(), uuid4()
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("insert into auth.users (id) values (%s)", (user,))
        connection.execute("insert into public.user_profiles (id) values (%s)", (user,))
        connection.execute("insert into public.projects (id, owner_id) values (%s, %s)", (project, user))
    with ThreadPoolExecutor() as threads:
        url, body = f"http://127.0.0.1:{port}/v1/sessions", {"project_id": str(project)}
        asked = threads.submit(httpx.post, url, json=body, headers=bearer(SERVICE_KEY), timeout=15)
        upload, _ = storage.accept()
        # The snapshot is being uploaded, and the request waits for it.
        service.send_signal(signal.SIGTERM)
        answer = asked.result()
        upload.close()
    assert answer.status_code == 201, answer.text
    assert answer.json()["state"] == "provisioning"
    assert service.wait(timeout=15) == 0
    with psycopg.connect(database, autocommit=True) as connection:
        rows = connection.execute("select state, machine_id from preview.sessions").fetchall()
    assert rows == [("provisioning", None)], "another orchestrator goes on from here"


def test_every_bad_setting_is_named_at_once() -> None:
    ended = run("serve", SUPABASE_URL="not a url", PORT="70000", MACHINE_DRIVER="cloud", SERVICE="x")
    assert ended.returncode == 64
    lines = ended.stderr.splitlines()
    for name in ("DATABASE_URL", "SUPABASE_URL", "SUPABASE_ANON_KEY", "SUPABASE_SERVICE_ROLE_KEY", "PORT",
                 "MACHINE_DRIVER"):  # fmt: skip
        assert sum(line.startswith(f"preview-orchestrator: {name}:") for line in lines) == 1, name
    assert "Traceback" not in ended.stderr


def test_fly_needs_its_settings() -> None:
    environ = settings("postgresql:///x", MACHINE_DRIVER="fly")
    del environ["SUPABASE_JWT_SECRET"]
    ended = run("serve", **environ)
    assert ended.returncode == 64
    for name in ("FLY_API_TOKEN", "FLY_APP", "SUPABASE_JWT_SECRET or JWT_KEYS_FILE"):
        assert name in ended.stderr


def test_what_cannot_be_reached_is_one_clear_line(port: int, tmp_path: Path) -> None:
    nowhere = settings(f"postgresql://127.0.0.1:{port}/x?connect_timeout=2", PORT="0", DATABASE_WAIT="0")
    ended = run("serve", **nowhere)
    assert ended.returncode == 1
    assert "cannot reach the database" in ended.stderr.splitlines()[-1]
    short = run("serve", **{**nowhere, "SUPABASE_JWT_SECRET": "short"})
    assert "JWT" in short.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = run("serve", **{**nowhere, "PORT": str(taken.getsockname()[1])})
    assert "cannot listen" in busy.stderr
    for each in (ended, short, busy):
        assert "Traceback" not in each.stderr
        assert each.returncode == 1


def test_a_database_without_the_migrations_is_one_clear_line(blank: str, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("drop table preview.installation")
    for dsn in (blank, database):
        ended = run("serve", **settings(dsn, PORT="0"))
        assert ended.returncode == 1
        assert "preview-orchestrator migrate" in ended.stderr.splitlines()[-1]
        assert "Traceback" not in ended.stderr


def test_migrate_makes_a_plain_database_ours(postgres_dsn: str) -> None:
    name = f"plain_{os.getpid()}"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        server.execute(f"create database {name}".encode())
        dsn = psycopg.conninfo.make_conninfo(postgres_dsn, dbname=name)
        try:
            first = run("migrate", "--bootstrap", DATABASE_URL=dsn)
            assert first.returncode == 0, first.stderr
            assert len(first.stdout.splitlines()) == len(
                read_migrations(Path(__file__).parents[2] / "supabase" / "migrations")
            )
            again = run("migrate", "--database-url", dsn)
            assert again.stdout == "nothing to apply\n"
        finally:
            server.execute(f"drop database {name} with (force)".encode())
    assert run("migrate").returncode == 64
    gone = run("migrate", "--database-url", dsn)
    assert gone.returncode == 1
    assert len(gone.stderr.splitlines()) == 1


def test_the_document_names_every_route_and_resolves() -> None:
    document = openapi_document()
    assert {(path, method) for path, item in document["paths"].items() for method in item} == {
        ("/v1/sessions", "post"), ("/v1/sessions", "get"), ("/v1/sessions/{session_id}", "get"),
        ("/v1/sessions/{session_id}", "delete"), ("/v1/sessions/{session_id}/snapshot", "post"),
        ("/v1/sessions/{session_id}/suspend", "post"), ("/v1/sessions/{session_id}/wake", "post"),
        ("/v1/sessions/{session_id}/sync", "post"), ("/v1/sessions/{session_id}/token", "post"),
        ("/v1/sessions/{session_id}/door", "post"), ("/v1/sessions/{session_id}/door/revoke", "post"),
        ("/v1/sessions/{session_id}/status", "put"), ("/v1/sessions/{session_id}/run", "get"),
        ("/v1/sessions/{session_id}/changes", "post"),
        ("/v1/sessions/{session_id}/modules", "post"), ("/v1/sessions/{session_id}/modules", "put"),
        ("/v1/sessions/{session_id}/shown", "get"), ("/v1/projects/{project_id}/shown", "get"),
        ("/v1/projects/{project_id}/rooms", "post"),
        ("/v1/projects/{project_id}/run", "get"), ("/v1/projects/{project_id}/run", "put"),
    }  # fmt: skip

    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [ref for item in value.values() for ref in references(item)]
        if isinstance(value, list):
            return [ref for item in value for ref in references(item)]
        return []

    found = references(document)
    assert found
    for reference in found:
        target: object = document
        for part in reference.removeprefix("#/").split("/"):
            assert isinstance(target, dict)
            target = target[part]


def test_the_date_is_the_second_of_the_answer(service: subprocess.Popen[str], port: int) -> None:
    """Agents bound their clocks' skew by it, so it is no older than its own resolution."""
    seen = set()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        for _ in range(40):
            sent = time.time()
            (date,) = http.get("/livez").headers.get_list("date")
            received = time.time()
            moment = parsedate_to_datetime(date).timestamp()
            assert int(sent) <= moment <= received
            seen.add(moment)
            time.sleep(0.03)
    assert len(seen) >= 2
