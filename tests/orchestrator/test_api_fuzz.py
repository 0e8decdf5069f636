"""Anything at all, sent to every route of the OpenAPI document: always an answer that the document allows."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

import httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_stub.operations import openapi_document
from tests.orchestrator.control_world import SERVICE_KEY, World, bearer, control_world
from tests.profiles import examples

DOCUMENT = openapi_document()
OPERATIONS = [(path, method) for path, item in DOCUMENT["paths"].items() for method in item]
NAMES = [
    "project_id",
    "generation",
    "ttl_seconds",
    "epoch",
    "revision",
    "reason",
    "paths",
    "state",
    "tree_hash",
    "rebuild",
]

scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=300)
    | st.sampled_from(["gap", "tree_hash", "snapshot_rejected", "serving", "stopped", 1, 0, "\0", "\ud800"])
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)
bodies = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), values, max_size=8) | values


def encoded(body: Any, known: dict[str, str]) -> bytes:
    if isinstance(body, dict) and body.get("project_id") is True:
        body = {**body, "project_id": known["project"]}
    return json.dumps(body).encode()


def test_every_answer_is_one_of_the_document_s(database: str) -> None:
    with asyncio.Runner() as runner:
        context = control_world(database)
        world: World = runner.run(context.__aenter__())
        session = runner.run(world.session())
        known = {"project": session["project_id"], "session": session["session_id"]}

        async def send(path: str, method: str, headers: dict[str, str], content: bytes) -> httpx.Response:
            return await world.http.request(method, path, content=content, headers=headers)

        @settings(examples(200, 5_000))
        @given(
            operation=st.sampled_from(OPERATIONS),
            session_id=st.just(known["session"])
            | st.uuids().map(str)
            | st.sampled_from(["x", "..%2f", "%ff"]),
            caller=st.sampled_from(["service", "session", "stranger"]),
            body=bodies,
            junk=st.none() | st.binary(max_size=200),
        )
        def check(
            operation: tuple[str, str], session_id: str, caller: str, body: Any, junk: bytes | None
        ) -> None:
            template, method = operation
            path = template.replace("{session_id}", session_id)
            tokens = {"service": SERVICE_KEY, "session": world.token(session), "stranger": str(uuid4())}
            content = junk if junk is not None else encoded(body, known)
            answer = runner.run(send(path, method, bearer(tokens[caller]), content))
            assert answer.status_code < 500, answer.text
            if answer.is_success:
                responses = DOCUMENT["paths"][template][method]["responses"]
                assert str(answer.status_code) in responses
            else:
                assert answer.headers["content-type"] == "application/problem+json"
                assert set(answer.json()) >= {"type", "title", "status", "detail"}

        try:
            check()
        finally:
            runner.run(context.__aexit__(None, None, None))
