"""How the link is held, and where it connects to. Every number with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from agent.phoenix import Timing

VSN: Final = "2.0.0"


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Every knob of the link but the protocol's deadlines. Seconds and bytes."""

    timing: Timing = field(default_factory=Timing)
    open_within: float = 10.0
    """For TCP, TLS and the handshake together."""
    backoff_first: float = 0.5
    backoff_most: float = 30.0
    """Full jitter between nothing and min(most, first x 2^n): a thousand agents must not come back together, and
    the server closes whoever joins too fast (1001)."""
    backoff_least: float = 0.05
    """Never a tight loop, however the dice fall."""
    stable_after: float = 30.0
    """A link live this long has earned a fresh backoff."""
    refused_retry: float = 60.0
    """Between attempts with a credential that was turned away; spread over half to all of it."""
    renew_pause: float = 30.0
    """Least time between two renewals nobody asked for, so that a wrong clock cannot make a loop of them."""
    renew_within: float = 20.0
    """For a whole renewal: an answer that trickles in must not hold the link up."""
    rejoin_least: float = 5.0
    """A channel that tells of expiry sooner than this after its join is not joined again on the same socket: the
    backoff stands between us and a loop of joins."""
    max_frame: int = 8 * 1024 * 1024
    """The server sends at most 5,000,000 bytes in a frame; the `websockets` default of 1 MiB would close."""
    queue_events: int = 4096
    queue_bytes: int = 64 * 1024 * 1024
    """Beyond either, everything waiting is dropped for one `Resync`: the database has it all."""
    clock_jump: float = 5.0
    """Wall clock against monotonic. Slewing never gets here; a suspended machine does."""
    look_every: float = 1.0
    """How often the clock and a rotated token file are looked at."""
    close_within: float = 1.0
    """For the closing handshake when we leave on our own; a dead peer must not hold up the drain."""


DEFAULTS: Final = LinkSettings()


def endpoint(url: str, api_key: str | None) -> str:
    """The websocket's address, as both official clients build it from the realtime URL.

    Raises `ValueError` for anything but ws, wss, http and https.
    """
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    try:
        parts.port  # noqa: B018 - raises when it is none
    except ValueError:
        scheme = None
    if scheme is None or not parts.hostname:
        raise ValueError("the realtime URL must be ws(s):// or http(s):// with a host and a possible port")
    path = parts.path.rstrip("/")
    if not path.endswith("/websocket"):
        path += "/websocket"
    query = [(k, v) for k, v in parse_qsl(parts.query) if k not in ("apikey", "vsn")]
    query += [("apikey", api_key)] if api_key else []
    return urlunsplit((scheme, parts.netloc, path, urlencode([*query, ("vsn", VSN)]), ""))
