"""One file of scenarios, run through the official clients and through ours, against the local realtime server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.fakes.serving import Local
from tests.referees.clients import CLIENTS, ENDED, Client

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCENARIOS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "scenarios.json").read_text())


class Play:
    """One scenario on its way through one client."""

    def __init__(self, local: Local, client: Client) -> None:
        self.local = local
        self.client = client
        self.project = str(uuid4())
        self.topic = f"project:{self.project}"
        self.config: dict[str, Any] = {}

    def token(self, wanted: dict[str, Any]) -> str:
        project = self.project if wanted.get("project") != "other" else str(uuid4())
        token = self.local.token(ttl=wanted.get("ttl", 600), project_id=project, session_id=str(uuid4()))
        return token[:-6] + "AAAAAA" if wanted.get("tampered") else token

    async def step(self, step: dict[str, Any]) -> None:
        for name, value in step.items():
            await getattr(self, f"_{name}")(value)

    async def _join(self, wanted: dict[str, Any]) -> None:
        self.config = {k: v for k, v in wanted.items() if k != "token"}
        token = self.token(wanted["token"]) if "token" in wanted else None
        await self.client.join(self.topic, token, self.config)

    async def _expect(self, wanted: str) -> None:
        if wanted in ("ok", "timed out"):
            assert self.answer == wanted
        elif wanted == "ended":
            await self.client.heard("status", lambda s: s["status"] in ENDED)
        elif wanted == "refused":
            told = await self.client.heard("status", lambda s: s["status"] in ("error", "joined"))
            assert told["status"] == "error", told
        else:
            await self.client.heard("status", lambda s: s["status"] == wanted)

    async def _database(self, message: dict[str, Any]) -> None:
        private = message.get("private", True)
        await self.local.send(self.topic, message["event"], message["payload"], private=private)

    async def _rest(self, message: dict[str, Any]) -> None:
        private = bool(message["private"])
        if message.get("single"):
            path = f"/realtime/v1/api/broadcast/{self.topic}/events/{message['event']}"
            answer = await self.local.http.post(
                f"{path}?private={str(private).lower()}", json=message["payload"]
            )
        else:
            one = {
                "topic": self.topic,
                "event": message["event"],
                "payload": message["payload"],
                "private": private,
            }
            answer = await self.local.http.post("/realtime/v1/api/broadcast", json={"messages": [one]})
        assert answer.status_code == 202, answer.text

    async def _hear(self, wanted: dict[str, Any]) -> None:
        message = await self.client.heard("broadcast", lambda _: True)
        payload = {k: v for k, v in message["payload"].items() if k != "id"}
        assert (message["event"], payload) == (wanted["event"], wanted["payload"])
        if wanted.get("replayed"):
            assert message["meta"]["replayed"] is True

    async def _silence(self, seconds: float) -> None:
        with pytest.raises(TimeoutError):
            await self.client.heard("broadcast", lambda _: True, timeout=seconds)

    async def _system(self, text: str) -> None:
        await self.client.heard("system", lambda message: message["message"] == text)

    async def _send(self, message: dict[str, Any]) -> None:
        self.answer = await self.client.send(message["event"], message["payload"])

    async def _track(self, payload: dict[str, Any]) -> None:
        await self.client.track(payload)

    async def _present(self, wanted: dict[str, str]) -> None:
        names = lambda state: {key: metas[0].get("name") for key, metas in state.items()}  # noqa: E731
        await self.client.heard("presence", lambda state: names(state) == wanted)

    async def _renew(self, wanted: dict[str, Any]) -> None:
        await self.client.renew(self.token(wanted))

    async def _rejoin(self, wanted: dict[str, Any]) -> None:
        await self.client.rejoin(self.topic, self.token(wanted), self.config)

    async def _leave(self, _: bool) -> None:
        await self.client.leave()

    async def _fault(self, fault: dict[str, Any]) -> None:
        assert (await self.local.fault(**fault, topic=self.topic))["done"] == 1

    async def _wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
async def test_scenario(local: Local, packages: None, scenario: dict[str, Any]) -> None:
    """Every client that can, at the same time, each in a project of its own."""
    async with asyncio.TaskGroup() as tasks:
        for name, kind in CLIENTS.items():
            if set(scenario["needs"]) <= kind.can:
                tasks.create_task(play(local, name, kind, scenario))


async def play(local: Local, name: str, kind: type[Client], scenario: dict[str, Any]) -> None:
    client = kind(local)
    await client.start()
    step: object = None
    try:
        run = Play(local, client)
        for step in scenario["steps"]:
            await run.step(step)
    except Exception as error:
        error.add_note(f"client {name}, step {step}")
        raise
    finally:
        await client.stop()


async def test_every_client_has_scenarios_of_its_own_kind() -> None:
    """A scenario that no official client plays would prove nothing."""
    for scenario in SCENARIOS:
        players = {name for name, kind in CLIENTS.items() if set(scenario["needs"]) <= kind.can}
        assert players >= {"realtime", "realtime-js", "supabase-js"}, scenario["name"]
    ours = [s for s in SCENARIOS if set(s["needs"]) <= CLIENTS["ours"].can]
    assert len(ours) >= 8
