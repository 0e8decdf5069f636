"""Serves the routes that put a session to sleep and wake it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.http.forms import json_answer, session_form
from orchestrator_stub.http.problems import Refusal, session_over
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.machines.driver import MachineRefused
from orchestrator_stub.sessions.lifecycle import ENDED, LIVE, State
from orchestrator_stub.sessions.sleep import Sleep


class SleepRoutes:
    """For the product's backend and its users."""

    def __init__(self, requests: Requests, sleep: Sleep) -> None:
        self._requests = requests
        self._sleep = sleep

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        session = "/v1/sessions/{session_id}"
        return [
            self._requests.route(session + "/suspend", POST=self.suspend),
            self._requests.route(session + "/wake", POST=self.wake),
        ]

    async def suspend(self, request: Request) -> Response:
        """Put the session's machine to sleep. One that sleeps already is no error."""
        seen = await self._requests.seen(request)
        try:
            session = await self._sleep.suspend(seen.id) or seen
        except MachineRefused as error:
            raise Refusal(409, "cannot_sleep", f"The machine cannot sleep: {error}") from None
        if session.state in ENDED or session.state is State.DRAINING:
            raise session_over(session)
        if session.state is not State.SUSPENDED:
            raise Refusal(
                409, "session_not_ready", f"The session is {session.state}; only a ready one can sleep."
            )
        return json_answer(session_form(session))

    async def wake(self, request: Request) -> Response:
        """Wake the session. 202: it is on its way; one that is awake is no error."""
        seen = await self._requests.seen(request)
        session = await self._sleep.wake(seen.id) or seen
        if session.state not in LIVE:
            raise session_over(session)
        return json_answer(session_form(session), 200 if session.state is State.READY else 202)
