"""Describes the routes as OpenAPI 3.1: `/openapi.json` serves it, and a test holds the routes against it.

Bodies that come in are described by the very models that read them (`bodies.CreateBody` …); what goes out is written
down here, with every status a caller of that route may meet.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from orchestrator_stub import __version__
from orchestrator_stub.http.bodies import (
    ChangesBody,
    CreateBody,
    DoorBody,
    ModulesBody,
    ModulesPart,
    ModulesSentBody,
    OfferedChange,
    RevokeBody,
    RoomBody,
    SnapshotBody,
    StatusBody,
    SyncBody,
)
from orchestrator_stub.sessions.lifecycle import State
from orchestrator_stub.sessions.run_settings import RunBody

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
UUID: Schema = {"type": "string", "format": "uuid"}
TIME: Schema = {"type": "string", "format": "date-time"}
URL: Schema = {"type": "string", "format": "uri"}
WHOLE: Schema = {"type": "integer", "minimum": 0}


def _object(optional: Schema | None = None, /, **required: Schema) -> Schema:
    return {"type": "object", "required": [*required], "properties": {**required, **(optional or {})}}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _schema_of(form: type[BaseModel]) -> Schema:
    """The schema of what comes in; the forms that it uses are components of their own."""
    schema = form.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return schema


MANIFEST: Schema = _or_null({"type": "object"})
"""As protocol.md writes it; null when it is too long to repeat: it is the archive's first entry anyway."""

SCREEN: Schema = {
    "applied": WHOLE,
    "shown": _or_null({"type": "object", "required": ["revision"], "properties": {"revision": WHOLE}}),
    "errors": {"type": "array", "items": {"type": "object"}},
}
"""As the agent said it last; docs/screen.md has the fields."""
AGENT: Schema = _object(
    state=_or_null(TEXT),
    link=_or_null(TEXT),
    dev_server=_or_null(TEXT),
    start={"type": "object", "additionalProperties": {"type": "number"}},
    problems={"type": "array", "items": {"type": "object"}},
)
"""As the agent said it last. `start`: seconds from the start of its process to the end of each part."""
RUN_FIELDS: Schema = {
    "root": _or_null(TEXT),
    "dev_command": _or_null(TEXT),
    "dev_port": _or_null(WHOLE),
    "install_command": _or_null(TEXT),
    "frame_ancestors": _or_null({"type": "array", "items": TEXT}),
    "coep": _or_null(TEXT),
    "corp": _or_null(TEXT),
    "allowed_hosts": _or_null({"type": "array", "items": TEXT}),
    "public": _or_null({"type": "boolean"}),
    "transport": _or_null({"enum": ["realtime", "nats"]}),
    "write_back": _or_null({"type": "boolean"}),
}
RULES: Schema = {
    "type": "array",
    "items": _object(
        glob=TEXT, mode={"enum": ["generated", "authored"]}, max_bytes=WHOLE, deletes={"type": "boolean"}
    ),
}
"""Empty: write-back is off."""

SCHEMAS: Schema = {
    "Problem": _object(type=TEXT, title=TEXT, status={"type": "integer"}, detail=TEXT),
    "Session": _object(
        {"problem": TEXT, **SCREEN, "agent": AGENT},
        session_id=UUID,
        project_id=UUID,
        state={"type": "string", "enum": [state.value for state in State]},
        generation={"type": "integer", "minimum": 1},
        preview_url=_or_null(URL),
        created_at=TIME,
        expires_at=TIME,
        machine=_or_null(_object({"region": TEXT}, driver=TEXT, id=TEXT)),
    ),
    "Shown": _object(
        session_id=UUID,
        outcome={"enum": ["shown", "error", "no_viewer", "applied", "behind"]},
        **SCREEN,
    ),
    "Sessions": _object(sessions={"type": "array", "items": _ref("Session")}),
    "Snapshot": _object(snapshot_url=URL, manifest=MANIFEST),
    "Change": _object(
        {
            "content": _or_null(TEXT),
            "content_hash": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
            "encoding": {"enum": ["utf-8", "base64"]},
        },
        action={"enum": ["update", "delete"]},
        file_path=TEXT,
        version=WHOLE,
    ),
    "Sync": {
        "oneOf": [
            _object(kind={"const": "current"}, epoch=UUID, revision=WHOLE),
            _object(
                kind={"const": "changes"},
                epoch=UUID,
                revision=WHOLE,
                base_revision=WHOLE,
                changes={"type": "array", "items": _ref("Change")},
            ),
            _object(
                {"reason": {"const": "ahead"}},
                kind={"const": "snapshot"},
                snapshot_url=URL,
                manifest=MANIFEST,
            ),
        ]
    },
    "Run": _object(
        run_revision=WHOLE,
        **RUN_FIELDS,
        env_names={"type": "array", "items": TEXT},
        has_npmrc={"type": "boolean"},
    ),
    "RunWithSecrets": _object(
        run_revision=WHOLE,
        **{**RUN_FIELDS, "write_back": RULES},
        env={"type": "object", "additionalProperties": TEXT},
        npmrc=_or_null(TEXT),
    ),
    "Changes": _object(
        epoch=UUID,
        revision=WHOLE,
        results={
            "type": "array",
            "items": _object(
                {"version": WHOLE, "revision": WHOLE, "kept_id": UUID, "rule": TEXT},
                file_path=TEXT,
                outcome={"enum": ["applied", "same", "proposed", "conflict", "refused"]},
            ),
        },
    ),
    "Door": _object(url=URL, expires_at=TIME),
    "Room": _object(url=URL, expires_at=TIME),
    "Revoked": _object(revoked={"type": "boolean"}),
    "Modules": {
        "oneOf": [
            _object(
                kind={"const": "layer"},
                parts={
                    "type": "array",
                    "items": _object(
                        url=URL, sha256={"type": "string", "pattern": "^[0-9a-f]{64}$"}, size=WHOLE
                    ),
                },
            ),
            _object(
                {"upload_urls": {"type": "array", "items": URL}}, kind={"const": "missing"}, max_bytes=WHOLE
            ),
        ]
    },
    "ModulesTaken": _object(kind={"const": "layer"}),
    "Token": _object({"nats_jwt": TEXT, "write_token": TEXT}, realtime_token=TEXT, expires_at=TIME),
    "Head": _object(
        {
            "action": {"enum": ["sync", "stop"]},
            "tree_hash": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        },
        epoch=UUID,
        revision=WHOLE,
        run_revision=WHOLE,
    ),
    **{
        form.__name__: _schema_of(form)
        for form in (
            CreateBody,
            DoorBody,
            RevokeBody,
            RoomBody,
            SnapshotBody,
            SyncBody,
            StatusBody,
            RunBody,
            ModulesBody,
            ModulesPart,
            ModulesSentBody,
            ChangesBody,
            OfferedChange,
        )
    },
}

SAID = {
    200: "Done.",
    201: "Made.",
    202: "Under way.",
    400: "The request is malformed.",
    401: "No token, or one that is not to be believed.",
    403: "The token is good, and not for this.",
    404: "There is no such project or session, or it is not the caller's.",
    408: "The body did not arrive in time.",
    409: "Another generation's machine has the session.",
    410: "The session is over, or its project does not exist any more.",
    413: "The body is too large.",
    422: "What was told is not what is stored.",
    429: "As many sessions, stored bytes or waiting requests as are allowed; Retry-After says when to ask again.",
    503: "A part of the service does not answer now; Retry-After says when to ask again.",
}
ALWAYS = (400, 401, 403, 404, 503)
"""What any route may answer."""

PARAMETERS: Schema = {
    "session": {"name": "session_id", "in": "path", "required": True, "schema": UUID},
    "key": {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
    },
    "project": {"name": "project_id", "in": "query", "schema": UUID},
    "owner": {"name": "project_id", "in": "path", "required": True, "schema": UUID},
    "ended": {"name": "ended", "in": "query", "schema": {"type": "boolean"}},
    "project_path": {"name": "project_id", "in": "path", "required": True, "schema": UUID},
    "revision": {"name": "revision", "in": "query", "schema": {**WHOLE, "maximum": 2**63 - 1}},
    "epoch": {"name": "epoch", "in": "query", "schema": {"type": "string", "maxLength": 255}},
    "wait": {"name": "wait", "in": "query", "schema": {"type": "number", "minimum": 0, "maximum": 30}},
    "quiet": {"name": "quiet", "in": "query", "schema": {"type": "number", "minimum": 0, "maximum": 10}},
    "limit": {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}},
}


def _operation(
    summary: str,
    callers: tuple[str, ...],
    answer: str,
    *parameters: str,
    body: str = "",
    also: tuple[int, ...] = (),
) -> Schema:
    said = {"content": {"application/json": {"schema": _ref(answer)}}}
    problem = {"content": {"application/problem+json": {"schema": _ref("Problem")}}}
    statuses = sorted({200, *ALWAYS, *also, *([408, 413] if body else [])})
    operation: Schema = {
        "summary": summary,
        "security": [{caller: []} for caller in callers],
        "parameters": [PARAMETERS[name] for name in parameters],
        "responses": {
            str(status): {"description": SAID[status], **(said if status < 300 else problem)}
            for status in statuses
        },
    }
    if body:
        content = {"application/json": {"schema": _ref(body)}}
        operation["requestBody"] = {
            "required": body not in ("SnapshotBody", "RunBody", "DoorBody", "RevokeBody"),
            "content": content,
        }
    return operation


BY_PRODUCT, BY_AGENT = ("service", "user"), ("session",)
"""Who asks the control plane, and who the session API: the security schemes of an operation."""

ONE = "/v1/sessions/{session_id}"
SUPERSEDED_OR_OVER = (409, 410)


def _sessions() -> Schema:
    """The control plane's sessions, from their making to their end."""
    create = _operation("Make a session", BY_PRODUCT, "Session", "key", body="CreateBody", also=(201, 429))
    signed = _operation(
        "Give a signed snapshot", BY_PRODUCT, "Snapshot", "session", body="SnapshotBody", also=(410, 429)
    )
    suspend = _operation("Put a session to sleep", BY_PRODUCT, "Session", "session", also=SUPERSEDED_OR_OVER)
    return {
        "/v1/sessions": {
            "post": create,
            "get": _operation("List sessions", BY_PRODUCT, "Sessions", "project", "ended", "limit"),
        },
        ONE: {
            "get": _operation("Show a session", BY_PRODUCT, "Session", "session"),
            "delete": _operation("End a session", BY_PRODUCT, "Session", "session", also=(202,)),
        },
        f"{ONE}/snapshot": {"post": signed},
        f"{ONE}/suspend": {"post": suspend},
        f"{ONE}/wake": {
            "post": _operation("Wake a session", BY_PRODUCT, "Session", "session", also=(202, 410))
        },
    }


def _screens() -> Schema:
    """What is on the screen of a session, or of a project's newest."""
    asked = ("revision", "epoch", "wait", "quiet")
    of_session = _operation("Wait for the screen", BY_PRODUCT, "Shown", "session", *asked, also=(410, 429))
    of_project = _operation(
        "Wait for a project's screen", BY_PRODUCT, "Shown", "project_path", *asked, also=(410, 429)
    )
    return {f"{ONE}/shown": {"get": of_session}, "/v1/projects/{project_id}/shown": {"get": of_project}}


def _entrances() -> Schema:
    """Ways in: to a file's room, and to the preview through the door."""
    room = _operation("Enter a file's room", ("user",), "Room", "project_path", body="RoomBody", also=(429,))
    door = _operation("Let a browser in", BY_PRODUCT, "Door", "session", body="DoorBody", also=(410,))
    revoke = _operation("Let nobody in any more", BY_PRODUCT, "Revoked", "session", body="RevokeBody")
    return {
        "/v1/projects/{project_id}/rooms": {"post": room},
        f"{ONE}/door": {"post": door},
        f"{ONE}/door/revoke": {"post": revoke},
    }


def _run_settings() -> Schema:
    """How a project is started: set by people, read by the agent."""
    change = _operation("Change a project's run settings", BY_PRODUCT, "Run", "owner", body="RunBody")
    read = _operation(
        "Read the session's run settings", BY_AGENT, "RunWithSecrets", "session", also=SUPERSEDED_OR_OVER
    )
    return {
        "/v1/projects/{project_id}/run": {
            "get": _operation("Show a project's run settings", BY_PRODUCT, "Run", "owner"),
            "put": change,
        },
        f"{ONE}/run": {"get": read},
    }


def _session_api() -> Schema:
    """What an agent asks with its session's tokens."""
    live = SUPERSEDED_OR_OVER
    sync = _operation("Catch up", BY_AGENT, "Sync", "session", body="SyncBody", also=(*live, 429))
    find = _operation(
        "Find a dependency layer", BY_AGENT, "Modules", "session", body="ModulesBody", also=live
    )
    sent = _operation(
        "Say that a dependency layer is sent", BY_AGENT, "ModulesTaken", "session", body="ModulesSentBody",
        also=(*live, 422),
    )  # fmt: skip
    changes = _operation(
        "Offer what tools made", ("write",), "Changes", "session", body="ChangesBody", also=(410, 422, 429)
    )
    status = _operation("Heartbeat", BY_AGENT, "Head", "session", body="StatusBody", also=(410,))
    return {
        f"{ONE}/sync": {"post": sync},
        f"{ONE}/modules": {"post": find, "put": sent},
        f"{ONE}/changes": {"post": changes},
        f"{ONE}/token": {"post": _operation("Renew the token", BY_AGENT, "Token", "session", also=live)},
        f"{ONE}/status": {"put": status},
    }


def openapi_document() -> Schema:
    """The routes of the control plane and of the session API."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "preview-sync orchestrator", "version": __version__},
        "paths": {**_sessions(), **_screens(), **_entrances(), **_run_settings(), **_session_api()},
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                name: {"type": "http", "scheme": "bearer", "description": description}
                for name, description in (
                    ("service", "The service key."),
                    ("user", "A user's access token."),
                    ("session", "The session's own token."),
                    ("write", "The session's token for offers, which the answer of `token` has."),
                )
            },
        },
    }
