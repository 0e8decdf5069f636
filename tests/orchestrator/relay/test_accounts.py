"""What a machine's token opens, and every way past it, tried against a real nats-server from both sides."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from nats.errors import Error as NatsError

from orchestrator_stub.relay.accounts import IN, OUT, STREAM, Account, NatsKeys, Operator
from orchestrator_stub.relay.embedded import EmbeddedNats
from orchestrator_stub.relay.keys import Key
from orchestrator_stub.relay.publisher import Event, NatsStream
from tests.orchestrator.relay.nats_world import client, machine, settled, stream_of, stream_owner, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

MINE, OTHERS = UUID(int=1), UUID(int=2)
"""Projects. They are in the names of tests, which every process of pytest-xdist has to find alike."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stream(server: EmbeddedNats) -> AsyncIterator[NatsStream]:
    made = stream_of(server)
    await made.publish(event(MINE, "first"))
    await made.publish(event(OTHERS, "a secret of another project"))
    yield made
    await made.close()


def event(project: UUID, payload: str) -> Event:
    return Event(1, 0, str(project), "file:update", f"{project}:{uuid4()}", payload)


async def stored(server: EmbeddedNats) -> tuple[int, int, int]:
    """Messages, last sequence and consumers of the stream, as its owner sees them."""
    async with client(server.url, stream_owner(server)) as owner:
        state = (await owner.jetstream().stream_info(STREAM)).state
        return state.messages, state.last_seq, state.consumer_count


async def test_a_machine_hears_its_project_and_what_the_stream_says_of_it(
    server: EmbeddedNats, stream: NatsStream
) -> None:
    async with client(server.url, machine(server, MINE)) as mine:
        heard = await mine.subscribe(f"{OUT}{MINE}")
        await settled(mine)
        await stream.publish(event(MINE, "hello"))
        message = await heard.next_msg(5)
    assert message.data == b"hello"
    assert message.headers is not None
    assert message.headers["Nats-Subject"] == f"{IN}{MINE}"
    assert message.headers["Nats-Stream"] == STREAM
    assert message.headers["Pv-Event"] == "file:update"


async def test_the_same_message_twice_is_one(server: EmbeddedNats, stream: NatsStream) -> None:
    async with client(server.url, machine(server, MINE)) as mine:
        heard = await mine.subscribe(f"{OUT}{MINE}")
        await settled(mine)
        twice = event(MINE, "once")
        assert [await stream.publish(twice), await stream.publish(twice)] == [True, False]
        await stream.publish(event(MINE, "then"))
        assert [(await heard.next_msg(5)).data for _ in range(2)] == [b"once", b"then"]


DEAF = [f"{OUT}{OTHERS}", f"{OUT}*", f"{OUT}>", ">", f"{IN}{MINE}", f"{IN}>", "_INBOX.>", "$SYS.>", "$JS.>"]


@pytest.mark.parametrize("subject", DEAF)
async def test_a_machine_hears_nothing_else(server: EmbeddedNats, stream: NatsStream, subject: str) -> None:
    async with client(server.url, machine(server, MINE)) as mine:
        heard = await mine.subscribe(subject)
        await settled(mine)
        await stream.publish(event(OTHERS, "a secret"))
        await settled(mine)
        assert heard.pending_msgs == 0
        assert any("permissions violation" in said for said in mine.said)  # type: ignore[attr-defined]


API = [
    "$JS.API.INFO", "$JS.API.STREAM.LIST", f"$JS.API.STREAM.INFO.{STREAM}", f"$JS.API.STREAM.DELETE.{STREAM}",
    f"$JS.API.STREAM.PURGE.{STREAM}", f"$JS.API.STREAM.MSG.GET.{STREAM}", f"$JS.API.STREAM.MSG.DELETE.{STREAM}",
    f"$JS.API.DIRECT.GET.{STREAM}", f"$JS.API.DIRECT.GET.{STREAM}.{IN}{MINE}",
    f"$JS.API.DIRECT.GET.{STREAM}.{IN}{OTHERS}",
    f"$JS.API.CONSUMER.CREATE.{STREAM}", f"$JS.API.CONSUMER.CREATE.{STREAM}.x.{IN}{MINE}", "$JS.API.STREAM.CREATE.MINE",
]  # fmt: skip
SAID = [
    f"{IN}{MINE}",
    f"{IN}{OTHERS}",
    f"{OUT}{MINE}",
    f"{OUT}{OTHERS}",
    "pv.last.x",
    "$SYS.REQ.SERVER.PING",
    "_INBOX.x",
]


@pytest.mark.parametrize("subject", [*SAID, *API])
@pytest.mark.parametrize("reply", ["", f"{IN}{OTHERS}", f"{OUT}{OTHERS}", f"$JS.API.STREAM.PURGE.{STREAM}"])
async def test_a_machine_says_nothing_at_all(
    server: EmbeddedNats, stream: NatsStream, subject: str, reply: str
) -> None:
    """Neither directly nor by where an answer is sent to: nothing is stored, purged or made, and nobody hears it."""
    before = await stored(server)
    async with client(server.url, machine(server, OTHERS)) as other:
        heard = await other.subscribe(f"{OUT}{OTHERS}")
        await settled(other)
        async with client(server.url, machine(server, MINE)) as mine:
            await mine.publish(subject, b"{}", reply=reply)
            await settled(mine)
            assert any("permissions violation" in said for said in mine.said)  # type: ignore[attr-defined]
        await settled(other)
        assert heard.pending_msgs == 0
    assert await stored(server) == before


async def refused(url: str, token: str | None) -> bool:
    try:
        async with client(url, token) as connected:
            await settled(connected)
    except (NatsError, OSError):
        return True
    return False


def forged(claims: dict[str, Any], algorithm: str = "none") -> str:
    parts = [{"typ": "JWT", "alg": algorithm}, claims]
    return (
        ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + "."
    )


async def test_only_tokens_of_our_accounts_let_anybody_in(server: EmbeddedNats) -> None:
    keys, session, soon = server.operator.keys, uuid4(), time.time() + 600
    good = machine(server, MINE)
    body = good.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    theirs = Operator().keys
    wrong = {
        "none at all": None,
        "empty": "",
        "junk": "a.b.c",
        "expired": keys.machine_token(MINE, session, time.time() - 10),
        "another operator's": theirs.machine_token(MINE, session, soon),
        "another signer, our account": Account(keys.edge.public, Key("account")).user("x", {}, soon),
        "signed by PREVIEW's key for EDGE": Account(keys.edge.public, keys.preview.signing).user(
            "x", {}, soon
        ),
        "signed by EDGE's key for PREVIEW": Account(keys.preview.public, keys.edge.signing).user(
            "x", {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}}, soon
        ),
        "signed by a user's key": Key("user").sign({**claims}),
        "unsigned": forged(claims),
        "its signature cut": good.rpartition(".")[0] + ".",
        "its claims changed": _changed(good, claims),
    }
    let_in = [what for what, token in wrong.items() if not await refused(server.url, token)]
    assert let_in == []
    assert not await refused(server.url, good)


def _changed(token: str, claims: dict[str, Any]) -> str:
    head, _, signature = token.split(".")
    claims = {**claims, "nats": {**claims["nats"], "sub": {"allow": [">"]}}}
    return f"{head}.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.{signature}"


async def test_an_open_connection_ends_with_its_token(server: EmbeddedNats) -> None:
    async with client(server.url, machine(server, MINE, seconds=3)) as mine:
        await mine.subscribe(f"{OUT}{MINE}")
        await settled(mine)
        await until(lambda: mine.is_closed, "the end of the token")


async def test_a_machine_has_three_subscriptions(server: EmbeddedNats) -> None:
    async with client(server.url, machine(server, MINE)) as mine:
        for _ in range(4):
            await mine.subscribe(f"{OUT}{MINE}")
        await until(lambda: mine.is_closed or bool(mine.said), "the refusal")  # type: ignore[attr-defined]


async def test_the_relay_makes_and_fills_the_stream_and_no_more(
    server: EmbeddedNats, stream: NatsStream
) -> None:
    token = server.operator.keys.relay_token("_INBOX.r", time.time() + 600)
    before = await stored(server)
    for subject in (f"$JS.API.STREAM.DELETE.{STREAM}", f"$JS.API.STREAM.PURGE.{STREAM}", f"{OUT}{MINE}"):
        async with client(server.url, token, inbox_prefix=b"_INBOX.r") as relay:
            await relay.publish(subject, b"{}")
            await settled(relay)
            assert any("permissions violation" in said for said in relay.said)  # type: ignore[attr-defined]
    assert await stored(server) == before


async def test_the_keys_are_files_of_their_owner_and_made_once(tmp_path: Path) -> None:
    operator = Operator()
    files = operator.write(tmp_path / "nats")
    assert {file.name: file.stat().st_mode & 0o777 for file in files} == dict.fromkeys(
        ("nats-keys.json", "operator.json", "accounts.conf"), 0o600
    )
    read = NatsKeys.read(tmp_path / "nats" / "nats-keys.json")
    assert read.edge.public == operator.keys.edge.public
    assert read.edge.signing.seed == operator.keys.edge.signing.seed
    secret = (tmp_path / "nats" / "accounts.conf").read_text()
    assert operator.keys.edge.signing.seed not in secret
    with pytest.raises(FileExistsError):
        Operator().write(tmp_path / "nats")
    (tmp_path / "junk.json").write_text('{"preview": {"account": "A", "signing_seed": "SAJUNK"}}')
    with pytest.raises(ValueError, match=r"^it is no") as said:
        NatsKeys.read(tmp_path / "junk.json")
    assert "SAJUNK" not in str(said.value)


async def test_no_secret_is_in_the_server_s_log(server: EmbeddedNats) -> None:
    token = machine(server, MINE)
    async with client(server.url, token) as mine:
        await settled(mine)
    assert await refused(server.url, token[:-9])
    await asyncio.sleep(0)
    log = server.log.read_text()
    assert token.split(".")[2][:40] not in log
    assert "SA" + server.operator.keys.edge.signing.seed[2:] not in log
