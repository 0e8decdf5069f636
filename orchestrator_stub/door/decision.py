"""Decides what becomes of a request. PURE: what was asked, what stands behind the host, and the time go in.

    address             who asks                                     action
    ------------------  -------------------------------------------  ------------------------------------------
    a host of nobody's  anybody                                      Refuse 404
    OWN_PATHS           see each                                     Enter · Check · Follow · Wake
    anything else       a pass for a session that stands             Proxy, or Wait where it is not ready
                        nobody in particular, and it is public       the same, for the newest session
                        otherwise                                    Refuse 401

A request that another site's page makes for a part of its own (`Sec-Fetch-Site`, `Origin`) shows no pass, whatever its
cookies say: pages of two projects may stand side by side in one product, and a browser sends the cookies of both. An
upgrade needs the `Origin` to be its own host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

from orchestrator_stub.door.heads import Asked

OWN: Final = "/.preview-door/"
"""Below it the door answers itself, and the project's code is never asked."""
ENTER, CHECK, EVENTS, WAKE, LIVEZ = (OWN + name for name in ("enter", "check", "events", "wake", "livez"))

LABEL: Final = re.compile(r"p[0-9a-f]{24}")
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
MOST_ADDRESS: Final = 2048
"""Characters of the path that a code leads to."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What a code or a cookie says. `expires_at` in Unix seconds."""

    session_id: UUID
    version: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Address:
    """Under which names the door is reached.

    `domain` has its port where it is not the scheme's own. `home`: the label that the bare loopback addresses stand
    for, where there is one project (`dev`). `open`: everybody is let in (`dev`), so that pages of other sites are kept
    out by where they come from alone.
    """

    domain: str
    home: str | None = None
    open: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is reached by http: on this machine alone."""
        name = self.domain.partition(":")[0]
        return name == "localhost" or name.endswith(".localhost")

    @property
    def scheme(self) -> str:
        return "http" if self.plain else "https"

    @property
    def cookie(self) -> bytes:
        """The name of the cookie. The prefix has browsers refuse it from any other host."""
        return b"preview" if self.plain else b"__Host-preview"

    def url(self, label: str) -> str:
        """Where a preview is, without a slash at the end."""
        return f"{self.scheme}://{label}.{self.domain}"

    def label(self, host: str) -> str | None:
        """The label that a `Host` (in lower case) names; None: it is not one of ours."""
        name, colon, port = host.rpartition(":") if not host.endswith("]") else (host, "", "")
        if not colon:
            name, port = host, ""
        ours, _, our_port = self.domain.partition(":")
        standard = "80" if self.plain else "443"
        if (port or standard) != (our_port or standard):
            return None
        if self.home is not None and name in LOOPBACK:
            return self.home
        label, dot, domain = name.partition(".")
        return label if dot and domain == ours and LABEL.fullmatch(label) else None


@dataclass(frozen=True, slots=True)
class Behind:
    """One session behind a label. `ready`: its preview has been served. `run`: its run settings that are no secret."""

    session_id: UUID
    state: str
    preview_url: str | None
    version: int
    expires_at: float
    machine_driver: str | None = None
    machine_id: str | None = None
    run: Mapping[str, object] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.state == "ready" and self.preview_url is not None

    @property
    def over(self) -> bool:
        return self.state == "draining"

    @property
    def public(self) -> bool:
        return self.run.get("public") is True


Standing = Sequence[Behind]
"""The sessions behind a label that are not over, newest first."""


@dataclass(frozen=True, slots=True)
class Grant:
    """Why somebody is let in: by a pass for this session, or (`version` None) because it is public."""

    session_id: UUID
    version: int | None = None

    def holds(self, standing: Standing, now: float, *, open: bool) -> bool:
        """Whether it still lets in."""
        one = next((each for each in standing if each.session_id == self.session_id), None)
        if one is None or one.over or one.expires_at <= now:
            return False
        return one.version == self.version if self.version is not None else open or one.public


@dataclass(frozen=True, slots=True)
class Refuse:
    """`status` with `why`; as a page for a person."""

    status: int
    why: str


@dataclass(frozen=True, slots=True)
class Enter:
    """A code was good: set the cookie of this session and lead on to `to`, by way of `CHECK`."""

    session: Behind
    to: str


@dataclass(frozen=True, slots=True)
class Check:
    """The cookie came back or not (`blocked`)."""

    to: str
    blocked: bool


@dataclass(frozen=True, slots=True)
class Proxy:
    """Ask the session's dev server."""

    session: Behind
    grant: Grant


@dataclass(frozen=True, slots=True)
class Wait:
    """The session is not ready: a page that says so, to a person; 503 to a program."""

    session: Behind
    grant: Grant


@dataclass(frozen=True, slots=True)
class Follow:
    """Tell how the start goes on, as it goes."""

    session: Behind
    grant: Grant


@dataclass(frozen=True, slots=True)
class Wake:
    """Somebody wants it to be tried again."""

    session: Behind
    grant: Grant


Action = Refuse | Enter | Check | Proxy | Wait | Follow | Wake

UNAUTHORIZED: Final = Refuse(401, "This preview is not open to you. Open it from where you found it.")
FOREIGN: Final = Refuse(403, "Only pages of this preview may ask that.")


def judge(
    asked: Asked,
    standing: Standing | None,
    *,
    address: Address,
    code: Pass | None,
    passes: Sequence[Pass],
    now: float,
) -> Action:
    """Say what becomes of a request.

    Args:
        asked: The request.
        standing: What stands behind its host; None: nothing does.
        address: The door's.
        code: What the code in its address says, if one is there and good.
        passes: What its cookies say, as far as they are good.
        now: Unix seconds.
    """
    if standing is None:
        return Refuse(404, "There is no preview of this name.")
    if asked.path == ENTER:
        return _enter(asked, standing, code, now)
    own = own_origin(asked, address)
    if asked.upgrade and asked.origin != own:
        return FOREIGN
    foreign = _foreign(asked, own)
    if foreign and address.open:
        return FOREIGN
    found = None if foreign else _by_pass(standing, passes, now)
    if asked.path == CHECK:
        return Check(landing(asked.query), blocked=found is None)
    if found is None:
        found = _by_being_public(standing, now, open=address.open)
    if found is None:
        if address.open:
            return Refuse(404, "The project has no session now.")
        return UNAUTHORIZED
    session, grant = found
    if asked.path.startswith(OWN):
        return _own(asked, session, grant, own)
    return Proxy(session, grant) if session.ready else Wait(session, grant)


def own_origin(asked: Asked, address: Address) -> str:
    """The origin of the page that a request would come from if it is the preview's own."""
    standard = ":80" if address.plain else ":443"
    return f"{address.scheme}://{asked.host.removesuffix(standard)}"


def code_of(asked: Asked) -> str | None:
    """The code in the address."""
    return _query(asked.query, "code") if asked.path in (ENTER, CHECK) else None


def known(code: Pass, standing: Standing) -> bool:
    """Whether what a good code was signed for is among these, or older: else they are older than the code."""
    return any(each.session_id == code.session_id and each.version >= code.version for each in standing)


def landing(query: str) -> str:
    """The path that a code leads to: one of this host, whatever was asked."""
    to = _query(query, "to") or "/"
    parts = urlsplit(to) if to.startswith("/") and not to.startswith(("//", "/\\")) else None
    if parts is None or parts.scheme or parts.netloc or len(to) > MOST_ADDRESS or not to.isascii():
        return "/"
    return to if to.isprintable() and "\\" not in to and not to.startswith(OWN) and " " not in to else "/"


def _query(query: str, name: str) -> str | None:
    try:
        found = parse_qs(query, max_num_fields=10).get(name)
    except ValueError:
        return None
    return found[0] if found else None


def _enter(asked: Asked, standing: Standing, code: Pass | None, now: float) -> Action:
    if asked.method != "GET" or asked.upgrade:
        return Refuse(405, "A code is followed by GET.")
    found = _by_pass(standing, [code] if code else [], now)
    if found is None:
        return Refuse(
            401, "This address was good for a minute. Open the preview again from where you found it."
        )
    return Enter(found[0], landing(asked.query))


def _foreign(asked: Asked, own: str) -> bool:
    """Whether a page of another origin asks, for something else than to go there."""
    if asked.origin is not None and asked.origin != own:
        # A form of another site that is sent here is its receiver's to judge, as everywhere.
        return asked.fetch_mode != "navigate"
    return asked.fetch_site in ("cross-site", "same-site") and asked.fetch_mode != "navigate"


def _by_pass(standing: Standing, passes: Sequence[Pass | None], now: float) -> tuple[Behind, Grant] | None:
    for given in passes:
        if given is None or given.expires_at <= now:
            continue
        grant = Grant(given.session_id, given.version)
        if grant.holds(standing, now, open=False):
            return next(each for each in standing if each.session_id == given.session_id), grant
    return None


def _by_being_public(standing: Standing, now: float, *, open: bool) -> tuple[Behind, Grant] | None:
    """The newest session that is ready, else the newest; of those that are open to everybody."""
    may = [each for each in standing if Grant(each.session_id).holds(standing, now, open=open)]
    one = next((each for each in may if each.ready), may[0] if may else None)
    return (one, Grant(one.session_id)) if one else None


def _own(asked: Asked, session: Behind, grant: Grant, own: str) -> Action:
    match asked.path, asked.method:
        case "/.preview-door/events", "GET" if not asked.upgrade:
            return Follow(session, grant)
        case "/.preview-door/wake", "POST" if asked.origin == own:
            return Wake(session, grant)
        case "/.preview-door/wake", "POST":
            return FOREIGN
    return Refuse(404, "The door has no such page.")
