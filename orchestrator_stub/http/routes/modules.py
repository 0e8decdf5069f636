"""Serves dependency layers: a session's agent asks for one by its key, and says that it has sent one.

Both ask with the current token of the session's current machine; the project is the session's.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.http.bodies import ModulesBody, ModulesSentBody
from orchestrator_stub.http.forms import json_answer
from orchestrator_stub.http.problems import Refusal
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.modules.layers import ModuleLayers, NotSent


class ModuleRoutes:
    """For a session's agent."""

    def __init__(self, requests: Requests, layers: ModuleLayers) -> None:
        self._requests = requests
        self._layers = layers

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        path = "/v1/sessions/{session_id}/modules"
        return [self._requests.route(path, POST=self.find_modules, PUT=self.add_modules)]

    async def find_modules(self, request: Request) -> Response:
        """The layer of a key, or where to send it. One that the session's machine has refused is dropped first."""
        session, _ = await self._requests.current(request)
        body = await self._requests.body(request, ModulesBody)
        if body.refused is not None:
            await self._layers.refuse(session.project_id, session.id, body.key, body.refused)
        found = await self._layers.find(
            session.project_id, session.id, body.key, ahead=body.ahead, send=body.send
        )
        return json_answer(found)

    async def add_modules(self, request: Request) -> Response:
        """A layer that has been sent. The first of a key stays; another one is no error."""
        session, _ = await self._requests.current(request)
        body = await self._requests.body(request, ModulesSentBody)
        parts = [part.model_dump() for part in body.parts]
        try:
            await self._layers.add(session.project_id, session.id, body.key, parts, ahead=body.ahead)
        except NotSent as error:
            raise Refusal(422, "modules_not_sent", f"The layer is not taken: {error}.") from None
        return json_answer({"kind": "layer"})
