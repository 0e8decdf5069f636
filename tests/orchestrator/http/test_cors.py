"""`/v1` from a page: of a configured origin it is let in, of any other it is told nothing."""

from __future__ import annotations

import httpx
import pytest

from orchestrator_stub.config import SettingsError
from tests.orchestrator.sessions.control_world import bearer, control_world, settings_for

OURS, THEIRS = "https://app.example.com", "https://evil.example"


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
    }


async def test_a_configured_origin_and_another(database: str) -> None:
    async with control_world(database, cors_origins=f"{OURS} http://localhost:3000") as world:
        asked = await world.http.options("/v1/sessions", headers=preflight(OURS))
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == OURS
        assert "idempotency-key" in asked.headers["access-control-allow-headers"].lower()
        refused = await world.http.options("/v1/sessions", headers=preflight(THEIRS))
        assert refused.status_code == 400
        assert "access-control-allow-origin" not in refused.headers

        owner = await world.user()
        project = str(await world.project(owner))
        token = bearer(world.user_token(owner))
        made = await world.http.post(
            "/v1/sessions", json={"project_id": project}, headers={**token, "Origin": OURS}
        )
        assert made.status_code == 201, made.text
        assert made.headers["access-control-allow-origin"] == OURS
        assert "location" in made.headers["access-control-expose-headers"].lower()
        answer = await world.http.get("/v1/sessions", headers={"Origin": OURS})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, OURS)
        other = await world.http.get(
            f"/v1/sessions?project_id={project}", headers={**token, "Origin": THEIRS}
        )
        assert other.status_code == 200
        assert "access-control-allow-origin" not in other.headers
        assert (await world.http.options("/v1/sessions")).status_code == 204


async def test_any_origin(database: str) -> None:
    async with control_world(database, cors_origins="*") as world:
        path = "/v1/sessions/00000000-0000-4000-8000-000000000000"
        asked = await world.http.options(path, headers=preflight(THEIRS, "DELETE"))
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "*")
        patched = await world.http.options(path, headers=preflight(THEIRS, "PATCH"))
        assert patched.status_code == 400


async def test_without_the_setting_no_page_is_let_in(database: str) -> None:
    async with control_world(database) as world:
        asked: httpx.Response = await world.http.options("/v1/sessions", headers=preflight(OURS))
        assert asked.status_code == 405
        answer = await world.http.get("/v1/sessions", headers={"Origin": OURS})
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "origin",
    [
        "https://app.example.com/",
        "app.example.com",
        "https://*.example.com",
        "HTTPS://APP.EXAMPLE.COM",
        "null",
    ],
)
def test_what_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match="no origin"):
        settings_for("postgresql://x@localhost/x", cors_origins=origin)
