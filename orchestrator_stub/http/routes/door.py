"""Serves the door's part of the control plane: an address that lets a browser in, and the end of that."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.door.store import Access
from orchestrator_stub.http.bodies import DoorBody, RevokeBody
from orchestrator_stub.http.forms import json_answer, rfc3339
from orchestrator_stub.http.problems import Refusal, session_over
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.sessions.lifecycle import KEPT


class DoorRoutes:
    """For the product's backend and its users. `access` None: there is no door."""

    def __init__(self, requests: Requests, access: Access | None) -> None:
        self._requests = requests
        self._access = access

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        return [
            self._requests.route("/v1/sessions/{session_id}/door", POST=self.door),
            self._requests.route("/v1/sessions/{session_id}/door/revoke", POST=self.revoke_door),
        ]

    async def door(self, request: Request) -> Response:
        """An address that lets whoever follows it within a minute into the session's preview."""
        session = await self._requests.seen(request)
        body = await self._requests.body(request, DoorBody)
        if session.state not in KEPT:
            raise session_over(session)
        url, expires_at = await self._door().open(session.project_id, session.id, body.path)
        return json_answer({"url": url, "expires_at": rfc3339(expires_at)})

    async def revoke_door(self, request: Request) -> Response:
        """Take back every address and cookie of the session, and close what is open by them."""
        session = await self._requests.seen(request)
        await self._requests.body(request, RevokeBody)
        if not await self._requests.may(await self._requests.caller(request), session.project_id, "write"):
            raise Refusal(403, "not_allowed", "Only members who may write and the service may do that.")
        await self._door().revoke(session.id)
        return json_answer({"revoked": True})

    def _door(self) -> Access:
        if self._access is None:
            raise Refusal(503, "no_door", "PREVIEW_DOMAIN is not set: there is no door to a preview here.")
        return self._access
