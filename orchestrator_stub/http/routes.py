"""Serves the routes: parses, checks who asks, calls, renders. Decisions are made in `sessions`.

control plane   /v1/sessions…  /v1/projects/{id}/shown  the product's backend, with the service key
session API     /v1/sessions/{id}/{sync,token,status}   the agent, with its session's token
operations      /livez /readyz /metrics /openapi.json
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, TypeVar
from uuid import UUID

import psycopg
import structlog
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from orchestrator_stub.config import Settings
from orchestrator_stub.http.bodies import CreateBody, SnapshotBody, StatusBody, SyncBody
from orchestrator_stub.http.cors import open_to
from orchestrator_stub.http.forms import json_answer, kept_secret, rfc3339, session_form, uuid_of
from orchestrator_stub.http.problems import BOUNDS, Refusal, over_a_bound, render
from orchestrator_stub.http.shown import MOST_WAIT, shown
from orchestrator_stub.machines.driver import MachineError
from orchestrator_stub.platform.database import Head
from orchestrator_stub.platform.storage import StorageFailure
from orchestrator_stub.platform.tokens import (
    CannotSign,
    Keyring,
    SessionClaims,
    SessionReader,
    TokenRejected,
    names_a_user,
)
from orchestrator_stub.sessions.catchup import FULL, Catchup, ProjectGone
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import ENDED, KEPT, LIVE, Session, State
from orchestrator_stub.sessions.run_settings import OWNERS, RunBody, RunSettings
from orchestrator_stub.sessions.shown import Screens, viewers
from orchestrator_stub.sessions.store import ProjectUnknown, Report, Right, SessionStore
from orchestrator_stub.snapshots.model import SnapshotSource, SnapshotUnavailable

log = structlog.get_logger("app")

RETRY_AFTER = 2.0
"""Seconds: what a caller is told to wait when a part we stand on does not answer. Most such gaps are restarts."""

UNAVAILABLE = (
    SnapshotUnavailable,
    StorageFailure,
    MachineError,
    CannotSign,
    psycopg.OperationalError,
    OSError,
)
"""What a part that does not answer looks like here. (`TimeoutError` is an `OSError`.)"""

BODY_SECONDS = 10.0
"""For a body to arrive: the largest that is read, at the pace of a bad mobile network."""

UP = frozenset({"serving", "degraded"})
"""Agent states in which the preview answers (protocol: states)."""

BEGINNING = frozenset({"starting", "hydrating"})
"""Agent states that one which only slept is never in."""

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the service itself (`user` None), or a user by their token's claims."""

    user: Mapping[str, Any] | None


class SessionRoutes:
    """The routes of control plane and session API. `on_ready` is told how long each machine took to become so,
    `on_wake` how long each that was woken."""

    def __init__(
        self,
        settings: Settings,
        controller: SessionController,
        store: SessionStore,
        catchup: Catchup,
        snapshots: SnapshotSource,
        keys: Keyring,
        runs: RunSettings,
        screens: Screens,
        *,
        clock: Callable[[], float] = time.time,
        on_ready: Callable[[float], None] = lambda seconds: None,
        on_wake: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._settings = settings
        self._controller = controller
        self._store = store
        self._catchup = catchup
        self._snapshots = snapshots
        self._keys = keys
        self._runs = runs
        self._screens = screens
        self._on_ready = on_ready
        self._on_wake = on_wake
        self._tokens = SessionReader(keys, clock)

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        session = "/v1/sessions/{session_id}"
        return [
            self._route("/v1/sessions", POST=self.create, GET=self.listing),
            self._route(session, GET=self.show, DELETE=self.delete),
            self._route(session + "/snapshot", POST=self.snapshot),
            self._route(session + "/shown", GET=self.shown, more=MOST_WAIT),
            self._route("/v1/projects/{project_id}/shown", GET=self.project_shown, more=MOST_WAIT),
            self._route(session + "/sync", POST=self.sync),
            self._route(session + "/token", POST=self.token),
            self._route(session + "/status", PUT=self.status),
        ]

    # --- control plane

    async def create(self, request: Request) -> Response:
        """One session for one `Idempotency-Key`, its machine made or in the making."""
        caller = await self._caller(request)
        body = await self._body(request, CreateBody)
        unknown = Refusal(
            404, "project_unknown", f"There is no project {body.project_id}, or it is not yours."
        )
        if not await self._may(caller, body.project_id):
            raise unknown
        key = request.headers.get("idempotency-key")
        if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
            raise Refusal(
                400, "bad_idempotency_key", "Idempotency-Key must be 1 to 255 printable ASCII characters."
            )
        run = await self._run_of_session(caller, body)
        user = str(caller.user["sub"]) if caller.user else None
        ttl = min(body.ttl_seconds or self._settings.session_ttl, self._settings.session_ttl_max)
        try:
            session, new = await self._controller.request(
                body.project_id, key=key, generation=body.generation, ttl=ttl, user=user, run=run
            )
        except ProjectUnknown:
            raise unknown from None
        if session.state in LIVE:
            session = await self._controller.settled(session.id, self._settings.create_wait) or session
        return json_answer(
            session_form(session),
            HTTPStatus.CREATED if new else HTTPStatus.OK,
            {"Location": f"/v1/sessions/{session.id}"},
        )

    async def listing(self, request: Request) -> Response:
        """The newest sessions, of one project when `project_id` is given; `ended=true` shows those over as well."""
        caller = await self._caller(request)
        project = request.query_params.get("project_id")
        project_id = None if project is None else uuid_of(project, "project")
        if project_id is None and caller.user is not None:
            raise Refusal(403, "not_allowed", "A user lists the sessions of one project: give project_id.")
        if project_id is not None and not await self._may(caller, project_id):
            raise Refusal(404, "project_unknown", f"There is no project {project_id}, or it is not yours.")
        limit = request.query_params.get("limit", "100")
        if not (limit.isascii() and limit.isdecimal() and len(limit) <= 4 and 1 <= int(limit) <= 1000):
            raise Refusal(400, "bad_query", "limit must be a whole number from 1 to 1000.")
        ended = request.query_params.get("ended", "false")
        if ended not in ("true", "false"):
            raise Refusal(400, "bad_query", "ended must be true or false.")
        sessions = await self._store.listing(project_id=project_id, ended=ended == "true", limit=int(limit))
        return json_answer({"sessions": [session_form(session) for session in sessions]})

    async def show(self, request: Request) -> Response:
        """One session, and what is on its screen."""
        session = await self._seen(request)
        found = await self._screens.now(session.id)
        return json_answer(
            session_form(session) | ({**found[1].form(), "agent": found[1].agent} if found else {})
        )

    async def delete(self, request: Request) -> Response:
        """End the session. Deleting it again is no error; the answer shows how far the end has come."""
        session = await self._controller.end((await self._seen(request)).id)
        assert session is not None
        over = session.state in ENDED
        return json_answer(session_form(session), HTTPStatus.OK if over else HTTPStatus.ACCEPTED)

    async def snapshot(self, request: Request) -> Response:
        """A signed snapshot of the session's project as it is now."""
        session = await self._seen(request)
        body = await self._body(request, SnapshotBody)
        if session.state not in LIVE:
            raise session_over(session)
        snapshot = await self._snapshots.signed_snapshot(
            session.project_id, rebuild=body.rebuild, payer=session.id
        )
        return json_answer({"snapshot_url": snapshot.url, "manifest": snapshot.manifest})

    async def shown(self, request: Request) -> Response:
        """What became of a revision: on the screen, or what keeps it from being so."""
        session = await self._seen(request)
        _, answer = await shown(request, self._screens, session.id)
        return json_answer(answer)

    async def project_shown(self, request: Request) -> Response:
        """The same of a project's newest live session."""
        caller = await self._caller(request)
        project_id = uuid_of(request.path_params["project_id"], "project")
        if not await self._may(caller, project_id):
            raise Refusal(404, "project_unknown", f"There is no project {project_id}, or it is not yours.")
        sessions = await self._store.listing(project_id=project_id, ended=False, limit=100)
        newest = next((each for each in sessions if each.state in KEPT), None)
        if newest is None:
            raise Refusal(404, "session_unknown", "The project has no live session. Create one.")
        _, answer = await shown(request, self._screens, newest.id)
        return json_answer(answer)

    # --- session API

    async def sync(self, request: Request) -> Response:
        """What happened to the project above the agent's cursor."""
        claims, session, head = await self._own(request)
        check_current(session, claims)
        body = await self._body(request, SyncBody)
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
        claims, session, _ = await self._own(request, grace=self._settings.token_renew_grace)
        check_current(session, claims)
        return json_answer(await self._token_form(session))

    async def _token_form(self, session: Session) -> dict[str, Any]:
        token, expires_at = self._controller.token_for(session)
        answer: dict[str, Any] = {"realtime_token": token, "expires_at": rfc3339(expires_at)}
        if (nats := self._controller.nats) is not None:
            answer["nats_jwt"] = nats.keys.machine_token(session.project_id, session.id, expires_at)
        return answer

    async def status(self, request: Request) -> Response:
        """A heartbeat: renews the lease, and answers where the database is and what is asked of the agent."""
        claims, session, head = await self._own(request)
        body = await self._body(request, StatusBody)
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

    # --- who asks, and what they say

    async def _caller(self, request: Request) -> Caller:
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

    async def _may(self, caller: Caller, project_id: UUID, what: Right = "read") -> bool:
        """Whether the caller has a right to the project. The database's own policies say so."""
        return caller.user is None or await self._store.may(caller.user, project_id, what)

    async def _run_of_session(self, caller: Caller, body: CreateBody) -> dict[str, Any] | None:
        """What a new session keeps of its own run settings."""
        if body.run is None:
            return None
        await self._admit_run(caller, body.project_id, body.run)
        with kept_secret():
            return self._runs.own(body.project_id, body.run)

    async def _admit_run(self, caller: Caller, project_id: UUID, run: RunBody) -> None:
        """Refuse run settings that are not the caller's to set."""
        what: Right = "own" if OWNERS & run.model_fields_set else "write"
        if not await self._may(caller, project_id, what):
            who = {"own": "the project's owner", "write": "members who may write"}[what]
            raise Refusal(403, "not_allowed", f"Only {who} and the service may set that.")
        key = self._settings.supabase_service_role_key.get_secret_value()
        if any(key in secret for secret in run.secrets()):
            raise Refusal(400, "bad_body", "The service key has no place in a project's environment.")

    async def _seen(self, request: Request) -> Session:
        """The session of the path, for a caller of the control plane; to strangers it does not exist."""
        caller = await self._caller(request)
        session_id = uuid_of(request.path_params["session_id"], "session")
        session = await self._store.get(session_id)
        if session is None or not await self._may(caller, session.project_id):
            raise unknown_session(session_id)
        return session

    async def _own(self, request: Request, *, grace: float = 0.0) -> tuple[SessionClaims, Session, Head]:
        """What the token says, its session, and where the project stands. `grace` as in `Keyring.verify`.

        Over is 410. The session may be draining, or have another machine by now: see `check_current`.
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

    async def _body(self, request: Request, form: type[Body], *, limit: int | None = None) -> Body:
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

    def _route(
        self, path: str, *, more: float = 0.0, **methods: Callable[[Request], Awaitable[Response]]
    ) -> Route:
        """One path and its methods. `more`: seconds that a request may take above the usual."""

        async def endpoint(request: Request) -> Response:
            respond = methods["GET" if request.method == "HEAD" else request.method]
            async with asyncio.timeout(self._settings.request_timeout + more):
                return await respond(request)

        return open_to(self._settings.cors_origins, path, guarded(endpoint), [*methods])


def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """`endpoint`, with everything it may raise rendered as a problem document."""

    async def respond(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refusal as refusal:
            return render(refusal)
        except ProjectGone:
            return render(Refusal(410, "project_gone", "The session's project does not exist any more."))
        except BOUNDS as error:
            return render(over_a_bound(error))
        except UNAVAILABLE as error:
            log.warning(
                "request.unavailable", path=request.url.path, reason=str(error) or type(error).__name__
            )
            what = "snapshot_unavailable" if isinstance(error, SnapshotUnavailable) else "unavailable"
            detail = "A part of the service does not answer now. Ask again."
            return render(Refusal(503, what, detail, retry_after=RETRY_AFTER))
        except ClientDisconnect:
            return Response(status_code=499)

    return respond


async def unknown_path(request: Request, error: Exception) -> Response:
    """What Starlette itself turns away, in our form."""
    assert isinstance(error, HTTPException)
    allow = (error.headers or {}).get("Allow")
    kind, detail = {
        404: ("path_unknown", f"Nothing is served at {request.url.path}."),
        405: ("method_not_allowed", f"This path answers {allow}."),
    }.get(error.status_code, ("refused", "The request cannot be served."))
    return render(Refusal(error.status_code, kind, detail, allow=allow))


async def broken(request: Request, error: Exception) -> Response:
    """A bug: logged with its trace, answered without."""
    log.error("request.failed", path=request.url.path, method=request.method, exc_info=error)
    return render(
        Refusal(500, "internal", "The orchestrator failed; its log says how.", retry_after=RETRY_AFTER)
    )


def application(routes: list[BaseRoute], lifespan: Any = None) -> Starlette:
    """An ASGI application of `routes` whose every refusal is a problem document."""
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: unknown_path, Exception: broken},
    )
    # A path with a slash too many is another path, not a hint to send the token somewhere else.
    app.router.redirect_slashes = False
    return app


def bearer_of(request: Request) -> str:
    """The token that a request shows. Raises `Refusal`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Refusal(401, "token_missing", "Send the token as `Authorization: Bearer …`.")
    return token.strip()


def unknown_session(session_id: UUID) -> Refusal:
    """404: to whoever may not see it a session does not exist."""
    return Refusal(404, "session_unknown", f"There is no session {session_id}, or it is not yours.")


def check_current(session: Session, claims: SessionClaims) -> None:
    """Only the machine that the session has now may go on: a newer one is 409, none wanted 410."""
    if session.state not in KEPT:
        raise session_over(session)
    if session.generation != claims.generation:
        raise Refusal(
            409,
            "generation_superseded",
            f"Machine {claims.generation} was replaced by {session.generation}; this one is to stop.",
            extra={"generation": session.generation},
        )


def _stands_at(body: SyncBody | StatusBody, head: Head) -> bool:
    return (body.epoch, body.revision) == (head.epoch, head.revision)


def session_over(session: Session) -> Refusal:
    return Refusal(410, "session_over", f"The session is {session.state}. Create a new one.")
