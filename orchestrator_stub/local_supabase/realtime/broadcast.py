"""Takes broadcasts over HTTP, and requests for faults.

POST /realtime/v1/api/broadcast                             {"messages": [{topic, event, payload, private?}]}
POST /realtime/v1/api/broadcast/{topic}/events/{event}      the payload itself, JSON or raw; ?private=true
GET POST DELETE /realtime/v1/faults                         only with faults, and only with the service key
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orchestrator_stub.local_supabase.access import Claims
from orchestrator_stub.local_supabase.realtime.admission import Refused
from orchestrator_stub.local_supabase.realtime.faults import ACTIONS, BadFault, Faults
from orchestrator_stub.local_supabase.realtime.frames import Broadcast
from orchestrator_stub.local_supabase.realtime.server import Realtime

CLOSE_CODES = frozenset({1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014})
"""What an endpoint may send in a close frame (RFC 6455, 7.4, and its registry), beside 3000 to 4999."""

MOST_OVERSIZE = 64 * 1024 * 1024
"""Bytes of an oversize frame: beyond any client's limit, and little memory."""


class BroadcastRoutes:
    """The realtime server's HTTP side."""

    def __init__(self, realtime: Realtime) -> None:
        self._realtime = realtime

    def routes(self) -> list[Route]:
        routes = [
            Route("/realtime/v1/api/broadcast", self._batch, methods=["POST"]),
            Route("/realtime/v1/api/broadcast/{topic}/events/{event}", self._single, methods=["POST"]),
        ]
        if self._realtime.faults is not None:
            routes.append(Route("/realtime/v1/faults", self._faults, methods=["GET", "POST", "DELETE"]))
        return routes

    def _claims(self, request: Request) -> Claims:
        """Raises `Refused`."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            token = request.headers.get("apikey", "")
        return self._realtime.admission.read(token)

    async def _batch(self, request: Request) -> Response:
        try:
            claims = self._claims(request)
        except Refused:
            return _message(401, "Unauthorized")
        try:
            body = orjson.loads(await request.body())
            messages = [_entry(each) for each in body["messages"]]
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            return JSONResponse({"errors": {"messages": [str(error)]}}, 422)
        limit = self._realtime.limits.payload_bytes
        if any(len(message.payload) > limit for message, _ in messages):
            return JSONResponse(
                {"errors": {"messages": [{"payload": ["Payload size exceeds tenant limit"]}]}}, 422
            )
        for message, private in messages:
            # As hosted: what this token may not send is left out, and the answer is 202 all the same.
            if not private or await self._realtime.admission.may_broadcast(message.topic, claims):
                self._realtime.hub.publish(message, private)
        return Response(status_code=202)

    async def _single(self, request: Request) -> Response:
        try:
            claims = self._claims(request)
        except Refused:
            return _message(401, "Unauthorized")
        private = request.query_params.get("private") == "true"
        raw = await request.body()
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        if kind not in ("application/json", "application/octet-stream"):
            return _message(415, "Unsupported Media Type")
        is_json = kind == "application/json"
        if is_json:
            try:
                raw = orjson.dumps(orjson.loads(raw))
            except orjson.JSONDecodeError:
                return JSONResponse({"errors": {"payload": ["is invalid"]}}, 422)
        if len(raw) > self._realtime.limits.payload_bytes:
            return JSONResponse({"errors": {"payload": ["Payload size exceeds tenant limit"]}}, 422)
        topic = request.path_params["topic"]
        if private and not await self._realtime.admission.may_broadcast(topic, claims):
            return _message(403, "Unauthorized")
        self._realtime.hub.publish(
            Broadcast(topic, request.path_params["event"], raw, is_json=is_json), private
        )
        return Response(status_code=202)

    async def _faults(self, request: Request) -> Response:
        faults = self._realtime.faults
        if faults is None or self._bearer(request) != self._realtime.keys.service_key:
            return _message(401, "Unauthorized")
        if request.method == "DELETE":
            self._realtime.faults = faults = Faults()
        if request.method != "POST":
            return JSONResponse(faults.report())
        try:
            body = orjson.loads(await request.body())
            return JSONResponse(await self._inject(faults, body))
        except (orjson.JSONDecodeError, BadFault) as error:
            return _message(422, str(error))

    async def _inject(self, faults: Faults, body: Any) -> dict[str, Any]:
        """`{"action": …, "topic"?, "code"?, "size"?}` or settings by name. Raises `BadFault`."""
        if not isinstance(body, dict):
            raise BadFault("a fault is an object")
        if "action" not in body:
            faults.set(body, now=asyncio.get_running_loop().time())
            return faults.report()
        action = body.pop("action")
        if not isinstance(action, str) or action not in ACTIONS:
            raise BadFault(f"no action {action!r}; there are {', '.join(sorted(ACTIONS))}")
        for name, value in body.items():
            match name, value:
                case "topic", str():
                    pass
                case "code", int() if value in CLOSE_CODES or 3000 <= value <= 4999:
                    pass
                case "size", int() if 0 <= value <= MOST_OVERSIZE:
                    pass
                case _:
                    raise BadFault(f"no parameter {name!r} with the value {value!r}")
        return {"done": await self._realtime.act(action, **body)}

    def _bearer(self, request: Request) -> str:
        return request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get(
            "apikey", ""
        )


def _entry(each: Any) -> tuple[Broadcast, bool]:
    topic, event = each["topic"], each["event"]
    if not (isinstance(topic, str) and topic and isinstance(event, str)):
        raise ValueError("topic and event are strings")
    # The batch form reaches second-version clients as text (supabase/realtime batch_broadcast.ex).
    return Broadcast(topic, event, orjson.dumps(each["payload"]), as_text=True), bool(
        each.get("private", False)
    )


def _message(status: int, text: str) -> Response:
    return JSONResponse({"message": text}, status)
