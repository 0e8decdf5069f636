"""Writes answers as they travel: a session, a moment, a body of JSON; and reads an id of a path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import orjson
from starlette.responses import Response

from orchestrator_stub.http.problems import Refusal
from orchestrator_stub.platform.sealing import CannotSeal
from orchestrator_stub.sessions.lifecycle import Session
from orchestrator_stub.sessions.run_settings import TooManySecrets


def session_form(session: Session) -> dict[str, Any]:
    """A session as it travels (protocol: control plane)."""
    form: dict[str, Any] = {
        "session_id": str(session.id),
        "project_id": str(session.project_id),
        "state": session.state.value,
        "generation": session.generation,
        "preview_url": session.preview_url,
        "created_at": rfc3339(session.created_at),
        "expires_at": rfc3339(session.expires_at),
        "machine": None,
    }
    if session.machine_id is not None:
        form["machine"] = {"driver": session.machine_driver, "id": session.machine_id}
        if session.machine_region is not None:
            form["machine"]["region"] = session.machine_region
    if session.problem is not None:
        form["problem"] = session.problem
    return form


def json_answer(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer that nobody keeps."""
    return Response(
        orjson.dumps(body), status, {"Cache-Control": "no-store", **(headers or {})}, "application/json"
    )


def uuid_of(text: str, what: str) -> UUID:
    """The id that a path or a query names. Raises `Refusal`: there is no such `what`."""
    try:
        return UUID(text)
    except ValueError:
        raise Refusal(404, f"{what}_unknown", f"{what} must be a UUID.") from None


def rfc3339(moment: float) -> str:
    """Unix seconds as text, in UTC."""
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


@contextmanager
def kept_secret() -> Iterator[None]:
    """Refuse what cannot be kept encrypted, or is too much."""
    try:
        yield
    except CannotSeal:
        raise Refusal(
            503, "run_settings_no_key", "RUN_SETTINGS_KEYS is not set: nothing secret is kept."
        ) from None
    except TooManySecrets as error:
        raise Refusal(413, "body_too_large", str(error)) from None
