"""How somebody gets in, and how fast they are out again."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError

from orchestrator_stub.door import registry
from orchestrator_stub.door.decision import Address
from orchestrator_stub.door.passes import CODE_SECONDS, Passes, door_keys
from orchestrator_stub.door.store import Access, DoorStore
from orchestrator_stub.platform.sealing import SealingKeys
from orchestrator_stub.platform.tokens import Keyring, new_hs256
from orchestrator_stub.sessions.run_settings import OWNERS, RunBody, RunSettings
from tests.orchestrator.door.test_refused import upgraded
from tests.orchestrator.door.world import (
    KEYS,
    OK,
    DevServer,
    Preview,
    World,
    body,
    count,
    door_world,
    fields,
    status,
    within,
)


async def entered(world: World, preview: Preview, code: str, *more: str, to: str = "/a?b=1") -> bytes:
    path = f"/.preview-door/enter?code={code}&to={to.replace('?', '%3F')}"
    return await world.ask(preview, path, "GET", *more, cookie=False)


async def test_a_code_becomes_a_cookie_that_opens_the_preview(world: World) -> None:
    preview = await world.preview()
    url, expires_at = await world.access.open(preview.project_id, preview.session_id, "/a?b=1")
    assert urlsplit(url).netloc == preview.host
    assert 0 < expires_at - time.time() <= CODE_SECONDS
    answer = await entered(world, preview, await preview.code())
    assert status(answer) == 302
    assert fields(answer, "referrer-policy") == ["no-referrer"]
    [cookie] = fields(answer, "set-cookie")
    name, _, kept = cookie.partition("=")
    assert name == "__Host-preview"
    assert kept.endswith("; Secure; HttpOnly; Path=/; SameSite=None; Partitioned")
    [check] = fields(answer, "location")
    pair = cookie.partition(";")[0]
    answer = await world.ask(preview, check, "GET", f"Cookie: {pair}", cookie=False)
    assert (status(answer), fields(answer, "location")) == (302, ["/a?b=1"])
    assert status(await world.ask(preview, "/a", "GET", f"Cookie: {pair}", cookie=False)) == 200
    # A browser that kept it not is told, and what it may do.
    answer = await world.ask(preview, check, "GET", "Accept: text/html", cookie=False)
    assert status(answer) == 200
    assert b"requestStorageAccess()" in answer
    assert world.dev.paths == ["/a"]


@pytest.mark.parametrize("what", ["a session", "a version"])
async def test_a_code_of_what_the_door_has_not_heard_of_is_good(
    world: World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """What it goes by may be a second old, and a product sends its person here at once."""
    monkeypatch.setattr(registry, "GAP_SECONDS", 60.0)
    preview = await world.preview()
    assert status(await world.ask(preview)) == 200
    if what == "a session":
        preview = await world.preview(preview.project_id)
    else:
        await world.access.revoke(preview.session_id)
    assert status(await entered(world, preview, await preview.code())) == 302


async def test_on_loopback_the_cookie_is_one_that_http_allows(dsn: str) -> None:
    async with door_world(dsn, domain="localhost:PORT") as world:
        preview = await world.preview()
        [cookie] = fields(await entered(world, preview, await preview.code()), "set-cookie")
        assert cookie.startswith("preview=")
        assert cookie.endswith("; HttpOnly; SameSite=Lax; Path=/")
        assert status(await world.ask(preview)) == 200


async def test_nothing_else_is_a_code_or_a_cookie(world: World) -> None:
    preview, other = await world.preview(), await world.preview()
    cookie, code = (await preview.cookie()).partition("=")[2], await preview.code()
    stranger = Passes(Keyring.from_jwks({"keys": [new_hs256("t")]}), time.time)
    for text in (
        cookie,
        stranger.code(preview.session_id, 0)[0],
        await other.code(),
        code[:-3] + "AAA",
        "",
        "%C3%A9",
        "a.b.c",
    ):
        assert status(await entered(world, preview, text)) == 401
    for text in (
        code,
        stranger.cookie(preview.session_id, 0, time.time() + 60),
        (await other.cookie()).partition("=")[2],
    ):
        answer = await world.ask(preview, "/", "GET", f"Cookie: __Host-preview={text}", cookie=False)
        assert status(answer) == 401
    # Whatever else goes by the name, ours among it counts.
    many = f"Cookie: __Host-preview=junk; __Host-preview={cookie}; __Host-preview=more"
    assert status(await world.ask(preview, "/", "GET", many, cookie=False)) == 200
    assert world.dev.paths == ["/"]
    assert b"__Host-preview" not in world.dev.asked[0][0]


def test_keys_are_words_and_rotate() -> None:
    other = "n:" + KEYS.partition(":")[2][:-2] + "E="
    old, new = (Passes(door_keys(words), time.time) for words in (KEYS, f"{other} {KEYS}"))
    one = uuid.uuid4()
    assert new.read("cookie", old.cookie(one, 3, time.time() + 60)) is not None
    assert old.read("cookie", new.cookie(one, 3, time.time() + 60)) is None
    for words in ("", "x", "a:b", f"{KEYS} {KEYS}", "a-b:" + KEYS.partition(":")[2], "a:" + "A" * 42):
        with pytest.raises(ValueError, match="key") as raised:
            door_keys(words)
        assert KEYS.partition(":")[2] not in str(raised.value)


async def opened(world: World, preview: Preview) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A socket, and a request that is not answered yet."""
    reader, writer = await world.connect()
    writer.write(await preview.request("/silent"))
    socket = await upgraded(world, preview)
    await within("both are under way", lambda: len(world.dev.asked) == 2)
    return [(reader, writer), socket]


async def closed(kept: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> float:
    """Seconds until all of them were closed."""
    begun = time.monotonic()
    async with asyncio.timeout(10):
        for reader, writer in kept:
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
            writer.close()
    return time.monotonic() - begun


@pytest.mark.parametrize("heard", [True, False])
async def test_who_is_out_is_out_within_a_second(
    world: World, monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    """By the database's word, or without it by the next poll."""
    if not heard:
        monkeypatch.setattr(world.door.registry._changed, "set", lambda: None)
    preview, other = await world.preview(), await world.preview()
    kept, others = await opened(world, preview), await upgraded(world, other)
    cookie = await preview.cookie()
    await world.access.revoke(preview.session_id)
    seconds = await closed(kept)
    print(f"closed after {seconds:.3f} s")
    asked = ("/", "GET", f"Cookie: {cookie}")
    assert status(await world.ask(preview, *asked, cookie=False)) == 401
    assert count(world, "revoked") == 2
    assert status(await world.ask(preview)) == 200  # let in again
    others[1].write(b"still")
    assert await others[0].readexactly(5) == b"still"
    others[1].close()


@pytest.mark.parametrize("how", ["ends", "is deleted", "expires", "is public no more"])
async def test_an_open_socket_ends_with_what_let_it_in(world: World, how: str) -> None:
    preview = await world.preview()
    if how == "is public no more":
        await world.sql(
            "insert into preview.run_settings (project_id, plain) values (%s, '{\"public\": true}')",
            preview.project_id,
        )
    given: dict[str, Any] = {"cookie": how != "is public no more"}
    kept = [await upgraded(world, preview, **given)]
    match how:
        case "ends":
            await preview.set(state="draining")
        case "is deleted":
            await world.sql("delete from public.projects where id = %s", preview.project_id)
        case "expires":
            await world.sql(
                "update preview.sessions set expires_at = now() where id = %s", preview.session_id
            )
        case _:
            await world.sql(
                "update preview.run_settings set plain = '{}' where project_id = %s", preview.project_id
            )
    await closed(kept)
    # A name that is nobody's any more has nothing behind it.
    codes = (404,) if how == "is deleted" else (401,)
    assert status(await world.ask(preview, **given)) in codes


async def test_a_door_without_its_database_lets_nobody_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "STALE_SECONDS", 0.6)
    preview = await world.preview()
    kept = await opened(world, preview)
    request = await preview.request("/", "GET", "Connection: close")
    assert (
        status(await world.say(b"GET /.preview-door/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
        == 200
    )
    await world.pool.close()
    await closed(kept)
    assert status(await world.say(request)) == 503
    assert (
        status(await world.say(b"GET /.preview-door/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
        == 503
    )


async def test_a_public_project_is_open_to_everybody(world: World) -> None:
    preview = await world.preview(run={"plain": {"public": True}, "sealed": {}})
    assert status(await world.ask(preview, cookie=False)) == 200
    assert fields(await world.ask(preview, cookie=False), "cache-control") == []
    # An answer to one person is nobody else's: a cache in front must not keep it.
    assert fields(await world.ask(preview), "cache-control") == ["private"]
    # Another site's page may read nothing of it by the person's cookie, which is not needed anyway.
    assert status(await world.ask(preview, "/", "GET", "Origin: https://x.test")) == 200


async def test_nobody_is_let_in_to_what_a_rollout_tries(world: World) -> None:
    """The session that tries an image is the newest, and nobody's."""
    old = await world.preview()
    await world.sql(
        "insert into preview.run_settings (project_id, plain) values (%s, '{\"public\": true}')",
        old.project_id,
    )
    async with DevServer(answers={"/": OK.replace(b"ok", b"no")}).running() as untried:
        trial = await world.preview(
            old.project_id, trial=True, preview_url=f"http://127.0.0.1:{untried.port}"
        )
        assert body(await world.ask(old, cookie=False)) == b"ok"
        # And when it is the only one, there is none.
        await old.set(state="gone")
        await within("it is over", lambda: _is(world, old, 401))
        assert status(await world.ask(trial)) == 401
        assert untried.asked == []


async def _is(world: World, preview: Preview, wanted: int) -> bool:
    answer = await world.ask(preview, cookie=False)
    return bool(answer) and status(answer) == wanted  # one under way when it ends is cut


async def test_who_may_frame_it_is_the_projects_to_say(world: World) -> None:
    plain = {
        "frame_ancestors": ["https://app.example", "'self'"],
        "coep": "require-corp",
        "corp": "cross-origin",
    }
    preview = await world.preview(run={"plain": plain, "sealed": {}})
    world.dev.answers["/"] = (
        b"HTTP/1.1 200 OK\r\nContent-Security-Policy: default-src 'self'\r\n"
        b"Cross-Origin-Resource-Policy: same-origin\r\nContent-Length: 0\r\n\r\n"
    )
    answer = await world.ask(preview)
    assert fields(answer, "content-security-policy") == [
        "default-src 'self'", "frame-ancestors https://app.example 'self'",
    ]  # fmt: skip
    assert fields(answer, "cross-origin-resource-policy") == ["cross-origin"]
    assert fields(answer, "cross-origin-embedder-policy") == ["require-corp"]


async def test_on_this_machine_everybody_is_let_in_but_pages_of_other_sites(dsn: str) -> None:
    """`make dev`: a page of the web must not read or use what is on the developer's loopback."""
    async with door_world(dsn, domain="localhost:PORT", open=True) as world:
        preview = await world.preview()
        own = f"Origin: http://{preview.host}"
        for more, code in {
            (): 200, (own,): 200, ("Origin: https://evil.test",): 403, ("Sec-Fetch-Site: cross-site",): 403,
            ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"): 200, ("Origin: null",): 403,
        }.items():  # fmt: skip
            assert (more, status(await world.ask(preview, "/", "GET", *more, cookie=False))) == (more, code)
        rebound = (await preview.request(cookie=False)).replace(
            preview.host.encode(), b"evil.test:%d" % world.port
        )
        assert status(await world.say(rebound.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))) == 404


async def test_fly_is_asked_to_replay_where_that_is_wanted(dsn: str) -> None:
    async with door_world(dsn, replay="previews") as world:
        preview = await world.preview(machine_driver="fly", machine_id="d891")
        assert fields(await world.ask(preview), "fly-replay") == ["app=previews;instance=d891"]
        assert fields(await world.ask(preview, cookie=False), "fly-replay") == []
        assert world.dev.asked == []


async def test_the_dev_server_is_told_the_name_that_browsers_come_by(world: World) -> None:
    preview = await world.preview()
    runs = RunSettings(world.pool, SealingKeys(), world.access)
    stored = await runs.of_session(preview.session_id)
    assert stored.environment()["PREVIEW_HOST"] == preview.host
    # Beside what the project says; people are shown that alone.
    await runs.change(preview.project_id, RunBody(allowed_hosts=[".own.example"]))
    told = await runs.for_agent(preview.session_id, preview.project_id)
    assert told["allowed_hosts"] == [preview.host, ".own.example"]
    assert (await runs.of_project(preview.project_id)).shown()["allowed_hosts"] == [".own.example"]
    # On loopback a dev server lets in every name below localhost.
    plain = Access(DoorStore(world.pool), world.door.passes, Address("localhost:5173"))
    told = await RunSettings(world.pool, SealingKeys(), plain).for_agent(
        preview.session_id, preview.project_id
    )
    assert told["allowed_hosts"] == [".own.example"]


def test_who_may_frame_it_is_said_as_a_policy_has_it() -> None:
    for good in (
        "'self'",
        "'none'",
        "https://app.example",
        "https://*.example:8443",
        "http://localhost:3000",
    ):
        assert RunBody(frame_ancestors=[good]).frame_ancestors == [good]
    for bad in (
        "*",
        "app.example",
        "https://a.example; script-src *",
        "https://a.example/x",
        "https://a b",
        "data:",
        "",
    ):
        with pytest.raises(ValidationError):
            RunBody(frame_ancestors=[bad])
    for field in ("frame_ancestors", "coep", "corp", "public"):
        assert field in OWNERS
