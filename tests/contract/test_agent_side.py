"""The agent accepts every golden message, and says what the orchestrator is told to expect."""

from __future__ import annotations

import contextlib
import json

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from agent.core.errors import (
    CredentialRejected,
    MalformedMessage,
    SessionGone,
    Superseded,
    TooLarge,
    Unavailable,
)
from agent.core.messages import (
    Changes,
    Current,
    SnapshotOffer,
    read_event,
    read_head,
    read_manifest,
    read_sync_answer,
)
from agent.core.model import Commit, digest_of
from agent.health.status_body import fitted
from agent.link.run_settings import read_run_settings
from agent.modules.layers import Layer, LayerFailed, LayerStore, Missing, given_layer, read_answer
from agent.session_api import SessionApi
from agent.tokens import Tokens, read_token
from tests.contract.golden import DIRECTORY, assert_same_form, load

EVENTS = sorted(path.stem for path in DIRECTORY.glob("event.*.json"))
TOKEN = load("token.answer")["realtime_token"]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def event(name: str) -> Commit | SnapshotOffer | None:
    message = load(name)
    return read_event(message["event"], message["payload"])


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_is_understood(name: str) -> None:
    read = event(name)
    assert read is not None
    assert read.timestamp is not None
    if isinstance(read, Commit):
        assert not read.problems
        assert (read.revision is None) == (name == "event.file_update.seed")


def test_an_update_carries_its_bytes_and_a_reference_does_not() -> None:
    update, reference = event("event.file_update"), event("event.file_update.by_reference")
    assert isinstance(update, Commit)
    assert isinstance(reference, Commit)
    assert update.changes[0].content == b"export default 1\n"
    assert not update.changes[0].by_reference
    assert reference.changes[0].by_reference


def test_splices_are_a_reference_with_what_makes_the_bytes() -> None:
    base = b"import React from 'react'\n" + "// é\n".encode() * 4
    update, bulk = event("event.file_update.splices"), event("event.bulk_apply.splices")
    answer = read_sync_answer(load("sync.answer.splices"))
    assert isinstance(update, Commit)
    assert isinstance(bulk, Commit)
    assert isinstance(answer, Changes)
    for change in (update.changes[0], bulk.changes[0], answer.changes[0]):
        assert change.by_reference
        assert change.patch is not None
        assert change.patch.base == digest_of(base)
        made = change.patch.applied_to(base)
        assert made is not None
        assert digest_of(made) == change.digest


@pytest.mark.parametrize(
    "splices", [[[0, -1, ""]], [[0, 1]], [["0", 1, ""]], [[0, 1, None]], "x", [[0, 1, "\ud800"]]]
)
def test_splices_of_another_form_are_malformed(splices: object) -> None:
    message = load("event.file_update.splices")
    with pytest.raises(MalformedMessage):
        read_event(message["event"], {**message["payload"], "splices": splices})


def test_a_traced_update_is_the_update_and_its_writer_s_span() -> None:
    traced, plain = event("event.file_update.traced"), event("event.file_update")
    assert isinstance(traced, Commit)
    assert isinstance(plain, Commit)
    assert str(traced.trace) == load("event.file_update.traced")["payload"]["traceparent"]
    assert structs.replace(traced, trace=None) == plain


def test_a_doorbell_is_known_for_one() -> None:
    doorbell = event("event.bulk_apply.doorbell")
    assert isinstance(doorbell, Commit)
    assert not doorbell.complete
    assert not doorbell.changes


@pytest.mark.parametrize("name", EVENTS)
def test_unknown_fields_are_ignored(name: str) -> None:
    message = load(name)
    assert read_event(message["event"], {**message["payload"], "of_tomorrow": {"x": [1]}}) == event(name)


def test_manifests_are_understood() -> None:
    full, delta = read_manifest(load("manifest.full")), read_manifest(load("manifest.delta"))
    assert full.base_revision is None
    assert delta.base_revision == 7
    assert [file.executable for file in full.files.values()] == [False, True]
    assert dict(delta.deleted) == {"src/old.ts": 5}


def test_sync_answers_are_understood() -> None:
    assert isinstance(read_sync_answer(load("sync.answer.current")), Current)
    changes = read_sync_answer(load("sync.answer.changes"))
    assert isinstance(changes, Changes)
    assert [change.is_delete for change in changes.changes] == [False, True]
    offer, ahead = (
        read_sync_answer(load("sync.answer.snapshot")),
        read_sync_answer(load("sync.answer.snapshot.ahead")),
    )
    assert isinstance(offer, SnapshotOffer)
    assert isinstance(ahead, SnapshotOffer)
    assert (offer.ahead, ahead.ahead) == (False, True)


def test_the_status_answers_are_understood() -> None:
    assert read_head(load("status.answer")).action is None
    assert read_head(load("status.answer")).run_revision == 4
    assert read_head({"epoch": "e", "revision": 1}).run_revision is None, "of an orchestrator from before"
    assert read_head(load("status.answer.stop")).action == "stop"


LIMITS = json.loads((DIRECTORY.parent / "limits.json").read_text())


class Peer:
    """An orchestrator that answers one thing and remembers what it was asked."""

    def __init__(self, status: int, answer: object) -> None:
        self.status, self.answer = status, answer
        self.asked: list[tuple[str, str, object]] = []
        http = httpx.AsyncClient(transport=httpx.MockTransport(self._respond))
        self.api = SessionApi(
            "http://orchestrator", "3a1f0a52-6a0b-4f6e-8a50-0b6c0a9d1e77", Tokens(TOKEN), http
        )

    def _respond(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.method, request.url.path, json.loads(request.content or b"null")))
        media = "application/json" if self.status < 400 else "application/problem+json"
        body = httpx.ByteStream(json.dumps(self.answer).encode())
        return httpx.Response(self.status, headers={"content-type": media}, stream=body)


async def test_sync_is_asked_in_the_golden_form() -> None:
    peer = Peer(200, load("sync.answer.current"))
    golden = load("sync.request")
    await peer.api.sync(golden["epoch"], golden["revision"], golden["reason"])
    with_paths = load("sync.request.paths")
    await peer.api.sync(
        with_paths["epoch"], with_paths["revision"], with_paths["reason"], with_paths["paths"]
    )
    accepting = load("sync.request.accept")
    await peer.api.sync(
        accepting["epoch"], accepting["revision"], accepting["reason"], accept=accepting["accept"]
    )
    assert [body for _, _, body in peer.asked] == [golden, with_paths, accepting]
    assert {(method, path.rpartition("/")[2]) for method, path, _ in peer.asked} == {("POST", "sync")}


async def test_a_token_is_taken_from_the_golden_answer() -> None:
    peer = Peer(200, load("token.answer"))
    assert (await peer.api.renew_token()).value == TOKEN
    assert read_token(TOKEN).role == "preview_agent"


async def test_run_settings_are_read_whole() -> None:
    peer = Peer(200, load("run.answer"))
    run = read_run_settings(await peer.api.run_settings())
    golden = load("run.answer")
    assert (run.revision, run.root, run.dev_port) == (4, golden["root"], golden["dev_port"])
    assert (run.dev_command, run.install_command) == (("npm", "run", "dev"), ("npm", "ci"))
    assert (run.env, run.npmrc) == (golden["env"], golden["npmrc"])
    assert run.allowed_hosts == ("p1.preview.example",)
    assert run.secrets() == {"https://api.example", "--max-old-space-size=512", "a-token-of-the-registry"}
    assert not any(secret in repr(run) for secret in run.secrets())
    ((method, path, _),) = peer.asked
    assert (method, path.rpartition("/")[2]) == ("GET", "run")


@pytest.mark.parametrize("name", ["answer", "answer.missing", "answer.not_wanted"])
async def test_a_layer_is_asked_for_and_its_answer_read(name: str) -> None:
    golden, key = load(f"modules.{name}"), load("modules.request")["key"]
    peer = Peer(200, golden)
    async with httpx.AsyncClient() as http:
        found = await LayerStore(peer.api, http).find(key)
    if isinstance(found, Layer):
        assert [(part.url, part.sha256, part.size) for part in found.parts] == [
            (part["url"], part["sha256"], part["size"]) for part in golden["parts"]
        ]
        assert given_layer(key, json.dumps(golden["parts"])) == found, "MODULES_PARTS has the same form"
    else:
        assert found == Missing(key, tuple(golden.get("upload_urls", ())), golden["max_bytes"])
    ((method, path, body),) = peer.asked
    assert (method, path.rpartition("/")[2], body) == ("POST", "modules", load("modules.request"))


async def test_a_layer_that_is_sent_is_told() -> None:
    golden = load("modules.sent.request")
    peer = Peer(200, load("modules.sent.answer"))
    await peer.api.add_modules(golden["key"], golden["parts"])
    ((method, path, body),) = peer.asked
    assert (method, path.rpartition("/")[2], body) == ("PUT", "modules", golden)


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(["kind", "parts", "upload_urls", "max_bytes"], JUNK))
    | JUNK
)
def test_whatever_is_answered_is_a_layer_or_none(answer: object) -> None:
    with contextlib.suppress(LayerFailed):
        assert read_answer("0" * 40, answer).key == "0" * 40


@pytest.mark.parametrize("name", LIMITS["env"]["refused"])
def test_a_variable_that_is_not_the_projects_is_malformed(name: str) -> None:
    with pytest.raises(MalformedMessage):
        read_run_settings({**load("run.answer"), "env": {name: "a-value-of-it"}})


@pytest.mark.parametrize("name", LIMITS["env"]["taken"])
def test_a_variable_of_the_project_is_taken(name: str) -> None:
    assert read_run_settings({**load("run.answer"), "env": {name: "x"}}).env == {name: "x"}


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(load("run.answer"), JUNK)) | JUNK)
def test_whatever_is_answered_is_run_settings_or_malformed(answer: object) -> None:
    with contextlib.suppress(MalformedMessage):
        assert read_run_settings(answer).revision >= 0


async def test_status_is_put() -> None:
    peer = Peer(200, load("status.answer"))
    head = await peer.api.report_status(load("status.request"))
    assert head.revision == 10
    method, path, body = peer.asked[0]
    assert (method, path.rpartition("/")[2]) == ("PUT", "status")
    assert_same_form(body, load("status.request"))


MEANINGS = {
    "problem": SessionGone,
    "problem.token_malformed": CredentialRejected,
    "problem.foreign_session": CredentialRejected,
    "problem.session_unknown": SessionGone,
    "problem.path_unknown": Unavailable,
    "problem.generation_superseded": Superseded,
    "problem.body_too_large": TooLarge,
}


def test_a_status_is_of_the_golden_form() -> None:
    golden = load("status.request")
    head = {key: golden[key] for key in golden if not key.startswith("problems")}
    assert fitted(head, golden["problems"]) == golden


@pytest.mark.parametrize("name", sorted(path.stem for path in DIRECTORY.glob("problem*.json")))
async def test_problems_are_sorted_by_what_can_be_done(name: str) -> None:
    golden = load(name)
    peer = Peer(golden["status"], golden)
    with pytest.raises(MEANINGS[name]) as raised:
        await peer.api.sync(None, 0, "start")
    assert type(raised.value) is MEANINGS[name]
    assert golden["detail"] in str(raised.value)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_what_may_pass_is_asked_again(status: int) -> None:
    with pytest.raises(Unavailable):
        await Peer(status, {**load("problem"), "status": status}).api.sync(None, 0, "start")
