"""`preview-orchestrator doctor` finds what is wrong with a set-up: each row breaks one thing for real."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.examination import examine_all
from orchestrator_stub.doctor.findings import Finding, Mark, Report, examine, healthy, lines
from orchestrator_stub.doctor.nats import examine_nats
from orchestrator_stub.platform.tokens import Keyring, new_es256
from orchestrator_stub.relay.accounts import Operator
from orchestrator_stub.relay.embedded import EmbeddedNats
from tests.conftest import fresh
from tests.fakes.fly import APP, TOKEN
from tests.fakes.serving import SECRET, Local, serve_local
from tests.orchestrator.door.world import KEYS
from tests.ports import free_port

PUBLIC_URL = "http://orchestrator.example"
"""Reached through a proxy, as the environment says: an address of this machine would be refused."""

IMAGE = "previews/agent:v1"


class Peers(BaseHTTPRequestHandler):
    """Fly's Machines API, its registry and an orchestrator's /livez, as far as they are asked."""

    def do_GET(self) -> None:
        authorized = TOKEN in self.headers.get("authorization", "") or self.headers.get(
            "authorization", ""
        ).startswith("Basic ")
        answers: dict[str, Any] = {
            f"/v1/apps/{APP}/machines": [],
            "/v1/platform/regions": {"Regions": [{"code": "ams"}, {"code": "fra"}]},
            "/v2/previews/agent/manifests/v1": {"schemaVersion": 2},
            f"{PUBLIC_URL}/livez": {"alive": True},
        }
        answer = answers.get(self.path)
        status = 404 if answer is None else 200
        if not self.path.startswith(PUBLIC_URL) and not authorized:
            status = 401
        body = json.dumps(answer if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def peers() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Peers)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def through_a_proxy(peers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{peers}")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@asynccontextmanager
async def standing(dsn: str, directory: Path) -> AsyncIterator[Local]:
    async with serve_local(dsn, directory / "storage", keyring=Keyring.from_secret(SECRET)) as local:
        yield local


def settings_of(local: Local, peers: str, **changed: Any) -> Settings:
    values: dict[str, Any] = {
        "database_url": local.dsn,
        "supabase_url": local.url,
        "supabase_anon_key": local.keys.anon_key,
        "supabase_service_role_key": local.keys.service_key,
        "supabase_jwt_secret": SECRET,
        "machine_driver": "fly",
        "fly_api_url": f"http://{peers}/v1",
        "fly_api_token": TOKEN,
        "fly_app": APP,
        "fly_region": "ams",
        "agent_image": f"{peers}/{IMAGE}",
        "public_url": PUBLIC_URL,
    }
    return Settings.of({key: value for key, value in {**values, **changed}.items() if value is not None})


def marked(found: list[Finding], mark: Mark) -> list[str]:
    return [f"{each.part}: {each.what}" for each in found if each.mark is mark]


@dataclass(frozen=True)
class Broken:
    """`sql` breaks the database, `settings` the environment; `said` is in what is `mark`ed."""

    name: str
    said: str
    mark: Mark = Mark.BAD
    sql: str = ""
    settings: Callable[[Local, str, Path], dict[str, Any]] = lambda local, peers, tmp: {}


def changed_dsn(local: Local, **parts: Any) -> dict[str, Any]:
    return {"database_url": make_conninfo(local.dsn, **parts)}


def key_file(tmp: Path, *keys: dict[str, Any]) -> dict[str, Any]:
    path = tmp / "keys.json"
    path.write_text(json.dumps({"keys": list(keys)}))
    return {"jwt_keys_file": path, "supabase_jwt_secret": None}


def nats(tmp: Path, url: str) -> dict[str, Any]:
    return {"nats_url": url, "nats_keys_file": Operator().write(tmp / "nats")[0]}


async def test_nats_that_works_is_found_working(database: str, tmp_path: Path, peers: str) -> None:
    operator = Operator()
    files = operator.write(tmp_path / "keys")
    server = EmbeddedNats(tmp_path / "server", operator=operator)
    await server.start()
    try:
        async with standing(database, tmp_path) as local:
            settings = settings_of(local, peers, nats_url=server.url, nats_keys_file=files[0])
            report = Report("nats")
            await examine_nats(settings, report)
    finally:
        await server.stop()
    said = [(each.mark, each.what) for each in report.findings]
    assert said == [
        (Mark.OK, "the stream is there, on 1 server"),
        (Mark.OK, "a machine connects, hears its project and may say nothing"),
        (Mark.WARN, "machines connect without TLS"),
        (Mark.OK, "the database sends events by: realtime"),
    ]


def shared(secret: str) -> dict[str, Any]:
    return {"kty": "oct", "k": urlsafe_b64encode(secret.encode()).rstrip(b"=").decode()}


def public_half(key: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in key.items() if name != "d"}


BROKEN = [
    Broken("the database is elsewhere", "cannot be reached",
           settings=lambda local, peers, tmp: changed_dsn(local, host="127.0.0.1", port=free_port())),
    Broken("no such database", "does not exist",
           settings=lambda local, peers, tmp: changed_dsn(local, dbname="nobody_s")),
    Broken("no such user", "nobody_at_all",
           settings=lambda local, peers, tmp: changed_dsn(local, user="nobody_at_all")),
    Broken("a replica", "takes no writes",
           sql="alter database {database} set default_transaction_read_only = on"),
    Broken("migrations are missing", "migrations are missing",
           sql="delete from supabase_migrations.schema_migrations where version = "
               "(select max(version) from supabase_migrations.schema_migrations)"),
    Broken("Realtime has no role", "may not take the role",
           sql="revoke preview_agent from authenticator; revoke preview_agent from supabase_realtime_admin"),
    Broken("limits of another release", "path.segments is 32 in preview.limits and 64 in the code", Mark.WARN,
           sql="create or replace view preview.limits with (security_invoker = true) as"
               " select n as name, v::bigint as value from (values ('path.bytes', 1024), ('path.segment_bytes', 255),"
               " ('path.segments', 32), ('file.bytes', 10485760), ('asset.bytes', 52428800)) as l (n, v)"),
    Broken("statements are cut", "is cut after 8 s", Mark.WARN,
           sql="alter database {database} set statement_timeout = '8s'"),
    Broken("a bucket is missing", "no bucket project-snapshots",
           sql="delete from storage.objects; delete from storage.buckets where id = 'project-snapshots'"),
    Broken("the bucket of layers is missing", "no bucket preview-modules",
           sql="delete from storage.buckets where id = 'preview-modules'"),
    Broken("a bucket is public", "project-assets is public",
           sql="update storage.buckets set public = true where id = 'project-assets'"),
    Broken("no policy lets agents read", "cannot join its channel",
           sql="drop policy if exists {policy} on realtime.messages"),
    Broken("another project's secret", "cannot join its channel",
           settings=lambda local, peers, tmp: {"supabase_jwt_secret": "another project's secret, of thirty-two bytes"}),
    Broken("the anon key of another project", "SUPABASE_ANON_KEY was not signed",
           settings=lambda local, peers, tmp: {"supabase_anon_key": Keyring.from_secret("z" * 40).sign(
               {"role": "anon", "exp": 4_000_000_000})}),
    Broken("the service key of another project", "Storage: cannot upload",
           settings=lambda local, peers, tmp: {"supabase_service_role_key": Keyring.from_secret("z" * 40).sign(
               {"role": "service_role", "exp": 4_000_000_000})}),
    Broken("Supabase is elsewhere", "Realtime cannot be reached",
           settings=lambda local, peers, tmp: {"supabase_url": f"http://127.0.0.1:{free_port()}"}),
    Broken("a key set that only verifies", "nothing can be signed",
           settings=lambda local, peers, tmp: key_file(tmp, public_half(new_es256("one")))),
    Broken("a key that cannot be used", "keys of the set cannot be used", Mark.WARN,
           settings=lambda local, peers, tmp: key_file(tmp, shared(SECRET), {"kty": "RSA"})),
    Broken("no key file", "keys cannot be read",
           settings=lambda local, peers, tmp: {"jwt_keys_file": tmp / "none.json", "supabase_jwt_secret": None}),
    Broken("Fly's token is refused", "Fly refuses the token",
           settings=lambda local, peers, tmp: {"fly_api_token": "another"}),
    Broken("no such app", "there is no app", settings=lambda local, peers, tmp: {"fly_app": "nobodys"}),
    Broken("no such region", "no region of Fly's", settings=lambda local, peers, tmp: {"fly_region": "atl9"}),
    Broken("no such image", "there is no image",
           settings=lambda local, peers, tmp: {"agent_image": f"{peers}/previews/agent:v2"}),
    Broken("an image of this machine", "names no registry",
           settings=lambda local, peers, tmp: {"agent_image": "preview-agent:latest"}),
    Broken("agents are told themselves", "which is themselves",
           settings=lambda local, peers, tmp: {"public_url": "http://localhost:8080"}),
    Broken("something else answers there", "is no orchestrator",
           settings=lambda local, peers, tmp: {"public_url": f"{PUBLIC_URL}/elsewhere"}),
    Broken("previews are every browser's own machine", "every browser's own machine",
           settings=lambda local, peers, tmp: {"preview_domain": "localhost:54380", "door_keys": KEYS}),
    Broken("Redis is away", "does not answer", Mark.WARN,
           settings=lambda local, peers, tmp: {"redis_url": f"redis://127.0.0.1:{free_port()}"}),
    Broken("NATS is away", "the relay cannot use the stream",
           settings=lambda local, peers, tmp: nats(tmp, "nats://127.0.0.1:1")),
    Broken("no NATS keys", "NATS_KEYS_FILE: cannot read",
           settings=lambda local, peers, tmp: {
               "nats_url": "nats://127.0.0.1:1", "nats_keys_file": tmp / "none.json"}),
    Broken("machines hear what nobody sends", "the database sends events to Realtime alone",
           settings=lambda local, peers, tmp: {**nats(tmp, "nats://127.0.0.1:1"), "agent_transport": "nats"}),
    Broken("events that nobody takes", "there is no NATS_URL",
           sql="update preview.settings set transport = 'nats'"),
    Broken("no engine", "is not on the PATH",
           settings=lambda local, peers, tmp: {"machine_driver": "container", "container_cli": "no-engine-at-all"}),
]  # fmt: skip


async def test_all_is_well(database: str, tmp_path: Path, peers: str) -> None:
    async with standing(database, tmp_path) as local:
        found = await examine_all(settings_of(local, peers))
        objects = await local.sql("select name from storage.objects")
    assert not marked(found, Mark.BAD) + marked(found, Mark.WARN) + marked(found, Mark.SKIP)
    assert {each.part for each in found} == {
        "settings", "database", "keys", "realtime", "nats", "storage", "redis", "machines", "address", "door", "shards",
    }  # fmt: skip
    assert not objects
    assert healthy(found)
    assert lines(found, as_json=False)[-1] == "previews can work from here"


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
async def test_a_broken_set_up_is_found(
    broken: Broken, postgres_dsn: str, template_database: str, tmp_path: Path, peers: str
) -> None:
    with fresh(postgres_dsn, template_database) as dsn:
        async with standing(dsn, tmp_path) as local:
            with broken_database(dsn, broken.sql):
                settings = settings_of(local, peers, **broken.settings(local, peers, tmp_path))
                found = await examine_all(settings)
    said = [text for text in marked(found, broken.mark) if broken.said in text]
    assert said, lines(found, as_json=False)
    assert all(each.remedy for each in found if each.mark in (Mark.BAD, Mark.WARN))
    assert healthy(found) is (broken.mark is Mark.WARN)
    printed = "\n".join(lines(found, as_json=False))
    for secret in (SECRET, local.keys.service_key, TOKEN):
        assert secret not in printed


@contextmanager
def broken_database(dsn: str, statements: str) -> Iterator[None]:
    """Run `statements` before; roles are the server's, so what was revoked is granted again after it."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        policy = connection.execute(
            "select format('%I', policyname) from pg_policies where schemaname = 'realtime' and tablename = 'messages'"
            " and cmd = 'SELECT' and roles::text like '%preview_agent%'"
        ).fetchone()
        names = {"database": f'"{conninfo_to_dict(dsn)["dbname"]}"', "policy": policy[0] if policy else ""}
        if statements:
            connection.execute(statements.format(**names).encode())
        try:
            yield
        finally:
            connection.execute("set transaction_read_only = off" if "read_only" in statements else "select 1")
            if "revoke" in statements:
                connection.execute("grant preview_agent to authenticator")
                connection.execute("grant preview_agent to supabase_realtime_admin")


needs_pgbouncer = pytest.mark.skipif(
    subprocess.run(["sh", "-c", "command -v pgbouncer"], capture_output=True, check=False).returncode != 0,
    reason="pgbouncer is not installed (Debian: pgbouncer)",
)


@needs_pgbouncer
@pytest.mark.parametrize(("mode", "mark"), [("transaction", Mark.BAD), ("session", Mark.OK)])
async def test_a_pooler_by_the_transaction_is_told_from_one_by_the_session(
    mode: str, mark: Mark, database: str, tmp_path: Path, peers: str
) -> None:
    parts, port = conninfo_to_dict(database), free_port()
    (tmp_path / "pgbouncer.ini").write_text(
        f"[databases]\n{parts['dbname']} = host={parts['host']} port={parts.get('port', 5432)} user={parts['user']}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {mode}\nignore_startup_parameters = extra_float_digits\n"
    )
    process = await asyncio.create_subprocess_exec(
        "pgbouncer", "-u", Path(str(parts["host"])).owner(), str(tmp_path / "pgbouncer.ini"),
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with standing(database, tmp_path) as local:
            pooled = make_conninfo(database, host="127.0.0.1", port=port)
            await listening(port, process)
            found = await examine_all(settings_of(local, peers, database_url=pooled))
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
    told = {"transaction": "a pooler in transaction mode", "session": "a session of its own"}[mode]
    assert any(told in text for text in marked(found, mark)), lines(found, as_json=False)


async def listening(port: int, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(20):
        while True:
            assert process.returncode is None, await process.stderr.read() if process.stderr else None
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return


async def test_an_examination_that_fails_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_stub.doctor.findings.SECONDS", 0.05)

    async def raises(report: Any) -> None:
        report.ok("before")
        raise KeyError("x")

    async def hangs(report: Any) -> None:
        await asyncio.Event().wait()

    found = await examine([("first", raises), ("second", hangs)])
    assert [(each.part, each.mark) for each in found] == [
        ("first", Mark.OK), ("first", Mark.BAD), ("second", Mark.BAD),
    ]  # fmt: skip


def test_the_command_says_settings_that_are_missing_and_ends_with_1() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator_stub", "doctor", "--json"],
        env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert any("DATABASE_URL" in each["what"] for each in found)
    assert all(each["mark"] == "bad" for each in found)
