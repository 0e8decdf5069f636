"""Serves the door's part of the control plane: an address that lets a browser in, and the end of that."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.door.store import Access
from orchestrator_stub.http.bodies import DoorBody, RevokeBody
from orchestrator_stub.http.forms import json_answer, rfc3339
from orchestrator_stub.http.problems import Refusal
from orchestrator_stub.http.routes import session_over
from orchestrator_stub.http.run_routes import RunRoutes
from orchestrator_stub.sessions.lifecycle import KEPT


class DoorRoutes(RunRoutes):
    """The routes of `RunRoutes`, and those of the door. `access` None: there is no door."""

    def __init__(self, *parts: Any, access: Access | None = None, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._access = access

    def routes(self) -> list[BaseRoute]:
        return [
            *super().routes(),
            self._route("/v1/sessions/{session_id}/door", POST=self.door),
            self._route("/v1/sessions/{session_id}/door/revoke", POST=self.revoke_door),
        ]

    async def door(self, request: Request) -> Response:
        """An address that lets whoever follows it within a minute into the session's preview."""
        session = await self._seen(request)
        body = await self._body(request, DoorBody)
        if session.state not in KEPT:
            raise session_over(session)
        url, expires_at = await self._door().open(session.project_id, session.id, body.path)
        return json_answer({"url": url, "expires_at": rfc3339(expires_at)})

    async def revoke_door(self, request: Request) -> Response:
        """Take back every address and cookie of the session, and close what is open by them."""
        session = await self._seen(request)
        await self._body(request, RevokeBody)
        if not await self._may(await self._caller(request), session.project_id, "write"):
            raise Refusal(403, "not_allowed", "Only members who may write and the service may do that.")
        await self._door().revoke(session.id)
        return json_answer({"revoked": True})

    def _door(self) -> Access:
        if self._access is None:
            raise Refusal(503, "no_door", "PREVIEW_DOMAIN is not set: there is no door to a preview here.")
        return self._access
