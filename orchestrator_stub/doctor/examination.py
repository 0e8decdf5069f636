"""Puts the examination together: every part beside the others, from the settings that `serve` reads."""

from __future__ import annotations

from collections.abc import Callable

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from orchestrator_stub.config import Settings, SettingsError
from orchestrator_stub.doctor.database import examine_database
from orchestrator_stub.doctor.door import examine_door
from orchestrator_stub.doctor.findings import Finding, Mark, Report, examine, healthy, lines
from orchestrator_stub.doctor.machines import examine_machines, examine_public_url
from orchestrator_stub.doctor.nats import examine_nats
from orchestrator_stub.doctor.shards import examine_shards
from orchestrator_stub.doctor.supabase import examine_keys, examine_realtime, examine_storage
from orchestrator_stub.platform.redaction import Redactor, secrets_of
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.process import configure_logs
from orchestrator_stub.server.control_plane import keyring_of


async def run_doctor(say: Callable[[str], None], *, as_json: bool) -> bool:
    """Examine what the environment's settings name and print it; whether nothing is bad.

    No secret is printed: what peers say passes the redactor.
    """
    try:
        settings = Settings.from_environment()
    except SettingsError as error:
        found = [Finding("settings", Mark.BAD, problem, "docs/settings.md") for problem in error.problems]
        redacted = found
    else:
        redactor = Redactor(secrets_of(settings))
        configure_logs("error", settings.log_format, redactor)
        found = await examine_all(settings)
        redacted = [
            Finding(each.part, each.mark, redactor.text(each.what), redactor.text(each.remedy))
            for each in found
        ]
    for line in lines(redacted, as_json=as_json):
        say(line)
    return healthy(redacted)


async def examine_all(settings: Settings) -> list[Finding]:
    """Every finding, part by part."""
    async with httpx.AsyncClient() as http:
        return await examine(
            [
                ("settings", _settings),
                (
                    "database",
                    lambda report: examine_database(settings.database_url.get_secret_value(), report),
                ),
                ("keys", lambda report: _keys(settings, http, report)),
                ("realtime", lambda report: _realtime(settings, report)),
                ("nats", lambda report: examine_nats(settings, report)),
                ("storage", lambda report: examine_storage(settings, http, report)),
                ("redis", lambda report: _redis(settings, report)),
                ("machines", lambda report: examine_machines(settings, http, report)),
                ("address", lambda report: examine_public_url(settings, http, report)),
                ("shards", lambda report: examine_shards(settings, http, report)),
                ("door", lambda report: examine_door(settings, report)),
            ]
        )


async def _settings(report: Report) -> None:
    report.ok("every setting can be read")


def _ring(settings: Settings, report: Report) -> Keyring | None:
    try:
        return keyring_of(settings)
    except (OSError, ValueError) as error:
        report.bad(f"the JWT keys cannot be read: {error}", "see JWT_KEYS_FILE or SUPABASE_JWT_SECRET")
        return None


async def _keys(settings: Settings, http: httpx.AsyncClient, report: Report) -> None:
    ring = _ring(settings, report)
    if ring is not None:
        await examine_keys(settings, ring, http, report)


async def _realtime(settings: Settings, report: Report) -> None:
    ring = _ring(settings, Report("realtime"))
    if ring is None:
        report.skip("nothing signs a token to join with")
    else:
        await examine_realtime(settings, ring, report)


async def _redis(settings: Settings, report: Report) -> None:
    if settings.redis_url is None:
        report.ok("not used; PostgreSQL keeps what it would")
        return
    redis = Redis.from_url(settings.redis_url.get_secret_value(), socket_connect_timeout=8, socket_timeout=8)
    try:
        await redis.ping()
    except (RedisError, OSError) as error:
        report.warn(
            f"it does not answer: {type(error).__name__}",
            "see REDIS_URL; without it everything works, a little slower",
        )
    else:
        report.ok("it answers")
    finally:
        await redis.aclose()
