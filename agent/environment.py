"""The environment admitted or refused: every problem at once, one line each, with the variable's name.

The agent also refuses what it must not hold. The project's code runs beside it, so a key that opens every project
has no place in the container: neither as a variable nor as the role of the token.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

import msgspec

from agent.allowlist import PASSED_ON, loads_code
from agent.config import Secret, Settings
from agent.errors import MalformedMessage, SettingsError
from agent.tokens import read_token

SERVICE_KEYS = (
    "SUPABASE_SERVICE_ROLE_KEY",
    "SUPABASE_SERVICE_KEY",
    "SERVICE_ROLE_KEY",
    "SUPABASE_SECRET_KEY",
)
"""Names under which a service-role key is commonly handed out."""

REQUIRED = frozenset({"project_id", "session_id"})
WORD_LISTS = frozenset({"dev_command", "install_command", "shadow_ignore"})
"""Written as in a shell, and read without one."""
WORDS = {"on": "true", "yes": "true", "off": "false", "no": "false"}
"""How people write yes and no besides true, false, 1 and 0."""

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
    values, unreadable = _values(given)
    problems += unreadable + _missing(given) + _urls(given) + _token(given) + _loaded_code(environ)
    if problems:
        raise SettingsError(sorted(problems))
    settings = Settings(**values)
    if settings.shadow:
        _apart(settings)
    return settings


def _apart(settings: Settings) -> None:
    """Nothing of ours may stand in the directory that is only looked at. Raises `SettingsError`."""
    live = settings.project_dir.resolve()
    ours = {
        "SHADOW_DIR": settings.tree_dir, "STAGING_DIR": settings.staging, "STATE_DIR": settings.state_dir
    }  # fmt: skip
    problems = [
        f"{name}: {path} is inside PROJECT_DIR, which SYNC_MODE=shadow never touches"
        for name, path in ours.items()
        if path.resolve().is_relative_to(live)
    ]
    if live.is_relative_to(settings.tree_dir.resolve()):
        problems.append(
            f"SHADOW_DIR: {settings.tree_dir} contains PROJECT_DIR, which is not the agent's to write"
        )
    if problems:
        raise SettingsError(problems)


def read_settings(environ: Mapping[str, str]) -> Settings:
    """The settings alone, whatever else `run` may need. Raises `SettingsError`."""
    values, problems = _values({name.upper(): value for name, value in environ.items() if value != ""})
    if problems:
        raise SettingsError(sorted(problems))
    return Settings(**values)


def _values(given: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Every setting that is given and can be read, and a sentence for each that cannot."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, kind in get_type_hints(Settings, include_extras=True).items():
        text = given.get(name.upper())
        if text is None:
            if name in REQUIRED:
                problems.append(f"{name.upper()}: is required and not set")
            continue
        try:
            values[name] = msgspec.convert(_spelled(name, text), kind, strict=False, dec_hook=_own_types)
        except (msgspec.ValidationError, ValueError) as error:
            closing = " (a quotation mark is not closed)" if "closing quotation" in str(error) else ""
            problems.append(f"{name.upper()}: must be {_wanted(kind)}{closing}")
    if values.get("health_port", 9464) == values.get("dev_port", 5173):
        problems.append("HEALTH_PORT: is DEV_PORT too; give each a port of its own")
    return values, problems


def _spelled(name: str, text: str) -> object:
    """The text as the reader takes it: words as in a shell; yes is true."""
    if name in WORD_LISTS:
        return tuple(shlex.split(text)) or None
    return WORDS.get(text.lower(), text)


def _own_types(kind: type, value: object) -> object:
    if kind is Path or kind is Secret:
        return kind(str(value))
    raise NotImplementedError(kind)


def _wanted(kind: Any) -> str:
    """What a setting takes, in words. Nothing about what was given: it may be a secret in the wrong place."""
    from msgspec import inspect  # for refusals alone

    wanted = inspect.type_info(kind)
    if isinstance(wanted, inspect.UnionType):
        wanted = next(part for part in wanted.types if not isinstance(part, inspect.NoneType))
    match wanted:
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType():
            return f"one of {', '.join(sorted(map(str, wanted.values)))}"
        case inspect.IntType() | inspect.FloatType():
            whole = "a whole number" if isinstance(wanted, inspect.IntType) else "a number"
            bounds = (("above", wanted.gt), ("of at least", wanted.ge), ("of at most", wanted.le))
            said = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
            return f"{whole} {said}".rstrip()
        case inspect.UUIDType():
            return "a UUID"
        case inspect.VarTupleType() | inspect.CollectionType():
            return "words as in a shell"
    return "text"


def _missing(given: Mapping[str, str]) -> list[str]:
    problems = []
    if "REALTIME_TOKEN" not in given and "REALTIME_TOKEN_FILE" not in given:
        problems.append("REALTIME_TOKEN: is required and not set (or REALTIME_TOKEN_FILE)")
    if "REALTIME_URL" not in given:
        problems.append("REALTIME_URL: is required and not set (wss://<project>.supabase.co/realtime/v1)")
    return problems


def _loaded_code(environ: Mapping[str, str]) -> list[str]:
    names = {name: name.removeprefix(PASSED_ON) for name, value in environ.items() if value}
    return [
        f"{name}: has the system load code into every program; remove it, and set {inner} in the dev script for the"
        " program that needs it"
        for name, inner in names.items()
        if inner != name and loads_code(inner)
    ]


def _urls(given: Mapping[str, str]) -> list[str]:
    problems = []
    for name, schemes in URLS.items():
        if name not in given:
            continue
        try:
            parts = urlsplit(given[name])
            good = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
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
