"""Lets pages of the configured origins call a route, with a user's token in a header: nothing here goes by cookies."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response


def cors(origins: Sequence[str], methods: Sequence[str]) -> Middleware:
    """For a route of `methods`. `origins`: as a browser sends them, or `*`."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=methods,
        allow_headers=["authorization", "content-type", "idempotency-key"],
        expose_headers=["location", "retry-after"],
    )


async def no_preflight(_: Request) -> Response:
    """An OPTIONS that asks nothing; a browser's question is answered by the middleware."""
    return Response(status_code=HTTPStatus.NO_CONTENT)
