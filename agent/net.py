"""What several rooms need of the network: what can be listened on here, HTTP requests with bounds, and JSON.

The parts share no code. The first asks this machine: addresses, ports, and the kernel's kills for memory. The second
asks others: every body is requested without an encoding and refused when it has one all the same (of a gzip in a gzip,
2.6 KB are 3 GB in memory before a bound on the output is looked at), is read up to a bound, and whatever the way there
raises is an `httpx.HTTPError` or a `MalformedMessage`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import httpx
import orjson

from agent.core.errors import MalformedMessage, TooLarge, Unavailable

EVERYWHERE: Final = frozenset({"", "::", "0.0.0.0"})  # noqa: S104 - compared with, not bound to


def listening_host(wanted: str) -> str:
    """Return `wanted`, or the IPv4 form of "everywhere" where the kernel has no IPv6."""
    if wanted != "::":
        return wanted
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return "0.0.0.0"  # noqa: S104 - the container's network decides who reaches it
    return wanted


def visitors_hosts(host: str) -> tuple[str, ...]:
    """Return the addresses at which others reach a server that is to listen on `host`, the first to try first.

    For "everywhere" these are this machine's own addresses towards others, not loopback: a server that listens on
    loopback alone is reached by nobody. Loopback only where the machine has no other.
    """
    if host not in EVERYWHERE:
        return (host,)
    found = []
    # Connecting a datagram socket sends nothing: it asks which of our addresses would be used.
    for family, there in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((there, 9))
            found.append(str(probe.getsockname()[0]))
    return tuple(found) or ("127.0.0.1", "::1")


def port_is_free(host: str, port: int) -> bool:
    """Return whether a server could listen there now.

    An address that cannot be used at all counts as free: the server's own message says more.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
        return True


def out_of_memory_kills() -> int:
    """Count the kernel's kills for memory in our control group, else on the whole machine; 0 if unknown."""
    if sys.platform != "linux":
        return 0
    for file in (*_own_group(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            for line in file.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def _own_group() -> list[Path]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return [Path("/sys/fs/cgroup", line[3:].lstrip("/"), "memory.events")]
    return []


IDENTITY: Final = {"accept-encoding": "identity"}
"""For every request: the bytes that arrive are the body's."""


@asynccontextmanager
async def exchange(
    http: httpx.AsyncClient,
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    content: bytes | AsyncIterator[bytes] | None = None,
    timeout: httpx.Timeout | float | None = None,
) -> AsyncIterator[httpx.Response]:
    """Send one request and yield the response, its body not yet read. Follows no redirect.

    Raises:
        httpx.HTTPError: the way there failed.
        MalformedMessage: the URL cannot be requested. httpx checks little of one: a port above 65535 is an
            OverflowError in an ExceptionGroup, a strange name whatever the codec of names raises.
    """
    try:
        asked = http.build_request(
            method, url, headers={**(headers or {}), **IDENTITY}, content=content, timeout=timeout
        )
        response = await http.send(asked, stream=True, follow_redirects=False)
    except httpx.UnsupportedProtocol:
        raise MalformedMessage("a URL", "it is not an http or https URL") from None
    except httpx.HTTPError:
        raise
    except Exception as error:
        # The class, not the text, and no cause: URLs are credentials.
        raise MalformedMessage("a URL", f"nobody can be asked at it ({_kind(error)})") from None
    try:
        yield response
    finally:
        await response.aclose()


def _kind(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return type(error).__name__


def coding(response: httpx.Response) -> str | None:
    """Return the body's encoding, which was not asked for; None when it has none."""
    said = str(response.headers.get("content-encoding", "")).strip().lower()
    return None if said in ("", "identity") else said[:50]


async def read_whole(response: httpx.Response, what: str, most: int) -> bytes:
    """Read the body. Raises `Unavailable` when it is encoded, `TooLarge` above `most` bytes."""
    if (encoded := coding(response)) is not None:
        raise Unavailable(what, f"the answer is encoded as {encoded!r}, which was not asked for")
    body = await read_start(response, most + 1)
    if len(body) > most:
        raise TooLarge(what, f"the answer is larger than {most} bytes")
    return body


async def read_start(response: httpx.Response, most: int) -> bytes:
    """Read the first `most` bytes of the body, as they came."""
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) >= most:
            break
    return bytes(body[:most])


def json_bytes(value: object, option: int = 0) -> bytes:
    """Write `value` as JSON, whatever text and numbers it has from outside; `option` is orjson's.

    Half a surrogate pair (a byte that is not UTF-8, in what a project says) is escaped, an integer beyond 64 bits
    becomes text: orjson refuses both, and one such character in a script's name must not silence a whole report.
    """
    try:
        return orjson.dumps(value, default=str, option=option)
    except TypeError:
        return orjson.dumps(_writable(value), default=str, option=option)


def _writable(value: object) -> object:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {_writable(str(key)): _writable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(each) for each in value]
    return str(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value
