"""Examines the door: whether browsers find it by every name below its domain, and trust what they find there."""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.findings import Report
from orchestrator_stub.door.decision import LIVEZ, Address
from orchestrator_stub.door.passes import door_keys

SECONDS: Final = 5.0
"""For one answer; two of them stay below what a part of the examination may take."""
EXPIRES_SOON: Final = 14 * 86400.0
"""Seconds. Who renews by themselves do so a month before the end."""

Resolve = Callable[[str], Awaitable[Sequence[str]]]


async def resolve(name: str) -> Sequence[str]:
    """The addresses of a name. Raises `OSError`."""
    found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted({str(each[4][0]) for each in found})


async def examine_door(settings: Settings, report: Report, *, resolve: Resolve = resolve) -> None:
    """Examine the domain, its records, its certificate and the keys. `resolve` as the function above."""
    if settings.preview_domain is None:
        report.ok("not used: no PREVIEW_DOMAIN")
        return
    try:
        door_keys(settings.door_keys.get_secret_value() if settings.door_keys else "")
    except ValueError as error:
        report.bad(f"DOOR_KEYS cannot be read: {error}", "k1:$(openssl rand -base64 32)")
    address = Address(settings.preview_domain)
    domain, _, port = address.domain.partition(":")
    if address.plain:
        _loopback(settings, report)
        return
    _apart(settings, domain, report)
    names = [f"p{secrets.token_hex(12)}.{domain}" for _ in range(2)]
    found: list[str] = []
    for name in names:
        try:
            async with asyncio.timeout(SECONDS):
                found.extend(await resolve(name))
        except (OSError, UnicodeError):
            report.bad(
                f"{name} has no address", f"a wildcard DNS record: *.{domain} to the server that ends TLS"
            )
            return
    if any(_is_loopback(each) for each in found):
        report.warn(f"*.{domain} is {found[0]}: this machine alone finds it", "see its wildcard DNS record")
    await _https(found[0], names[0], int(port or 443), report)


def _loopback(settings: Settings, report: Report) -> None:
    if settings.machine_driver == "fly":
        report.bad(
            f"PREVIEW_DOMAIN={settings.preview_domain} is every browser's own machine",
            "a domain of its own, with a wildcard record and certificate: docs/door.md",
        )
    else:
        report.ok(f"{settings.preview_domain} is reached by http, from this machine alone")


def _apart(settings: Settings, domain: str, report: Report) -> None:
    """Whether the project's code, on hosts of `domain`, could set cookies for the product's own hosts."""
    for name, url in (("PUBLIC_URL", settings.public_url), ("SUPABASE_URL", settings.supabase_url)):
        host = urlsplit(str(url or "")).hostname or ""
        if host == domain or host.endswith(f".{domain}") or domain.endswith(f".{host}"):
            report.bad(
                f"{name} and the previews share the domain {min(host, domain, key=len)}: a project's code can set "
                "cookies for it",
                "PREVIEW_DOMAIN: a domain of its own, as example.dev beside example.com",
            )
        elif host.split(".")[-2:] == domain.split(".")[-2:] and not _is_address(host):
            report.warn(
                f"{name} ({host}) and the previews may share cookies of {'.'.join(domain.split('.')[-2:])}",
                "PREVIEW_DOMAIN: a domain of its own, unless that is a public suffix",
            )


@dataclass(frozen=True)
class _Answer:
    expires_at: float
    """Of the certificate, Unix seconds."""
    status: str
    body: bytes


async def _https(where: str, name: str, port: int, report: Report) -> None:
    """Whether a browser that asks `where` for `name` finds a door, with a certificate that it trusts."""
    wildcard = f"*.{name.partition('.')[2]}"
    try:
        async with asyncio.timeout(SECONDS):
            answer = await _ask(where, name, port)
    except ssl.SSLCertVerificationError as error:
        remedy = f"a certificate for {wildcard}, by the DNS challenge, with its whole chain"
        report.bad(f"browsers do not trust {name}: {error.verify_message}", remedy)
    except ssl.SSLError as error:
        report.bad(f"{where}:{port} speaks no TLS: {error.reason}", "see what ends TLS: docs/door.md")
    except (OSError, EOFError):
        report.skip(f"{where}:{port} does not answer", "it does once what ends TLS runs; ask again then")
    else:
        days = int((answer.expires_at - time.time()) / 86400)
        if answer.expires_at - time.time() < EXPIRES_SOON:
            report.warn(f"the certificate of {wildcard} ends in {days} days", "see who should renew it")
        if answer.status != "200" or answer.body.strip() != b"open":
            report.bad(
                f"https://{wildcard} answers, and no door that works is behind it: HTTP {answer.status}",
                "it must pass on the Host that was asked for, to DOOR_HOST:DOOR_PORT: docs/door.md",
            )
        else:
            report.ok(f"https://{wildcard} is a door, with a certificate for {days} days more")


async def _ask(where: str, name: str, port: int) -> _Answer:
    """Ask for `LIVEZ` by a name. Raises `OSError`, `EOFError`, `TimeoutError`."""
    reader, writer = await asyncio.open_connection(
        where, port, ssl=ssl.create_default_context(), server_hostname=name
    )
    try:
        certificate = writer.get_extra_info("peercert")
        host = name if port == 443 else f"{name}:{port}"
        writer.write(f"GET {LIVEZ} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        status = head.decode("latin-1").partition(" ")[2][:3]
        return _Answer(ssl.cert_time_to_seconds(certificate["notAfter"]), status, await reader.read(1000))
    except asyncio.LimitOverrunError as error:
        raise EOFError(str(error)) from None
    finally:
        writer.transport.abort()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    return _is_address(address) and ipaddress.ip_address(address).is_loopback
