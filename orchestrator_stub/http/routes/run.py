"""Serves run settings: members and the service set and see them, a session's agent reads them whole.

A person is shown which secrets there are and nothing of what they are. The agent asks with its current token: one that
expired renews first, since this answer is worth more than a token.
"""

from __future__ import annotations

from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.config import Settings
from orchestrator_stub.http.forms import json_answer, kept_secret
from orchestrator_stub.http.problems import Refusal, unknown_project
from orchestrator_stub.http.requests import Caller, Requests
from orchestrator_stub.platform.sealing import CannotOpen
from orchestrator_stub.sessions.run_settings import OWNERS, RunBody, RunSettings
from orchestrator_stub.sessions.store import Right


class RunRoutes:
    """For members and the service, and for a session's agent."""

    def __init__(self, requests: Requests, settings: Settings, runs: RunSettings) -> None:
        self._requests = requests
        self._settings = settings
        self._runs = runs

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        return [
            self._requests.route("/v1/projects/{project_id}/run", GET=self.show_run, PUT=self.change_run),
            self._requests.route("/v1/sessions/{session_id}/run", GET=self.run),
        ]

    async def show_run(self, request: Request) -> Response:
        """The run settings of a project, without its secrets."""
        _, project_id = await self._requests.project(request)
        return json_answer((await self._runs.of_project(project_id)).shown())

    async def change_run(self, request: Request) -> Response:
        """Change the run settings of a project; its running agents take them over with their next heartbeat."""
        caller, project_id = await self._requests.project(request)
        body = await self._requests.body(request, RunBody)
        await admit_run(self._requests, self._settings, caller, project_id, body)
        with kept_secret():
            changed = await self._runs.change(project_id, body)
        if changed is None:
            raise unknown_project(project_id)
        return json_answer(changed.shown())

    async def run(self, request: Request) -> Response:
        """The run settings of a session, secrets and all, for its agent."""
        session, _ = await self._requests.current(request)
        try:
            return json_answer(await self._runs.for_agent(session.id, session.project_id))
        except CannotOpen as error:
            raise Refusal(503, "run_settings_sealed", f"The run settings cannot be read: {error}.") from None


async def admit_run(
    requests: Requests, settings: Settings, caller: Caller, project_id: UUID, run: RunBody
) -> None:
    """Refuse run settings that are not the caller's to set. Raises `Refusal`."""
    what: Right = "own" if OWNERS & run.model_fields_set else "write"
    if not await requests.may(caller, project_id, what):
        who = {"own": "the project's owner", "write": "members who may write"}[what]
        raise Refusal(403, "not_allowed", f"Only {who} and the service may set that.")
    key = settings.supabase_service_role_key.get_secret_value()
    if any(key in secret for secret in run.secrets()):
        raise Refusal(400, "bad_body", "The service key has no place in a project's environment.")
