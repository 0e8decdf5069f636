"""The link against the whole local server: PostgreSQL, its row-level security, and the server's own fault switches."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import pytest_asyncio
from psycopg import sql
from psycopg.conninfo import make_conninfo

from agent.core.errors import CredentialRejected
from agent.link.realtime import realtime_link
from agent.link.source import Received
from agent.link.types import LinkState
from agent.tokens import Token, Tokens
from orchestrator_stub.local_supabase.realtime.faults import Faults
from orchestrator_stub.platform.tokens import Keyring
from tests.agent.link.one_link import QUICK, Link, running, until
from tests.fakes.serving import Local, serve_local

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = replace(
    QUICK, timing=replace(QUICK.timing, join_within=5.0, heartbeat_every=1.0, heartbeat_within=2.0)
)


@pytest.fixture(scope="module")
def module_database(postgres_dsn: str, template_database: str) -> Iterator[str]:
    """As `database`, for the whole module."""
    name = f"preview_{uuid4().hex[:12]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        made = sql.SQL("create database {} template {}")
        server.execute(made.format(sql.Identifier(name), sql.Identifier(template_database)))
        yield make_conninfo(postgres_dsn, dbname=name)
        server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Local]:
    async with serve_local(module_database, tmp_path_factory.mktemp("link") / "storage") as running_server:
        yield running_server


@pytest_asyncio.fixture(loop_scope="module")
async def local(served: Local) -> AsyncIterator[Local]:
    yield served
    served.stand_in.realtime.faults = Faults()


class Session:
    """One project's session on the server: its tokens, and what the database sends and holds."""

    def __init__(self, local: Local) -> None:
        self.local = local
        self.project = str(uuid4())
        self.topic = f"project:{self.project}"
        self.head = 0
        self.renewed = 0
        self.may_renew = True
        self.tokens = Tokens(self.mint())
        self.stream = realtime_link(
            f"{local.url}/realtime/v1", local.keys.anon_key, f"realtime:{self.topic}", self, settings=SETTINGS
        )

    def mint(self, **claims: Any) -> str:
        claims = {"project_id": self.project, "session_id": str(uuid4()), **claims}
        return self.local.token(iat=int(time.time()), **claims)

    def current(self) -> Token | None:
        return self.tokens.current()

    @property
    def problem(self) -> str | None:
        return None

    async def renew_token(self) -> Token:
        if not self.may_renew:
            raise CredentialRejected("session API (token) refused the token: HTTP 401")
        self.renewed += 1
        return self.tokens.accept(self.mint(n=self.renewed))

    async def commit(self) -> int:
        self.head += 1
        await self.local.send(self.topic, "file:update", {"revision": self.head})
        return self.head


def revisions(link: Link) -> set[object]:
    return {signal.payload["revision"] for signal in link.signals if isinstance(signal, Received)}


async def hears(session: Session, link: Link, within: float = 60.0) -> None:
    """Live, and a commit made from now on arrives through the socket."""
    deadline = time.monotonic() + within
    while True:
        await link.live()
        revision = await session.commit()
        with contextlib.suppress(AssertionError):
            await until(lambda: revision in revisions(link), "the commit", 1.0)  # noqa: B023
            return
        assert time.monotonic() < deadline, f"nothing received: {link.stream.report()}"


async def test_what_the_database_sends_arrives(local: Local) -> None:
    session = Session(local)
    async with running(session.stream) as link:
        await link.live()
        for _ in range(20):
            await session.commit()
        await until(lambda: len(link.events) == 20, "twenty events")
    assert [payload["revision"] for _, payload in link.events] == list(range(1, 21))  # type: ignore[index]
    assert link.resyncs[0] == "joined"


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"action": "close", "code": 1000}, "closed_1000"),
        ({"action": "close", "code": 1001}, "closed_1001"),
        ({"action": "close", "code": 1012}, None),
        ({"action": "abort"}, "reset"),
        ({"action": "oversize", "size": 9_000_000}, "oversize"),
        ({"action": "rate_limit"}, "rate_limited"),
        ({"action": "crash"}, "channel_error"),
        ({"mute_heartbeats": True}, "heartbeat_timeout"),
        ({"blackout": 4.0}, "heartbeat_timeout"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
async def test_comes_back(local: Local, fault: dict[str, Any], cause: str | None) -> None:
    session = Session(local)
    async with running(session.stream) as link:
        await hears(session, link)
        await local.fault(**fault)
        await until(lambda: link.stream.report()["losses"] != {}, "the loss to show")
        local.stand_in.realtime.faults = Faults()
        await hears(session, link)
        assert link.resyncs.count("joined") >= 2
        if cause is not None:
            assert cause in link.stream.report()["losses"]  # type: ignore[operator]


@pytest.mark.parametrize(("status", "text"), [(401, "Token has expired"), (429, "Too many connected users")])
async def test_a_refused_handshake_is_tried_again(local: Local, status: int, text: str) -> None:
    session = Session(local)
    await local.fault(refuse=2, refuse_status=status, refuse_error=text)
    async with running(session.stream) as link:
        await hears(session, link)
        assert link.stream.report()["refusals"] == {str(status): 2}


async def test_expiry_is_joined_again_on_the_same_socket(local: Local) -> None:
    session = Session(local)
    async with running(session.stream) as link:
        await hears(session, link)
        await asyncio.sleep(SETTINGS.rejoin_least)
        await local.fault(action="expire_tokens")
        await until(lambda: link.stream.report()["joins"] == 2, "the second join")
        await hears(session, link)
        assert link.stream.report()["sockets"] == 1
        assert session.renewed == 1


async def test_a_token_pushed_in_time_outlives_the_first(local: Local) -> None:
    """The first token really ends on the server's clock; the channel does not."""
    session = Session(local)
    session.tokens = Tokens(session.mint(exp=int(time.time()) + 3))
    async with running(session.stream) as link:
        await hears(session, link)
        first = session.current()
        await until(lambda: first is not None and first.expired(time.time() - 0.5), "the first token to end")
        await hears(session, link)
        assert link.stream.report()["joins"] == 1
        assert session.renewed >= 1


@pytest.mark.parametrize(
    "kind", ["other_project", "tampered", "without_role", "alg_none", "foreign_key", "expired"]
)
async def test_a_token_that_does_not_count_is_refused_and_shown(local: Local, kind: str) -> None:
    session = Session(local)
    session.may_renew = False
    good = session.mint()
    session.tokens = Tokens(
        {
            "other_project": lambda: session.mint(project_id=str(uuid4())),
            "tampered": lambda: good[:-8] + "AAAAAAAA",
            "without_role": lambda: local.keys.keyring.sign({"exp": int(time.time()) + 60}),
            "alg_none": lambda: "eyJhbGciOiJub25lIn0." + good.split(".")[1] + ".",
            "foreign_key": lambda: Keyring.from_secret("somebody else's secret, of the same length").sign(
                {"role": "preview_agent", "exp": int(time.time()) + 60, "project_id": session.project}
            ),
            "expired": lambda: session.mint(exp=int(time.time()) - 60),
        }[kind]()
    )
    async with running(session.stream) as link:
        await until(lambda: link.stream.state is LinkState.REFUSED, "the refusal")
        await until(lambda: bool(link.stream.problems()), "the problem")
        assert link.stream.problems()[0].kind == "token_refused"
        await session.commit()
        assert link.events == []
        session.may_renew = True
        await hears(session, link)
        assert link.stream.problems() == ()
