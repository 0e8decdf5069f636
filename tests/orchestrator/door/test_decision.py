"""Who is let in: a table of all that the decision depends on; what is one session's never opens another."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.door.decision import (
    CHECK,
    ENTER,
    EVENTS,
    OWN,
    WAKE,
    Address,
    Behind,
    Check,
    Enter,
    Follow,
    Grant,
    Pass,
    Proxy,
    Refuse,
    Wait,
    Wake,
    judge,
    landing,
)
from orchestrator_stub.door.heads import Asked

NOW = 1_000.0
ADDRESS = Address("preview.test")
LABEL = "p" + "a" * 24
HOST = f"{LABEL}.preview.test"
A, B = UUID(int=1), UUID(int=2)
STATES = ("requested", "provisioning", "ready", "suspended", "draining", None)
"""None: the session is over, and stands behind nothing."""
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
PATHS = ("/", "/src/App.tsx", ENTER, CHECK, EVENTS, WAKE, OWN + "other")


def asked(path: str = "/", method: str = "GET", **more: Any) -> Asked:
    base = Asked(method, path, "", HOST, (), None, None, None, accepts_html=True, upgrade=False)
    return replace(base, **more)


def behind(session_id: UUID = A, state: str = "ready", version: int = 0, **more: Any) -> Behind:
    run = {"public": True} if more.pop("public", False) else {}
    url = "http://127.0.0.1:1" if state in ("ready", "suspended", "draining") else None
    return Behind(session_id, state, url, version, **{"expires_at": NOW + 100, "run": run, **more})


def shown(session_id: UUID = A, version: int = 0, expires_at: float = NOW + 50) -> Pass:
    return Pass(session_id, version, expires_at)


def judged(
    request: Asked, *standing: Behind, code: Pass | None = None, cookie: Pass | None = None, **more: Any
) -> Any:
    address = more.get("address", ADDRESS)
    return judge(request, standing, address=address, code=code, passes=[cookie] if cookie else [], now=NOW)


LETS_IN = (Proxy, Wait, Follow, Wake, Enter)


def test_what_is_one_sessions_never_opens_another() -> None:
    """Every pair of states, every method, with and without an upgrade, every path: 7,056 requests with A's pass."""
    own = f"https://{HOST}"
    tried = 0
    for state_a, state_b, method, path, upgrade, as_code in product(
        STATES, STATES, METHODS, PATHS, (False, True), (False, True)
    ):
        standing = [
            behind(session_id, state)
            for session_id, state in ((B, state_b), (A, state_a))
            if state is not None
        ]
        request = asked(path, method, upgrade=upgrade, origin=own if upgrade or method == "POST" else None)
        action = judged(request, *standing, **{"code" if as_code else "cookie": shown(A)})
        if isinstance(action, LETS_IN):
            assert action.session.session_id == A
            assert state_a not in (None, "draining")
            assert as_code == (path == ENTER)
        tried += 1
    assert tried == 6 * 6 * 7 * 7 * 2 * 2


@given(
    states=st.tuples(*[st.sampled_from(STATES)] * 2),
    publics=st.tuples(*[st.booleans()] * 2),
    versions=st.tuples(*[st.integers(0, 2)] * 2),
    passes=st.lists(
        st.builds(
            Pass, st.sampled_from([A, B, UUID(int=3)]), st.integers(0, 2), st.sampled_from([NOW - 1, NOW, NOW + 9])
        ),
        max_size=3,
    ),
    code=st.none() | st.builds(Pass, st.sampled_from([A, B]), st.integers(0, 2), st.sampled_from([NOW - 1, NOW + 9])),
    method=st.sampled_from(METHODS),
    path=st.sampled_from(PATHS),
    upgrade=st.booleans(),
    origin=st.sampled_from([None, "null", f"https://{HOST}", "https://evil.test"]),
    site=st.sampled_from([None, "none", "same-origin", "same-site", "cross-site"]),
    mode=st.sampled_from([None, "navigate", "cors", "no-cors", "websocket"]),
    open=st.booleans(),
)  # fmt: skip
def test_nobody_is_let_in_without_a_reason(
    states: tuple[str | None, str | None], publics: tuple[bool, bool], versions: tuple[int, int], passes: list[Pass],
    code: Pass | None, method: str, path: str, upgrade: bool, origin: str | None, site: str | None, mode: str | None,
    open: bool,
) -> None:  # fmt: skip
    standing = [
        behind(session_id, state, version, public=public)
        for session_id, state, version, public in zip((A, B), states, versions, publics, strict=True)
        if state is not None
    ]
    address = Address("localhost:1", open=True) if open else ADDRESS
    host = f"{LABEL}.localhost:1" if open else HOST
    if origin == f"https://{HOST}" and open:
        origin = f"http://{host}"
    request = asked(path, method, host=host, upgrade=upgrade, origin=origin, fetch_site=site, fetch_mode=mode)
    action = judge(request, standing, address=address, code=code, passes=passes, now=NOW)
    own = f"{address.scheme}://{host}"
    if not isinstance(action, LETS_IN):
        return
    session = action.session
    assert not session.over
    assert not (upgrade and origin != own)
    shown_here = [
        each
        for each in ((code and [code]) or [] if isinstance(action, Enter) else passes)
        if (each.session_id, each.version) == (session.session_id, session.version) and each.expires_at > NOW
    ]
    from_elsewhere = mode != "navigate" and (
        (origin is not None and origin != own) or site in ("same-site", "cross-site")
    )
    if isinstance(action, Enter):
        assert shown_here
    else:
        assert session.public or open or (shown_here and not from_elsewhere)
        assert not (open and from_elsewhere)
        assert action.grant.holds(standing, NOW, open=open)


TABLE: list[tuple[str, Asked, list[Behind], dict[str, Any], Any]] = [
    ("a cookie", asked(), [behind()], {"cookie": shown()}, Proxy(behind(), Grant(A, 0))),
    ("nothing", asked(), [behind()], {}, Refuse),
    ("public", asked(), [behind(public=True)], {}, Proxy(behind(public=True), Grant(A))),
    ("public, newest first", asked(), [behind(B, "provisioning", public=True), behind(public=True)], {},
     Proxy(behind(public=True), Grant(A))),
    ("public, none ready", asked(), [behind(B, "provisioning", public=True), behind(A, "requested", public=True)], {},
     Wait(behind(B, "provisioning", public=True), Grant(B))),
    ("one of two is public", asked(), [behind(B), behind(public=True)], {}, Proxy(behind(public=True), Grant(A))),
    ("a cookie, not ready", asked(), [behind(state="suspended")], {"cookie": shown()},
     Wait(behind(state="suspended"), Grant(A, 0))),
    ("a code for a page", asked(query="code=x"), [behind()], {"code": shown()}, Refuse),
    ("a code", asked(ENTER, query="to=%2Fa"), [behind()], {"code": shown()}, Enter(behind(), "/a")),
    ("an old code", asked(ENTER), [behind()], {"code": shown(expires_at=NOW)}, Refuse),
    ("a cookie where a code is wanted", asked(ENTER), [behind()], {"cookie": shown()}, Refuse),
    ("a code by POST", asked(ENTER, "POST"), [behind()], {"code": shown()}, Refuse),
    ("an old cookie", asked(), [behind()], {"cookie": shown(expires_at=NOW)}, Refuse),
    ("a revoked cookie", asked(), [behind(version=1)], {"cookie": shown()}, Refuse),
    ("a session that is over", asked(), [behind(expires_at=NOW)], {"cookie": shown()}, Refuse),
    ("no session", asked(), [], {"cookie": shown()}, Refuse),
    ("it came back", asked(CHECK), [behind()], {"cookie": shown()}, Check("/", blocked=False)),
    ("it did not", asked(CHECK, query="to=/b"), [behind()], {}, Check("/b", blocked=True)),
    ("how it goes", asked(EVENTS), [behind(state="provisioning")], {"cookie": shown()},
     Follow(behind(state="provisioning"), Grant(A, 0))),
    ("again", asked(WAKE, "POST", origin=f"https://{HOST}"), [behind()], {"cookie": shown()},
     Wake(behind(), Grant(A, 0))),
    ("again, from elsewhere", asked(WAKE, "POST", origin="https://evil.test", fetch_mode="navigate"), [behind()],
     {"cookie": shown()}, Refuse),
    ("no such page", asked(OWN + "x"), [behind()], {"cookie": shown()}, Refuse),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "standing", "given_", "wanted"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_who_is_let_in(request_: Asked, standing: list[Behind], given_: dict[str, Any], wanted: Any) -> None:
    action = judged(request_, *standing, **given_)
    assert isinstance(action, wanted) if wanted is Refuse else action == wanted


@pytest.mark.parametrize(
    ("host", "origin"), [(HOST, HOST), (f"{HOST}:443", HOST), (f"{HOST}:444", f"{HOST}:444")]
)
def test_a_page_is_its_own_origin_however_the_port_is_said(host: str, origin: str) -> None:
    request = asked("/ws", host=host, origin=f"https://{origin}", upgrade=True)
    assert isinstance(judged(request, behind(public=True)), Proxy)
    assert isinstance(judged(replace(request, origin=f"https://{HOST}:445"), behind(public=True)), Refuse)


def test_nobody_stands_behind_a_name_of_nobodys() -> None:
    action = judge(asked(), None, address=ADDRESS, code=shown(), passes=[shown()], now=NOW)
    assert action == Refuse(404, "There is no preview of this name.")


@pytest.mark.parametrize("home", [None, LABEL])
def test_hosts(home: str | None) -> None:
    local = Address("localhost:5173", home=home)
    for host, label in {
        f"{LABEL}.localhost:5173": LABEL, "localhost:5173": home, "127.0.0.1:5173": home, "[::1]:5173": home,
        "localhost": None, "127.0.0.1:80": None, "evil.test:5173": None, "localhost.evil.test:5173": None,
    }.items():  # fmt: skip
        assert (host, local.label(host)) == (host, label)
    assert ADDRESS.label(f"{LABEL}.preview.test:443") == LABEL
    assert ADDRESS.label(f"{LABEL}.preview.test:80") is None
    assert Address("localhost").label(f"{LABEL}.localhost:80") == LABEL
    assert (ADDRESS.plain, local.plain, Address("a.localhost:1").plain, Address("notlocalhost").plain) == (
        False, True, True, False,
    )  # fmt: skip
    assert (ADDRESS.cookie, local.cookie) == (b"__Host-preview", b"preview")


@given(st.text(max_size=40))
def test_a_code_leads_to_a_path_of_this_host(to: str) -> None:

    found = landing(f"to={quote(to)}")
    assert found.startswith("/")
    assert found.isascii()
    assert found.isprintable()
    assert urlsplit(urljoin(f"https://{HOST}/x", found)).netloc == HOST
    assert not found.startswith(("//", "/\\", OWN))


@pytest.mark.parametrize(
    "to", ["//evil.test", "/\\evil.test", "https://evil.test", "/a\r\nSet-Cookie: x", "/\t/evil", ENTER, "é"]
)
def test_and_nowhere_else(to: str) -> None:

    assert landing(f"to={quote(to)}") == "/"
