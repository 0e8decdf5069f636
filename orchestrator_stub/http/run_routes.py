"""Serves run settings: members and the service set and see them, a session's agent reads them whole.

A person is shown which secrets there are and nothing of what they are. The agent asks with its current token: one that
expired renews first, since this answer is worth more than a token.
"""

from __future__ import annotations

from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.http.forms import json_answer, kept_secret, uuid_of
from orchestrator_stub.http.problems import Refusal
from orchestrator_stub.http.routes import check_current
from orchestrator_stub.http.sleep_routes import SleepRoutes
from orchestrator_stub.platform.sealing import CannotOpen
from orchestrator_stub.sessions.run_settings import RunBody


class RunRoutes(SleepRoutes):
    """The routes of `SleepRoutes`, and those of run settings."""

    def routes(self) -> list[BaseRoute]:
        return [
            *super().routes(),
            self._route("/v1/projects/{project_id}/run", GET=self.show_run, PUT=self.change_run),
            self._route("/v1/sessions/{session_id}/run", GET=self.run),
        ]

    async def show_run(self, request: Request) -> Response:
        """The run settings of a project, without its secrets."""
        project_id = uuid_of(request.path_params["project_id"], "project")
        if not await self._may(await self._caller(request), project_id):
            raise _unknown(project_id)
        return json_answer((await self._runs.of_project(project_id)).shown())

    async def change_run(self, request: Request) -> Response:
        """Change the run settings of a project; its running agents take them over with their next heartbeat."""
        caller = await self._caller(request)
        project_id = uuid_of(request.path_params["project_id"], "project")
        if not await self._may(caller, project_id):
            raise _unknown(project_id)
        body = await self._body(request, RunBody)
        await self._admit_run(caller, project_id, body)
        with kept_secret():
            changed = await self._runs.change(project_id, body)
        if changed is None:
            raise _unknown(project_id)
        return json_answer(changed.shown())

    async def run(self, request: Request) -> Response:
        """The run settings of a session, secrets and all, for its agent."""
        claims, session, _ = await self._own(request)
        check_current(session, claims)
        try:
            return json_answer(await self._runs.for_agent(session.id, session.project_id))
        except CannotOpen as error:
            raise Refusal(503, "run_settings_sealed", f"The run settings cannot be read: {error}.") from None


def _unknown(project_id: UUID) -> Refusal:
    return Refusal(404, "project_unknown", f"There is no project {project_id}, or it is not yours.")
