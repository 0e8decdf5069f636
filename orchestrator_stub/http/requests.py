"""Reads requests: who asks, what they may, and what they say. Every group of routes is made with one `Requests`.

Two kinds of callers come. The product's backend and its users come to the control plane with the service key or a
user's token (`caller`, `seen`, `project`); a session's agent comes to the session API with the session's own token
(`own`, `current`).
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from uuid import UUID

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from orchestrator_stub.config import Settings
from orchestrator_stub.http.application import guarded
from orchestrator_stub.http.cors import open_to
from orchestrator_stub.http.forms import uuid_of
from orchestrator_stub.http.problems import Refusal, session_over, unknown_project, unknown_session
from orchestrator_stub.platform.database import Head
from orchestrator_stub.platform.tokens import (
    Keyring,
    SessionClaims,
    SessionReader,
    TokenRejected,
    names_a_user,
)
from orchestrator_stub.sessions.lifecycle import ENDED, KEPT, Session
from orchestrator_stub.sessions.store import Right, SessionStore

BODY_SECONDS = 10.0
"""For a body to arrive: the largest that is read, at the pace of a bad mobile network."""

Body = TypeVar("Body", bound=BaseModel)


class RouteGroup(Protocol):
    """The routes of one noun."""

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks the control plane: the service itself (`user` None), or a user by their token's claims."""

    user: Mapping[str, Any] | None


class Requests:
    """What all routes ask of a request.

    Args:
        settings: the service key, the bounds of bodies and time, the origins of pages that may call.
        store: sessions, and what the database's policies let a user do.
        keys: what users' and sessions' tokens are signed with.
        clock: Unix seconds.
    """

    def __init__(
        self,
        settings: Settings,
        store: SessionStore,
        keys: Keyring,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._store = store
        self._keys = keys
        self._tokens = SessionReader(keys, clock)

    def route(
        self, path: str, *, more: float = 0.0, **methods: Callable[[Request], Awaitable[Response]]
    ) -> Route:
        """One path and its methods. `more`: seconds that a request may take above the usual."""

        async def endpoint(request: Request) -> Response:
            respond = methods["GET" if request.method == "HEAD" else request.method]
            async with asyncio.timeout(self._settings.request_timeout + more):
                return await respond(request)

        return open_to(self._settings.cors_origins, path, guarded(endpoint), [*methods])

    async def caller(self, request: Request) -> Caller:
        """Who asks the control plane: the service, or a user. A session's token is neither."""
        token = bearer_of(request)
        expected = self._settings.supabase_service_role_key.get_secret_value()
        if hmac.compare_digest(token.encode(), expected.encode()):
            return Caller(None)
        try:
            claims = self._keys.verify(token)
        except TokenRejected as error:
            raise Refusal(
                401, f"token_{error.reason}", f"A service key or a user's token is needed: {error}"
            ) from None
        if claims.get("role") == "service_role":
            return Caller(None)
        if claims.get("role") == "authenticated" and "project_id" not in claims and claims.get("sub"):
            if not names_a_user(claims):
                raise Refusal(401, "token_claims", "The token's sub is no user's id, or it cannot be read.")
            return Caller(claims)
        raise Refusal(403, "not_allowed", "Only the service and a project's members may do this.")

    async def may(self, caller: Caller, project_id: UUID, what: Right = "read") -> bool:
        """Whether the caller has a right to the project. The database's own policies say so."""
        return caller.user is None or await self._store.may(caller.user, project_id, what)

    async def project(self, request: Request) -> tuple[Caller, UUID]:
        """Who asks, and the project of the path; to strangers it does not exist. Raises `Refusal`."""
        caller = await self.caller(request)
        project_id = uuid_of(request.path_params["project_id"], "project")
        if not await self.may(caller, project_id):
            raise unknown_project(project_id)
        return caller, project_id

    async def seen(self, request: Request) -> Session:
        """The session of the path, for a caller of the control plane; to strangers it does not exist."""
        caller = await self.caller(request)
        session_id = uuid_of(request.path_params["session_id"], "session")
        session = await self._store.get(session_id)
        if session is None or not await self.may(caller, session.project_id):
            raise unknown_session(session_id)
        return session

    async def own(self, request: Request, *, grace: float = 0.0) -> tuple[SessionClaims, Session, Head]:
        """What the token says, its session, and where the project stands. `grace` as in `Keyring.verify`.

        Over is 410. The session may be draining, or have another machine by now: see `current`.
        """
        try:
            claims = self._tokens.read(bearer_of(request), grace=grace)
        except TokenRejected as error:
            raise Refusal(401, f"token_{error.reason}", f"The session's token is needed: {error}") from None
        if uuid_of(request.path_params["session_id"], "session") != claims.session_id:
            raise Refusal(403, "foreign_session", "The token is another session's.")
        standing = await self._store.standing(claims.session_id)
        if standing is None:
            raise unknown_session(claims.session_id)
        session, head = standing
        if session.project_id != claims.project_id:
            raise Refusal(403, "foreign_session", "The token is another project's.")
        if session.state in ENDED:
            raise session_over(session)
        return claims, session, head

    async def current(self, request: Request, *, grace: float = 0.0) -> tuple[Session, Head]:
        """As `own`, for the machine that the session has now alone: a newer one is 409, none wanted 410."""
        claims, session, head = await self.own(request, grace=grace)
        if session.state not in KEPT:
            raise session_over(session)
        if session.generation != claims.generation:
            raise Refusal(
                409,
                "generation_superseded",
                f"Machine {claims.generation} was replaced by {session.generation}; this one is to stop.",
                extra={"generation": session.generation},
            )
        return session, head

    async def body(self, request: Request, form: type[Body], *, limit: int | None = None) -> Body:
        """What a request says. `limit`: bytes that are read, where it is not the settings'."""
        most = limit or self._settings.body_limit
        content = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    content += chunk
                    if len(content) > most:
                        raise Refusal(413, "body_too_large", f"At most {most} bytes are read.")
        except TimeoutError:
            raise Refusal(408, "body_too_slow", f"The body did not come within {BODY_SECONDS:g} s.") from None
        try:
            return form.model_validate_json(bytes(content) or b"{}")
        except ValidationError as error:
            errors = [
                {"field": ".".join(map(str, item["loc"])) or "body", "problem": item["msg"]}
                for item in error.errors(include_url=False, include_context=False, include_input=False)[:20]
            ]
            said = "; ".join(f"{item['field']}: {item['problem']}" for item in errors)
            raise Refusal(400, "bad_body", said[:1000], extra={"errors": errors}) from None


def bearer_of(request: Request) -> str:
    """The token that a request shows. Raises `Refusal`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Refusal(401, "token_missing", "Send the token as `Authorization: Bearer …`.")
    return token.strip()
