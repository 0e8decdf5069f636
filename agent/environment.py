"""The environment admitted or refused: every problem at once, one line each, with the variable's name.

The agent also refuses what it must not hold. The project's code runs beside it, so a key that opens every project
has no place in the container: neither as a variable nor as the role of the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from agent.config import Settings
from agent.errors import MalformedMessage, SettingsError
from agent.tokens import read_token

SERVICE_KEYS = (
    "SUPABASE_SERVICE_ROLE_KEY",
    "SUPABASE_SERVICE_KEY",
    "SERVICE_ROLE_KEY",
    "SUPABASE_SECRET_KEY",
)
"""Names under which a service-role key is commonly handed out."""

URLS = {
    "SNAPSHOT_URL": ("http", "https"),
    "REALTIME_URL": ("ws", "wss", "http", "https"),
    "SESSION_API_URL": ("http", "https"),
}


def read_environment(environ: Mapping[str, str]) -> Settings:
    """The settings in `environ`. Raises `SettingsError` with one sentence per problem; values are never shown."""
    given = {name.upper(): value for name, value in environ.items() if value != ""}
    problems = [
        f"{name}: a service-role key must not be in the container; remove it (the agent needs REALTIME_TOKEN only)"
        for name in SERVICE_KEYS
        if name in given
    ]
    settings: Settings | None = None
    try:
        known = {name: given[name.upper()] for name in Settings.model_fields if name.upper() in given}
        settings = Settings.model_validate(known)
    except ValidationError as error:
        problems += [_sentence(each) for each in error.errors(include_url=False, include_input=False)]
    problems += _missing(given) + _urls(given) + _token(given)
    if problems or settings is None:
        raise SettingsError(sorted(problems))
    return settings


def _sentence(error: ErrorDetails) -> str:
    name = str(error["loc"][0]).upper() if error["loc"] else "environment"
    if error["type"] == "missing":
        return f"{name}: is required and not set"
    text = error["msg"]
    return f"{name}: {text[:1].lower()}{text[1:]}"


def _missing(given: Mapping[str, str]) -> list[str]:
    problems = []
    if "REALTIME_TOKEN" not in given and "REALTIME_TOKEN_FILE" not in given:
        problems.append("REALTIME_TOKEN: is required and not set (or REALTIME_TOKEN_FILE)")
    if "REALTIME_URL" not in given:
        problems.append("REALTIME_URL: is required and not set (wss://<project>.supabase.co/realtime/v1)")
    return problems


def _urls(given: Mapping[str, str]) -> list[str]:
    problems = []
    for name, schemes in URLS.items():
        if name not in given:
            continue
        try:
            parts = urlsplit(given[name])
            good = parts.scheme in schemes and bool(parts.hostname)
        except ValueError:
            good = False
        if not good:
            problems.append(f"{name}: must be a URL with a host, beginning with {', '.join(schemes)}")
    return problems


def _token(given: Mapping[str, str]) -> list[str]:
    if "REALTIME_TOKEN" not in given:
        return []
    try:
        token = read_token(given["REALTIME_TOKEN"])
    except MalformedMessage as error:
        return [f"REALTIME_TOKEN: {error.reason}"]
    if token.role == "service_role":
        return [
            "REALTIME_TOKEN: its role is service_role, which opens every project; mint one with the role preview_agent"
        ]
    return []
