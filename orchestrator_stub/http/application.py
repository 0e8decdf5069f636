"""Makes the ASGI application of routes: whatever goes wrong in one is answered with a problem document."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.http.problems import BOUNDS, Refusal, over_a_bound, render
from orchestrator_stub.machines.driver import MachineError
from orchestrator_stub.platform.storage import StorageFailure
from orchestrator_stub.platform.tokens import CannotSign
from orchestrator_stub.sessions.catchup import ProjectGone
from orchestrator_stub.snapshots.model import SnapshotUnavailable

log = structlog.get_logger("app")

RETRY_AFTER = 2.0
"""Seconds: what a caller is told to wait when a part we stand on does not answer. Most such gaps are restarts."""

UNAVAILABLE = (
    SnapshotUnavailable,
    StorageFailure,
    MachineError,
    CannotSign,
    psycopg.OperationalError,
    OSError,
)
"""What a part that does not answer looks like here. (`TimeoutError` is an `OSError`.)"""


def guarded(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """`endpoint`, with everything it may raise rendered as a problem document."""

    async def respond(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Refusal as refusal:
            return render(refusal)
        except ProjectGone:
            return render(Refusal(410, "project_gone", "The session's project does not exist any more."))
        except BOUNDS as error:
            return render(over_a_bound(error))
        except UNAVAILABLE as error:
            log.warning(
                "request.unavailable", path=request.url.path, reason=str(error) or type(error).__name__
            )
            what = "snapshot_unavailable" if isinstance(error, SnapshotUnavailable) else "unavailable"
            detail = "A part of the service does not answer now. Ask again."
            return render(Refusal(503, what, detail, retry_after=RETRY_AFTER))
        except ClientDisconnect:
            return Response(status_code=499)

    return respond


async def unknown_path(request: Request, error: Exception) -> Response:
    """What Starlette itself turns away, in our form."""
    assert isinstance(error, HTTPException)
    allow = (error.headers or {}).get("Allow")
    kind, detail = {
        404: ("path_unknown", f"Nothing is served at {request.url.path}."),
        405: ("method_not_allowed", f"This path answers {allow}."),
    }.get(error.status_code, ("refused", "The request cannot be served."))
    return render(Refusal(error.status_code, kind, detail, allow=allow))


async def broken(request: Request, error: Exception) -> Response:
    """A bug: logged with its trace, answered without."""
    log.error("request.failed", path=request.url.path, method=request.method, exc_info=error)
    return render(
        Refusal(500, "internal", "The orchestrator failed; its log says how.", retry_after=RETRY_AFTER)
    )


def application(routes: list[BaseRoute], lifespan: Any = None) -> Starlette:
    """An ASGI application of `routes` whose every refusal is a problem document."""
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: unknown_path, Exception: broken},
    )
    # A path with a slash too many is another path, not a hint to send the token somewhere else.
    app.router.redirect_slashes = False
    return app
