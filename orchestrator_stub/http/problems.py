"""Renders errors as RFC 9457 problem documents: what went wrong, and what to do about it.

A route raises `Refusal`; the application renders it. `type` is a stable URN that programs match on, `title`
its sentence, `detail` what this caller should do. 401 and 403 are final for the token that was shown, 404 and
410 for the session, 409 names the conflict, 429 and 5xx carry `Retry-After` where known.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from uuid import UUID

import orjson
from starlette.responses import Response

from orchestrator_stub.sessions.lifecycle import Session
from orchestrator_stub.sessions.store import TooManySessions
from orchestrator_stub.snapshots.allowance import AllowanceSpent

MEDIA_TYPE = "application/problem+json"


class Refusal(Exception):
    """A request that is answered with a problem document.

    `kind` becomes the last part of `type`; `retry_after` is in seconds; `extra` are further members.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        retry_after: float | None = None,
        allow: str | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> None:
        self.status = status
        self.kind = kind
        self.detail = detail
        self.retry_after = retry_after
        self.allow = allow
        self.extra = dict(extra or {})
        super().__init__(f"{status} {kind}: {detail}")


def render(refusal: Refusal) -> Response:
    """The problem document of `refusal`, with the headers its status asks for."""
    body = {
        **refusal.extra,
        "type": f"urn:preview-sync:problem:{refusal.kind}",
        "title": refusal.kind.replace("_", " "),
        "status": refusal.status,
        "detail": refusal.detail,
    }
    headers = {"Cache-Control": "no-store"}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(refusal.retry_after)))
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.allow is not None:
        headers["Allow"] = refusal.allow
    return Response(orjson.dumps(body), refusal.status, headers, MEDIA_TYPE)


TOO_MANY_RETRY = 30.0
"""Seconds: two sweeps, in which a session that was ended is over."""

BOUNDS = (TooManySessions, AllowanceSpent)
"""What a caller is told who has as much as one may have."""


def over_a_bound(error: TooManySessions | AllowanceSpent) -> Refusal:
    """429: the bound, and when there is room again."""
    if isinstance(error, AllowanceSpent):
        detail = f"At most {error.limit} bytes of archives an hour are stored for one session."
        extra: dict[str, object] = {"limit": error.limit}
        return Refusal(429, "storage_allowance_spent", detail, retry_after=error.retry_after, extra=extra)
    detail = f"At most {error.limit} sessions of one {error.of} are there at a time; end one of them first."
    extra = {"limit": error.limit, "of": error.of}
    return Refusal(429, "too_many_sessions", detail, retry_after=TOO_MANY_RETRY, extra=extra)


def unknown_project(project_id: UUID) -> Refusal:
    """404: to whoever may not see it a project does not exist."""
    return Refusal(404, "project_unknown", f"There is no project {project_id}, or it is not yours.")


def unknown_session(session_id: UUID) -> Refusal:
    """404: to whoever may not see it a session does not exist."""
    return Refusal(404, "session_unknown", f"There is no session {session_id}, or it is not yours.")


def session_over(session: Session) -> Refusal:
    """410: the session will not come back."""
    return Refusal(410, "session_over", f"The session is {session.state}. Create a new one.")
