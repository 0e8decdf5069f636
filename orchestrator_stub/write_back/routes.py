"""Serves offers, and gives a session whose project has write-back the token that they need.

An offer's token opens nothing else, and no other token opens this: a container that was read by somebody else can
be kept from writing without ending its preview. What is wrong with the token is 401 or 403, which ends no session:
the agent asks for the next one with its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.http.bodies import ChangesBody
from orchestrator_stub.http.forms import json_answer, uuid_of
from orchestrator_stub.http.problems import Refusal, session_over, unknown_session
from orchestrator_stub.http.requests import Requests, bearer_of
from orchestrator_stub.platform.tokens import Keyring, SessionClaims, TokenRejected
from orchestrator_stub.sessions.lifecycle import KEPT, Session
from orchestrator_stub.sessions.run_settings import RunSettings
from orchestrator_stub.sessions.store import SessionStore
from orchestrator_stub.write_back.changes import BODY_BYTES, Offers
from orchestrator_stub.write_back.tokens import mint_write, read_write

PATH: Final = "/v1/sessions/{session_id}/changes"


class WriteBackRoutes:
    """For what tools in a container made, with the session's write token."""

    def __init__(
        self,
        requests: Requests,
        store: SessionStore,
        offers: Offers,
        write_keys: Keyring,
        *,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._requests = requests
        self._store = store
        self._offers = offers
        self._write_keys = write_keys
        self._offered = Counter(
            "preview_orchestrator_offered_changes",
            "Files that containers offered, by what became of them and, of refused ones, the rule.",
            ["outcome", "rule"],
            registry=registry,
        )

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        return [self._requests.route(PATH, POST=self.changes)]

    async def changes(self, request: Request) -> Response:
        """What tools in the container made, file by file: written, proposed, kept or refused."""
        claims, session = await self._writer(request)
        offer = await self._requests.body(request, ChangesBody, limit=BODY_BYTES)
        if offer.generation != claims.generation:
            raise Refusal(400, "bad_body", "generation: it is not the token's.")
        answer = await self._offers.take(session.id, session.project_id, offer)
        for result in answer["results"]:
            self._offered.labels(result["outcome"], result.get("rule", "")).inc()
        return json_answer(answer)

    async def _writer(self, request: Request) -> tuple[SessionClaims, Session]:
        """What the write token says, and its session."""
        try:
            claims = read_write(self._write_keys, bearer_of(request))
        except TokenRejected as error:
            raise Refusal(
                401, f"token_{error.reason}", f"The session's write token is needed: {error}"
            ) from None
        if uuid_of(request.path_params["session_id"], "session") != claims.session_id:
            raise Refusal(403, "foreign_session", "The token is another session's.")
        session = await self._store.get(claims.session_id)
        if session is None:
            raise unknown_session(claims.session_id)
        if session.state not in KEPT:
            raise session_over(session)
        if session.project_id != claims.project_id or session.generation != claims.generation:
            raise Refusal(403, "foreign_session", "The token is another machine's: ask for the next one.")
        return claims, session


class WriteTokens:
    """Gives a session whose project has write-back a write token with each renewal. `clock` gives Unix seconds."""

    def __init__(
        self, runs: RunSettings, write_keys: Keyring, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._runs = runs
        self._keys = write_keys
        self._now = clock

    async def of(self, session: Session) -> dict[str, str]:
        """`write_token` for the session's machine; nothing where write-back is off."""
        if not await self._runs.write_back(session.id, session.project_id):
            return {}
        token = mint_write(
            self._keys,
            project_id=session.project_id,
            session_id=session.id,
            generation=session.generation,
            now=self._now(),
        )
        return {"write_token": token}
