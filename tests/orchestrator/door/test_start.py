"""What a person sees of a preview that is not up yet."""

from __future__ import annotations

import json
from functools import partial

import pytest

from orchestrator_stub.door import pages, service
from tests.orchestrator.door.world import World, body, count, fields, status, within


async def test_a_person_gets_a_page_and_a_program_503(world: World) -> None:
    preview = await world.preview(state="suspended", preview_url=None)
    page = await world.ask(preview, "/", "GET", "Sec-Fetch-Mode: navigate")
    assert status(page) == 503
    assert b"Starting your preview" in page
    # One file, with nothing from elsewhere, and no script but its own.
    [policy] = fields(page, "content-security-policy")
    assert policy.startswith("default-src 'none'; style-src 'nonce-")
    assert b"src=" not in body(page).replace(b"default-src", b"")
    assert b"{{" not in page
    answer = await world.ask(preview, "/src/App.tsx", "GET", "Sec-Fetch-Mode: cors", "Accept: */*")
    assert (status(answer), fields(answer, "retry-after")) == (503, ["2"])
    assert b"<" not in body(answer)
    # Whoever looks wants it awake, and the next sweep hears of that.
    assert world.woken == [preview.session_id, preview.session_id]
    # Who was told may fail, or be killed at it: a sweep of any orchestrator finds the note.
    query = "select wake_wanted_at > state_since from preview.sessions where id = %s"
    assert await world.sql(query, preview.session_id) == [(True,)]


async def test_a_dev_server_that_is_away_is_waited_for(world: World) -> None:
    preview = await world.preview(preview_url="http://127.0.0.1:1")
    assert b"Starting your preview" in await world.ask(preview, "/", "GET", "Accept: text/html")
    # Neither a way to the machines' private network nor such a name.
    for url in ("http://[fdaa::1]:3000", "http://nowhere.invalid:3000"):
        await preview.set(preview_url=url)
        await within("the door knows", partial(_stands, world, preview.label, url))
        page = await world.ask(preview, "/", "GET", "Accept: text/html")
        assert (status(page), b"Starting your preview" in page) == (503, True)
    assert count(world, "unreachable") == 3
    for url in ("https://127.0.0.1", "ftp://x", "http://", "http://[", "http://a:99999", "x" * 300):
        await preview.set(preview_url=url)
        await within("the door knows", partial(_stands, world, preview.label, url))
        assert status(await world.ask(preview)) == 503


async def _stands(world: World, label: str, url: str) -> bool:
    standing = await world.door.registry.of(label)
    return bool(standing) and standing[0].preview_url == url


async def test_the_start_is_told_as_it_goes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "EVENT_SECONDS", 0.05)
    preview = await world.preview(state="requested", preview_url=None)
    reader, writer = await world.connect()
    writer.write(await preview.request("/.preview-door/events", "GET", "Accept: text/event-stream"))
    head = await reader.readuntil(b"\r\n\r\n")
    assert fields(head, "content-type") == ["text/event-stream"]

    async def told() -> dict[str, object]:
        line = (await reader.readuntil(b"\n\n")).decode()
        found: dict[str, object] = json.loads(line.removeprefix("data: "))
        return found

    assert await told() == {"ready": False, "step": "Looking for a machine", "failing": None}
    await preview.set(state="provisioning", status={"state": "installing", "problems": []})
    assert (await told())["step"] == "Installing packages"
    detail = "npm install ended with 1:\nnpm http fetch\nnpm error 404 Not Found - left-padd\nnpm error A log"
    await preview.set(
        status={
            "state": "degraded",
            "problems": [{"kind": "drift"}, {"kind": "install_failed", "detail": detail}],
        }
    )
    assert (await told())["failing"] == "npm error 404 Not Found - left-padd"
    await preview.set(
        state="ready", preview_url=f"http://127.0.0.1:{world.dev.port}", status={"state": "serving"}
    )
    found = await told()
    while not found["ready"]:
        found = await told()
    assert await reader.read() == b""
    writer.close()


@pytest.mark.parametrize(
    "problems",
    [
        None,
        3,
        {},
        [None],
        [{"kind": 1}],
        [{"kind": "install_failed", "detail": 7}],
        [{"kind": "install_failed"}],
    ],
)
def test_whatever_an_agent_says_is_told(problems: object) -> None:
    progress = {"session": "ready", "problem": None, "agent": ["x"], "dev_server": {}, "problems": problems}
    found = json.loads(pages.told(progress, ready=False))
    assert found["step"] == "Starting"
    assert found["failing"] in (None, "7", "install_failed")


def test_what_a_project_says_is_no_markup() -> None:
    page, _ = pages.blocked('"><script>', "/<b>")
    assert b"<script>" not in page.replace(b"<script nonce", b"")
    assert b"<b>" not in page
    page, _ = pages.refused("<b>")
    assert b"<b>" not in page


async def test_somebody_may_have_it_tried_again(world: World) -> None:
    preview = await world.preview(state="suspended", preview_url=None)
    own = f"Origin: https://{preview.host}"
    assert status(await world.ask(preview, "/.preview-door/wake", "POST", own, "Content-Length: 0")) == 204
    assert world.woken == [preview.session_id]
    assert status(await world.ask(preview, "/.preview-door/wake", "POST", "Content-Length: 0")) == 403
    assert status(await world.ask(preview, "/.preview-door/wake", "POST", own, cookie=False)) == 401
    assert world.woken == [preview.session_id]
