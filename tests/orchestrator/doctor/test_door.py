"""`doctor` and the door: records that are missing, certificates that nobody trusts, domains that share cookies."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.door import examine_door
from orchestrator_stub.doctor.findings import Mark, Report
from tests.fakes.serving import SECRET
from tests.orchestrator.door.test_in_front import certificate
from tests.orchestrator.door.world import KEYS

OPEN = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nopen\n"
DOMAIN = "preview.test"


def settings_of(domain: str | None, **changed: object) -> Settings:
    values = {
        "database_url": "postgresql:///x", "supabase_url": "https://supabase.example", "supabase_anon_key": "x",
        "supabase_service_role_key": "x" * 40, "supabase_jwt_secret": SECRET, "machine_driver": "container",
        "public_url": "https://orchestrator.example", "preview_domain": domain, "door_keys": KEYS,
    }  # fmt: skip
    return Settings.of({**values, **changed})


async def here(name: str) -> Sequence[str]:
    """A wildcard's record, which a test cannot make."""
    return ["127.0.0.1"]


@asynccontextmanager
async def answering(
    directory: Path, answer: bytes = OPEN, *, days: int = 90, domain: str = DOMAIN, tls: bool = True
) -> AsyncIterator[int]:
    """Something that answers at a port, with a certificate of its own making."""
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate(directory, domain, days))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def said(report: Report, mark: Mark) -> list[str]:
    return [each.what for each in report.findings if each.mark is mark]


async def test_a_door_that_works_is_found_by_its_wildcard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Report("door")
    async with answering(tmp_path) as port:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        await examine_door(settings_of(f"{DOMAIN}:{port}"), report, resolve=here)
    assert said(report, Mark.BAD) == []
    assert said(report, Mark.OK) == [f"https://*.{DOMAIN} is a door, with a certificate for 89 days more"]
    assert said(report, Mark.WARN) == [f"*.{DOMAIN} is 127.0.0.1: this machine alone finds it"]


@pytest.mark.parametrize(
    ("given", "mark", "wanted"),
    [
        ({"domain": "other.test"}, Mark.BAD, "browsers do not trust"),
        ({"trusted": False}, Mark.BAD, "self-signed certificate"),
        ({"days": 5}, Mark.WARN, "ends in 4 days"),
        ({"tls": False}, Mark.BAD, "speaks no TLS"),
        ({"answer": OPEN.replace(b"200 OK", b"502 Bad Gateway")}, Mark.BAD, "HTTP 502"),
        ({"answer": OPEN.replace(b"open", b"nice")}, Mark.BAD, "no door that works"),
        ({"answer": b"HTTP/1.1 200 OK\r\n\r\n"}, Mark.BAD, "no door that works"),
        ({"answer": b"nonsense\r\n\r\n"}, Mark.BAD, "no door that works"),
        ({"answer": b""}, Mark.SKIP, "does not answer"),
    ],
    ids=str,
)
async def test_what_answers_in_its_place_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, object], mark: Mark, wanted: str
) -> None:
    trusted = given.pop("trusted", True)
    report = Report("door")
    async with answering(tmp_path, **given) as port:  # type: ignore[arg-type]
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        await examine_door(settings_of(f"{DOMAIN}:{port}"), report, resolve=here)
    assert any(wanted in each for each in said(report, mark)), report.findings


@pytest.mark.parametrize(
    ("domain", "changed", "mark", "wanted"),
    [
        (None, {}, Mark.OK, "not used"),
        ("nowhere.invalid", {}, Mark.BAD, "has no address"),
        ("localhost:54380", {}, Mark.OK, "from this machine alone"),
        ("previews.example.com", {"public_url": "https://api.previews.example.com"}, Mark.BAD, "share the domain"),
        ("previews.app.example.com", {"public_url": "https://app.example.com"}, Mark.BAD, "share the domain"),
        ("previews.example.com", {"supabase_url": "https://db.example.com"}, Mark.WARN, "may share cookies"),
        ("previews.example.dev", {"public_url": "https://10.0.0.7"}, Mark.SKIP, "does not answer"),
    ],
)  # fmt: skip
async def test_a_domain_is_examined(
    domain: str | None, changed: dict[str, object], mark: Mark, wanted: str
) -> None:
    report = Report("door")

    async def record(name: str) -> Sequence[str]:
        return ["127.0.0.2"]  # nothing listens at its port 443

    given = {} if domain == "nowhere.invalid" else {"resolve": record}
    await examine_door(settings_of(domain, **changed), report, **given)
    assert any(wanted in each for each in said(report, mark)), report.findings
    assert all(each.remedy for each in report.findings if each.mark in (Mark.BAD, Mark.WARN))
    if mark is not Mark.BAD:
        assert said(report, Mark.BAD) == []
