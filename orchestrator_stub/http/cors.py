"""Lets pages of the configured origins call a route, with a user's token in a header: nothing here goes by cookies."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def open_to(
    origins: Sequence[str],
    path: str,
    endpoint: Callable[[Request], Awaitable[Response]],
    methods: Sequence[str],
) -> Route:
    """The route of `methods`. `origins`: as a browser sends them, or `*`; none: no page may call it."""
    if not origins:
        return Route(path, endpoint, methods=methods)

    async def answer(request: Request) -> Response:
        if (
            request.method == "OPTIONS"
        ):  # that asks nothing; a browser's question is answered by the middleware
            return Response(status_code=HTTPStatus.NO_CONTENT)
        return await endpoint(request)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=methods,
        allow_headers=["authorization", "content-type", "idempotency-key"],
        expose_headers=["location", "retry-after"],
    )
    return Route(path, answer, methods=[*methods, "OPTIONS"], middleware=[cors])
