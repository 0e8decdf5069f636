"""Serves the control plane's sessions: made, listed, shown, ended, and their snapshots."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.config import Settings
from orchestrator_stub.http.bodies import CreateBody, SnapshotBody
from orchestrator_stub.http.forms import json_answer, kept_secret, session_form, uuid_of
from orchestrator_stub.http.problems import Refusal, session_over, unknown_project
from orchestrator_stub.http.requests import Caller, Requests
from orchestrator_stub.http.routes.run import admit_run
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import ENDED, LIVE
from orchestrator_stub.sessions.run_settings import RunSettings
from orchestrator_stub.sessions.shown import Screens
from orchestrator_stub.sessions.store import ProjectUnknown, SessionStore
from orchestrator_stub.snapshots.model import SnapshotSource

PATH = "/v1/sessions"


class SessionRoutes:
    """For the product's backend and its users."""

    def __init__(
        self,
        requests: Requests,
        settings: Settings,
        controller: SessionController,
        store: SessionStore,
        snapshots: SnapshotSource,
        runs: RunSettings,
        screens: Screens,
    ) -> None:
        self._requests = requests
        self._settings = settings
        self._controller = controller
        self._store = store
        self._snapshots = snapshots
        self._runs = runs
        self._screens = screens

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        one = PATH + "/{session_id}"
        return [
            self._requests.route(PATH, POST=self.create, GET=self.listing),
            self._requests.route(one, GET=self.show, DELETE=self.delete),
            self._requests.route(one + "/snapshot", POST=self.snapshot),
        ]

    async def create(self, request: Request) -> Response:
        """One session for one `Idempotency-Key`, its machine made or in the making."""
        caller = await self._requests.caller(request)
        body = await self._requests.body(request, CreateBody)
        if not await self._requests.may(caller, body.project_id):
            raise unknown_project(body.project_id)
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
            raise unknown_project(body.project_id) from None
        if session.state in LIVE:
            session = await self._controller.settled(session.id, self._settings.create_wait) or session
        return json_answer(
            session_form(session),
            HTTPStatus.CREATED if new else HTTPStatus.OK,
            {"Location": f"/v1/sessions/{session.id}"},
        )

    async def listing(self, request: Request) -> Response:
        """The newest sessions, of one project when `project_id` is given; `ended=true` shows those over as well."""
        caller = await self._requests.caller(request)
        project = request.query_params.get("project_id")
        project_id = None if project is None else uuid_of(project, "project")
        if project_id is None and caller.user is not None:
            raise Refusal(403, "not_allowed", "A user lists the sessions of one project: give project_id.")
        if project_id is not None and not await self._requests.may(caller, project_id):
            raise unknown_project(project_id)
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
        session = await self._requests.seen(request)
        found = await self._screens.now(session.id)
        return json_answer(
            session_form(session) | ({**found[1].form(), "agent": found[1].agent} if found else {})
        )

    async def delete(self, request: Request) -> Response:
        """End the session. Deleting it again is no error; the answer shows how far the end has come."""
        session = await self._controller.end((await self._requests.seen(request)).id)
        assert session is not None
        over = session.state in ENDED
        return json_answer(session_form(session), HTTPStatus.OK if over else HTTPStatus.ACCEPTED)

    async def snapshot(self, request: Request) -> Response:
        """A signed snapshot of the session's project as it is now."""
        session = await self._requests.seen(request)
        body = await self._requests.body(request, SnapshotBody)
        if session.state not in LIVE:
            raise session_over(session)
        snapshot = await self._snapshots.signed_snapshot(
            session.project_id, rebuild=body.rebuild, payer=session.id
        )
        return json_answer({"snapshot_url": snapshot.url, "manifest": snapshot.manifest})

    async def _run_of_session(self, caller: Caller, body: CreateBody) -> dict[str, Any] | None:
        """What a new session keeps of its own run settings."""
        if body.run is None:
            return None
        await admit_run(self._requests, self._settings, caller, body.project_id, body.run)
        with kept_secret():
            return self._runs.own(body.project_id, body.run)
