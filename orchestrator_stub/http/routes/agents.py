"""Serves the session API's core: what an agent missed, its next token, its heartbeat."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.config import Settings
from orchestrator_stub.http.bodies import StatusBody, SyncBody
from orchestrator_stub.http.forms import json_answer, rfc3339
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.platform.database import Head
from orchestrator_stub.sessions.catchup import FULL, Catchup
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import Session, State
from orchestrator_stub.sessions.shown import Screens, viewers
from orchestrator_stub.sessions.store import Report, SessionStore

UP = frozenset({"serving", "degraded"})
"""Agent states in which the preview answers (protocol: states)."""

BEGINNING = frozenset({"starting", "hydrating"})
"""Agent states that one which only slept is never in."""

MoreTokens = Callable[[Session], Awaitable[Mapping[str, str]]]
"""Tokens that a session's agent gets beside its own, by their name in the answer of `token`."""


class AgentRoutes:
    """For the agents, with their session's token.

    Args:
        more_tokens: each is asked at every renewal.
        on_ready: told the seconds that a machine took to become ready.
        on_wake: told the seconds that one took which was woken.
    """

    def __init__(
        self,
        requests: Requests,
        settings: Settings,
        controller: SessionController,
        store: SessionStore,
        catchup: Catchup,
        screens: Screens,
        *,
        more_tokens: Sequence[MoreTokens] = (),
        on_ready: Callable[[float], None] = lambda seconds: None,
        on_wake: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._requests = requests
        self._settings = settings
        self._controller = controller
        self._store = store
        self._catchup = catchup
        self._screens = screens
        self._more_tokens = more_tokens
        self._on_ready = on_ready
        self._on_wake = on_wake

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        session = "/v1/sessions/{session_id}"
        return [
            self._requests.route(session + "/sync", POST=self.sync),
            self._requests.route(session + "/token", POST=self.token),
            self._requests.route(session + "/status", PUT=self.status),
        ]

    async def sync(self, request: Request) -> Response:
        """What happened to the project above the agent's cursor."""
        session, head = await self._requests.current(request)
        body = await self._requests.body(request, SyncBody)
        if body.reason not in FULL and not body.paths and _stands_at(body, head):
            # What nearly every question comes to, answered by the one query that is needed anyway.
            return json_answer({"kind": "current", "epoch": head.epoch, "revision": head.revision})
        return json_answer(
            await self._catchup.sync(
                session.project_id,
                epoch=body.epoch,
                revision=body.revision,
                reason=body.reason,
                paths=body.paths or (),
                accept=body.accept or (),
                session_id=session.id,
            )
        )

    async def token(self, request: Request) -> Response:
        """The next token of the same machine, also for one that expired while the machine was down."""
        session, _ = await self._requests.current(request, grace=self._settings.token_renew_grace)
        token, expires_at = self._controller.token_for(session)
        answer: dict[str, Any] = {"realtime_token": token, "expires_at": rfc3339(expires_at)}
        if (nats := self._controller.nats) is not None:
            answer["nats_jwt"] = nats.keys.machine_token(session.project_id, session.id, expires_at)
        for more in self._more_tokens:
            answer |= await more(session)
        return json_answer(answer)

    async def status(self, request: Request) -> Response:
        """A heartbeat: renews the lease, and answers where the database is and what is asked of the agent."""
        claims, session, head = await self._requests.own(request)
        body = await self._requests.body(request, StatusBody)
        said = body.model_dump()
        tree_hash = None
        answer: dict[str, Any] = {}
        # An agent that only says what is shown, as often as four times a second, says that it has no hash now.
        if body.tree_hash is not None or "tree_hash" not in body.model_fields_set:
            head, tree_hash = await self._catchup.tree_hash(session.project_id, head)
            answer["tree_hash"] = tree_hash
        answer |= {"epoch": head.epoch, "revision": head.revision, "run_revision": session.run_revision}
        asleep = session.state is State.SUSPENDED  # or woken since this was read
        kept = await self._store.report(
            Report(
                session.id,
                claims.generation,
                # What was woken has to have what was saved meanwhile first.
                ready=body.state in UP and (_stands_at(body, head) or not (session.waking or asleep)),
                viewed=bool(viewers(said)),
                lease=self._settings.timing.lease,
                status=body.model_dump_json(),
            ),
            # What says that it is ready, or what is shown, is news to somebody who waits.
            patient="tree_hash" in answer and session.state is State.READY,
        )
        if kept is None:
            # Another generation's machine has the session, or it has ended.
            return json_answer({**answer, "action": "stop"})
        self._screens.heard(session.id, said)
        if session.waking and body.state in BEGINNING:
            self._controller.sleep.woke_cold(session)
            return json_answer({**answer, "action": "stop"})
        if session.state is not State.READY and kept.state is State.READY:
            (self._on_wake if session.waking else self._on_ready)(kept.state_since - session.state_since)
        if not _stands_at(body, head) or (
            body.tree_hash is not None and tree_hash is not None and body.tree_hash != tree_hash
        ):
            answer["action"] = "sync"
        return json_answer(answer)


def _stands_at(body: SyncBody | StatusBody, head: Head) -> bool:
    return (body.epoch, body.revision) == (head.epoch, head.revision)
