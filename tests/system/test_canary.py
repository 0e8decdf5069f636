"""No secret leaves: whatever is refused, breaks or crashes, at debug level, on both sides of the session API.

Agent and orchestrator are real, and so is what happens to them. Everything they say is kept, and in the end searched
for every credential there was, by value and by shape: logs, `/status`, `/metrics`, error answers, what the database
remembers of a heartbeat, files of the state directory, the environment and command line of every child, core files.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
import structlog

from agent.tokens import read_token
from orchestrator_stub.platform.redaction import Redactor
from orchestrator_stub.process import configure_logs
from tests.fakes.collector import collecting
from tests.fakes.origin import Answer, origin
from tests.fakes.realtime import jwt
from tests.orchestrator.test_serve import settings as serve_settings
from tests.profiles import NIGHTLY
from tests.system.canary import CREDENTIALS, leaking, leaks, shown_by
from tests.system.plane import Agent, Plane, Project, eventually, running_plane
from tests.trees import contents_below, descendants_of

pytestmark = pytest.mark.system

DEV_SERVER = Path(__file__).parents[1] / "agent" / "devserver" / "dev_server.py"
FILES = {"package.json": '{"scripts": {"dev": "x"}}', "src/a.ts": "a\n"}
COLLECTOR_KEY = "authorization=Bearer%20canary-collector-key"

BUG = """
import logging, os, threading, traceback

def crash(*_):
    url, token = os.environ["SNAPSHOT_URL"], os.environ["REALTIME_TOKEN"]
    logging.getLogger("some.library").warning("retrying %s with %s", url, token)
    threading.Thread(target=lambda: print_nothing(url)).start()
    class Loud:
        def __del__(self):
            raise ValueError(token)
    Loud()
    try:
        raise ConnectionError(f"GET {url} failed")
    except ConnectionError as error:
        raise RuntimeError(f"bad header: Bearer {token}, {os.environ['REALTIME_API_KEY']}") from error

def replace(owner, name, bug):
    assert callable(getattr(owner, name))
    setattr(owner, name, bug)

try:
    from agent.sync import hydrate
    replace(hydrate.Hydration, "run", crash)
    if os.environ.get("CRASH") == "loop":
        from agent import daemon
        def broken(*_, **__):
            raise RuntimeError(os.environ["SNAPSHOT_URL"])
        replace(daemon, "Report", broken)
except Exception:
    traceback.print_exc()
    os._exit(99)
"""
"""A sitecustomize: bugs that nobody has planned for, with secrets in their messages. 99: what it breaks has moved."""


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the orchestrator says, at debug level, as `serve` sets it up."""
    said = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", said)
        configure_logs("debug", "json", Redactor())
    yield said
    structlog.reset_defaults()


@pytest.fixture
async def plane(database: str, tmp_path: Path, log: io.StringIO) -> AsyncIterator[Plane]:
    async with running_plane(database, tmp_path) as running:
        yield running


def secrets_of(agent: Agent) -> list[str]:
    names = ("SNAPSHOT_URL", "REALTIME_TOKEN", "REALTIME_API_KEY")
    plane = agent.project.plane
    return [*(agent.environ[name] for name in names), plane.keys.service_key, plane.keys.anon_key]


async def said_by(agent: Agent) -> dict[str, bytes | str]:
    """Everything about an agent that others can see."""
    assert agent.process is not None
    name = agent.directory.name
    said: dict[str, bytes | str] = {f"{name} log": agent.log()}
    if agent.process.poll() is None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{agent.port}", trust_env=False) as http:
            for path in ("/status", "/metrics", "/readyz", "/livez"):
                try:
                    said[f"{name} {path}"] = (await http.get(path)).text
                except httpx.HTTPError:
                    continue
        said |= shown_by(agent.process.pid, "cmdline")
        for pid in descendants_of(agent.process.pid):
            said |= shown_by(pid, "cmdline", "environ")
    state = agent.directory / "state"
    return said | {f"{name} {path}": content for path, content in contents_below(state).items()}


async def remembered(dsn: str) -> str:
    """What the control plane keeps of sessions: heartbeats as they came, problems."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        rows = await (await connection.execute("select to_jsonb(s)::text from preview.sessions s")).fetchall()
    return "\n".join(row[0] for row in rows)


async def refused_links(agent: Agent) -> bool:
    report = await agent.status()
    return report is not None and bool(report["link"]["refusals"])


async def machine(project: Project, directory: Path, mode: str = "good", **environ: str) -> Agent:
    given = {
        "LOG_LEVEL": "debug",
        "DEV_COMMAND": f"{sys.executable} {DEV_SERVER} {mode}",
        "DEV_ENV_PORT": "0",
        "SNAPSHOT_ATTEMPTS": "2",
        "SNAPSHOT_RETRY_SECONDS": "0.01",
        **environ,
    }
    return await project.session(directory, **given)


async def test_a_session_s_life_tells_no_secret(
    plane: Plane, database: str, tmp_path: Path, log: io.StringIO
) -> None:
    """Start, saves, renewals, refusals, a flood of nonsense, the session's end."""
    with collecting() as collector:
        collector.refuse = 401
        project = await plane.project(FILES)
        agent = await machine(
            project,
            tmp_path / "machine",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"{collector.url}/?token=canary-in-a-collector-s-address",
            OTEL_EXPORTER_OTLP_HEADERS=COLLECTOR_KEY,
            OTEL_BSP_SCHEDULE_DELAY="50",
        )
        secrets = secrets_of(agent)
        assert set(secrets_of(agent)[:3]) <= set(leaks("\n".join(agent.environ.values()), secrets)), (
            "it would be found"
        )
        agent.start()
        assert agent.process is not None
        said: dict[str, bytes | str] = {}
        try:
            await agent.equal()
            first = (await agent.status() or {})["link"]["token_expires_at"]
            await project.save("src/b.ts", "b\n")
            await project.save("src/big.txt", "x" * 300_000)
            # What a stranger on the channel could say, with a credential where nobody expects one.
            url = agent.environ["SNAPSHOT_URL"]
            await project.broadcast(
                "file:update", {"file_path": f"../{secrets[1]}", "content": "", "version": 1}
            )
            await project.broadcast(
                "file:update", {"file_path": "x", "content": 7, "traceparent": secrets[1]}
            )
            await project.broadcast("bulk:apply", {"files": secrets[1]})
            await project.broadcast(f"of-tomorrow-{secrets[1]}", {"url": url})
            await project.broadcast("snapshot:ready", {"snapshot_url": url[:-5], "manifest": {"format": url}})
            await project.broadcast("snapshot:ready", {"snapshot_url": f"{url}AAAA", "timestamp": "x"})
            said |= await said_by(agent)

            async def next_second() -> bool:
                """So that the renewed token expires later than the first."""
                issued = read_token(agent.environ["REALTIME_TOKEN"]).issued_at
                return issued is not None and time.time() >= issued + 1

            # Realtime refuses, and says why with the key in it; a browser's proxy answers in HTML.
            await project.faults(
                refuse=3, refuse_status=403, refuse_error=f"bad apikey={secrets[2]}&token={secrets[1]}"
            )
            await eventually("the next token expires later", next_second)
            await project.faults(action="abort")
            await eventually("it was refused", lambda: refused_links(agent))
            await project.faults(action="expire_tokens")

            async def renewed() -> bool:
                report = await agent.status()
                return report is not None and report["link"]["token_expires_at"] > first

            await eventually("the token was renewed", renewed)
            children = {
                place: shown
                for pid in descendants_of(agent.process.pid)
                for place, shown in shown_by(pid, "environ").items()
            }
            assert len(children) >= 2, "a guard and its dev server"
            for place, environ in children.items():
                names = {line.partition(b"=")[0] for line in environ.split(b"\0")}
                assert not names & set(CREDENTIALS), place
            for command in (
                ["status", "--url", f"http://127.0.0.1:{agent.port}"],
                ["status", "--json"],
                ["check"],
            ):
                told = await asyncio.to_thread(
                    subprocess.run, [sys.executable, "-m", "agent", *command], capture_output=True, cwd=tmp_path,
                    env={"PATH": os.environ["PATH"], **agent.environ, "HEALTH_PORT": str(agent.port)}, timeout=30,
                )  # fmt: skip
                said[f"agent {' '.join(command)}"] = told.stdout + told.stderr
            said |= {f"later {place}": what for place, what in (await said_by(agent)).items()}
            await plane.http.delete(f"/v1/sessions/{agent.session_id}")
            await asyncio.to_thread(agent.process.wait, 30)
        finally:
            agent.kill()
        said["log to the end"] = agent.log()
        said["database"] = await remembered(database)
        for path in ("/metrics", "/v1/sessions?ended=true", f"/v1/sessions/{agent.session_id}"):
            said[path] = (await plane.http.get(path)).text
        for token in secrets[1:3]:
            refused = await plane.http.put(
                f"/v1/sessions/{uuid4()}/status",
                json={"state": url},
                headers={"authorization": f"Bearer {token}"},
            )
            said[f"refusal {token[-6:]}"] = refused.text
        said["orchestrator's log"] = log.getvalue()
    assert "session.over" in log.getvalue()
    assert "agent.stopped" in agent.log()
    assert leaking(said, secrets) == {}
    assert len(said) > 20


async def test_no_way_to_fail_tells_a_secret(
    plane: Plane, database: str, tmp_path: Path, log: io.StringIO
) -> None:
    """Refused, expired, corrupt, too large, unreachable, redirected, a directory that cannot be used, bugs: each once.

    A dev server that fails for good takes seven seconds of its own to do so, and is for the nightly profile.
    """
    project = await plane.project(FILES)
    (tmp_path / "bug").mkdir()
    (tmp_path / "bug" / "sitecustomize.py").write_text(BUG)
    (tmp_path / "file").write_text("")
    bug = {"PYTHONPATH": f"{tmp_path / 'bug'}:{Path(__file__).parents[2]}"}
    foreign = jwt(4_000_000_000, name="canary-of-another-issuer")
    elsewhere = ("Location", "https://storage.invalid/x?token=canary-elsewhere")
    bad = Answer(b"<html>canary-in-a-body", 502)
    async with (
        origin(bad) as broken,
        origin(Answer(b"PK\x03\x04 canary-bytes")) as corrupt,
        origin(Answer(b"", 302, (elsewhere,))) as moved,
        origin(Answer(b'{"statusCode":"400","error":"InvalidJWT","message":"canary-body"}', 400)) as expired,
    ):
        alone = {"SESSION_API_URL": ""}
        ways: dict[str, tuple[dict[str, str], set[int]]] = {
            "dev-server-crashes": ({"DEV_ESSENTIAL": "true"}, {75}),
            "storage-broken": ({**alone, "SNAPSHOT_URL": broken.url}, {69}),
            "storage-corrupt": ({**alone, "SNAPSHOT_URL": corrupt.url}, {69, 70}),
            "storage-too-large": ({**alone, "SNAPSHOT_MAX_BYTES": "1"}, {69, 70}),
            "storage-moved": ({**alone, "SNAPSHOT_URL": moved.url}, {69, 70}),
            "storage-expired": ({**alone, "SNAPSHOT_URL": expired.url}, {70}),
            "storage-away": ({**alone, "SNAPSHOT_URL": "http://canary-u:canary-pw@127.0.0.1:9/?token=canary-q"}, {69}),
            "token-foreign": ({"REALTIME_TOKEN": foreign, "SNAPSHOT_URL": expired.url}, {70}),
            "api-broken": ({"SESSION_API_URL": broken.url, "SNAPSHOT_URL": corrupt.url}, {69}),
            "api-away": ({"SESSION_API_URL": "http://127.0.0.1:9/?token=canary-api", "SNAPSHOT_URL": broken.url}, {69}),
            "root-unusable": ({"PROJECT_DIR": str(tmp_path / "file" / "project")}, {71}),
            "bug-in-a-task": (bug, {1}),
            "bug-outside": ({**bug, "CRASH": "loop"}, {1}),
        }  # fmt: skip
        if not NIGHTLY:
            del ways["dev-server-crashes"]
        agents = {
            name: await machine(
                project, tmp_path / name, "crashes" if name.startswith("dev-server") else "good", **environ
            )
            for name, (environ, _) in ways.items()
        }
        said: dict[str, bytes | str] = {}
        secrets: list[str] = [foreign]
        slots = asyncio.Semaphore(4)

        async def one(name: str, agent: Agent) -> None:
            async with slots:
                agent.start()
                assert agent.process is not None
                try:
                    code = await asyncio.wait_for(asyncio.to_thread(agent.process.wait), 60)
                finally:
                    agent.kill()
            assert code in ways[name][1], f"{name}: {code}\n{agent.log()[-3000:]}"
            said.update(await said_by(agent))
            secrets.extend(secrets_of(agent))

        async with asyncio.TaskGroup() as tasks:
            for name, agent in agents.items():
                tasks.create_task(one(name, agent), name=name)
    bug_log = agents["bug-in-a-task"].log()
    assert bug_log.count("[redacted]") >= 6, "the bugs did speak of secrets"
    for what in ("library.log", "ConnectionError", "RuntimeError", "Loud", "NameError"):
        assert what in bug_log, what
    outside = [line for line in agents["bug-outside"].log().splitlines() if line]
    assert json.loads(outside[-1])["event"] == "agent.bug", "one line, no bare traceback"
    said["database"] = await remembered(database)
    said["orchestrator's log"] = log.getvalue()
    # What the origins said is not ours to keep either, but the address of a 302 is.
    assert leaking(said, secrets) == {}


@pytest.mark.parametrize(
    "token", ["canary-no-jwt", jwt(4_000_000_000, role="service_role")], ids=["no-jwt", "service-role"]
)
def test_wrong_settings_are_named_and_not_repeated(token: str, tmp_path: Path) -> None:
    given = {
        "PROJECT_ID": "canary-id", "SESSION_ID": "canary-session", "HEALTH_PORT": "canary-port",
        "REALTIME_URL": "canary-url?token=canary-x", "REALTIME_API_KEY": "canary-api-key",
        "SNAPSHOT_URL": "ftp://canary-host/?token=canary", "LOG_LEVEL": "canary-level", "REALTIME_TOKEN": token,
        "DEV_COMMAND": "'canary-unbalanced", "STOP_GRACE": "canary-grace",
        "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_canary-service", "SESSION_API_URL": "canary-api",
    }  # fmt: skip
    for command in ("run", "check", "record x.jsonl"):
        told = subprocess.run(
            [sys.executable, "-m", "agent", *command.split()], env={"PATH": os.environ["PATH"], **given},
            cwd=tmp_path, capture_output=True, timeout=30,
        )  # fmt: skip
        said = told.stdout + told.stderr
        assert told.returncode == 64
        assert b"Traceback" not in said
        for name in set(given) - {"REALTIME_API_KEY"}:
            assert f"{name}: ".encode() in said, f"{command} does not name {name}"
        assert leaks(said, given.values()) == [], command


def test_a_killed_agent_leaves_no_core_file(tmp_path: Path) -> None:
    """ABRT makes any other process dump core; of the agent's memory nothing is written."""

    def unlimited() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def dumps(argv: list[str], environ: dict[str, str], until: bytes) -> bool:
        process = subprocess.Popen(
            argv,
            env=environ,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=unlimited,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if until in line:
                break
        process.send_signal(signal.SIGABRT)
        process.stdout.close()
        _, status = os.waitpid(process.pid, 0)
        process.returncode = 0
        assert os.WTERMSIG(status) == signal.SIGABRT
        return os.WCOREDUMP(status)

    try:
        control = dumps([sys.executable, "-uc", "print('here'); import time; time.sleep(60)"], {}, b"here")
    except (PermissionError, subprocess.SubprocessError):
        pytest.skip("the hard limit of core files cannot be raised here")
    if not control:
        pytest.skip("no process leaves a core file on this machine")
    environ = {
        "PROJECT_ID": str(uuid4()), "SESSION_ID": str(uuid4()), "SNAPSHOT_URL": "http://127.0.0.1:9/x?token=canary-s",
        "REALTIME_URL": "ws://127.0.0.1:9", "REALTIME_TOKEN": jwt(4_000_000_000), "PATH": os.environ["PATH"],
        "PROJECT_DIR": str(tmp_path / "project"), "STATE_DIR": str(tmp_path / "state"), "HEALTH_PORT": "0",
        "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    assert not dumps([sys.executable, "-m", "agent", "run"], environ, b"agent.started")
    assert not [path for path in tmp_path.rglob("core*") if b"canary-s" in path.read_bytes()]


def test_the_orchestrator_s_own_secrets_stay_its_own(database: str, tmp_path: Path) -> None:
    """`serve` at debug level, with a database that goes away under it and callers who send it keys."""
    secrets = {
        "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_canary-service-key",
        "SUPABASE_JWT_SECRET": "canary-jwt-secret-of-more-than-32-bytes",
        "REDIS_URL": "redis://default:canary-redis-password@127.0.0.1:9/0",
    }
    dsn = psycopg.conninfo.make_conninfo(database, password="canary-database-password")
    environ = serve_settings(
        dsn,
        **secrets,
        LOG_LEVEL="debug",
        LOG_FORMAT="json",
        PORT="0",
        MACHINES_DIR=str(tmp_path),
        SWEEP_SECONDS="0.2",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator_stub", "serve"], env={"PATH": os.environ["PATH"], **environ},
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    said: dict[str, bytes | str] = {}
    lines: list[str] = []
    assert process.stderr is not None
    try:
        for line in process.stderr:
            lines.append(line)
            if "serving" in line:
                break
        address = json.loads(lines[-1])["address"]
        with (
            psycopg.connect(database, autocommit=True) as server,
            httpx.Client(base_url=f"http://{address}") as http,
        ):
            owner, project = uuid4(), uuid4()
            server.execute("insert into auth.users (id, email) values (%s, 'x@x.invalid')", (owner,))
            server.execute("insert into public.user_profiles (id, display_name) values (%s, 'u')", (owner,))
            server.execute(
                "insert into public.projects (id, owner_id, name) values (%s, %s, 'p')", (project, owner)
            )
            keys: list[dict[str, Any]] = [
                {"authorization": f"Bearer {secrets['SUPABASE_SERVICE_ROLE_KEY']}"},
                {"authorization": "Bearer canary-wrong-key"},
                {"authorization": f"Bearer {jwt(4e9, name='canary')}"},
                {},
            ]  # fmt: skip
            for n, headers in enumerate(keys):
                for body in ({"project_id": str(project)}, {"project_id": "canary-id"}, {"canary-field": 1}):
                    said[f"create {n} {body}"] = http.post(
                        "/v1/sessions", json=body, headers=headers, timeout=30
                    ).text
            name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
            server.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> pg_backend_pid()",
                (name,),
            )
            said["metrics"] = http.get("/metrics").text
            said["openapi"] = http.get("/openapi.json").text
    finally:
        process.send_signal(signal.SIGTERM)
        lines += process.stderr.readlines()
        process.wait(20)
    said["log"] = "".join(lines)
    assert len(lines) > 2
    known = [*secrets.values(), "canary-database-password"]
    # A value that the caller sent is told back to that caller alone, where it says which field was wrong.
    answers = {
        place: str(what).replace("canary-field", "").replace("canary-id", "") for place, what in said.items()
    }
    assert leaking(answers, known) == {}
    for dsn in (
        "postgresql://u:half@canary-other-half@127.0.0.1:9/x",
        "postgresql://u:canary-pw@127.0.0.1:canary-port/x",
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "orchestrator_stub", "serve"], capture_output=True, timeout=60,
            env={"PATH": os.environ["PATH"], **environ, "DATABASE_URL": dsn, "PORT": "0"},
        )  # fmt: skip
        assert ended.returncode in (1, 64)
        assert leaks(ended.stdout + ended.stderr) == []
