"""deploy/: what its files name is what the code reads, and what Fly is told has only keys that flyctl knows."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator_stub.config import DoorSettings, Settings, StandInSettings
from orchestrator_stub.door.decision import LIVEZ
from orchestrator_stub.door.service import MOST_CONNECTIONS
from orchestrator_stub.http.routes.shown import MOST_WAIT
from orchestrator_stub.server.processes import STOP_GRACE

DEPLOY = Path(__file__).parents[2] / "deploy"
FLY: dict[str, Any] = tomllib.loads((DEPLOY / "fly.toml").read_text())
FLY_DOOR: dict[str, Any] = tomllib.loads((DEPLOY / "fly-door.toml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DOOR = (DEPLOY / "door.sh").read_text()
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()

KEYS: dict[str, set[str]] = {
    "": {"app", "primary_region", "kill_signal", "kill_timeout", "build", "env", "deploy", "http_service", "checks",
         "metrics", "processes", "restart", "vm"},
    "build": {"dockerfile"},
    "deploy": {"release_command", "strategy"},
    "http_service": {"internal_port", "force_https", "auto_stop_machines", "auto_start_machines", "concurrency",
                     "checks", "processes"},
    "http_service.concurrency": {"type", "soft_limit", "hard_limit"},
    "http_service.checks": {"method", "path", "interval", "timeout", "grace_period"},
    "checks.*": {"type", "port", "path", "method", "interval", "timeout", "grace_period"},
    "metrics": {"port", "path"},
    "processes": {"door"},
    "restart": {"policy"},
    "vm": {"size", "memory"},
}  # fmt: skip
"""Those of flyctl's own reader that we use (superfly/flyctl, internal/appconfig: Config, Deploy, HTTPService,
ServiceHTTPCheck, ToplevelCheck, Restart, Compute). A key it does not know is dropped without a word."""

SECRETS = {
    "DATABASE_URL",
    "SUPABASE_JWT_SECRET",
    "SUPABASE_SERVICE_ROLE_KEY",
    "FLY_API_TOKEN",
    "RUN_SETTINGS_KEYS",
    "DOOR_KEYS",
}


def names(settings: type[DoorSettings] | type[StandInSettings]) -> set[str]:
    return {name.upper() for name in settings.model_fields}


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.mark.parametrize("told", [FLY, FLY_DOOR], ids=["fly.toml", "fly-door.toml"])
def test_every_key_of_fly_toml_is_one_that_flyctl_reads(told: dict[str, Any]) -> None:
    def unknown(place: str, value: object) -> list[str]:
        if isinstance(value, list):
            return [problem for item in value for problem in unknown(place, item)]
        if not isinstance(value, dict) or place == "env":
            return []
        if place == "checks":
            return [problem for check in value.values() for problem in unknown("checks.*", check)]
        lost = [f"{place}.{name}" for name in value.keys() - KEYS[place]]
        return lost + [p for name, item in value.items() for p in unknown(f"{place}.{name}".strip("."), item)]

    assert unknown("", told) == []


def test_fly_toml_agrees_with_the_orchestrator_and_its_image() -> None:
    assert FLY["env"].keys() <= names(Settings)
    assert FLY["env"].keys() & SECRETS == set()
    assert f"STOPSIGNAL {FLY['kill_signal']}" in DOCKERFILE
    assert seconds(FLY["kill_timeout"]) > STOP_GRACE
    port = int(FLY["env"]["PORT"])
    assert {FLY["http_service"]["internal_port"], FLY["metrics"]["port"], FLY["checks"]["alive"]["port"]} == {
        port
    }
    assert f"EXPOSE {port}" in DOCKERFILE
    assert (DEPLOY / FLY["build"]["dockerfile"]).exists()
    # What waits does not fill a machine's slots with twenty editors.
    assert FLY["http_service"]["concurrency"]["soft_limit"] >= 5 * MOST_WAIT


def test_the_doors_fly_toml_agrees_with_the_door_and_its_image() -> None:
    environment, service = FLY_DOOR["env"], FLY_DOOR["http_service"]
    assert environment.keys() <= names(DoorSettings)
    assert environment.keys() & SECRETS == set()
    assert FLY_DOOR["processes"] == {"door": "door"}
    assert f"STOPSIGNAL {FLY_DOOR['kill_signal']}" in DOCKERFILE
    assert service["internal_port"] == int(environment["DOOR_PORT"])
    assert FLY_DOOR["metrics"]["port"] == int(environment["DOOR_METRICS_PORT"])
    assert [check["path"] for check in service["checks"]] == [LIVEZ]
    assert service["concurrency"]["hard_limit"] < MOST_CONNECTIONS


def test_every_variable_of_the_compose_file_is_explained_and_none_is_left_over() -> None:
    example = (DEPLOY / ".env.example").read_text()
    lines = example.splitlines()
    told = {
        line.partition("=")[0] for before, line in pairwise(lines) if before and re.match("[A-Z_]+=", line)
    }
    used = set(re.findall(r"\$\{([A-Z_]+)\}", (DEPLOY / "compose.yaml").read_text()))
    used |= set(re.findall(r'(?:--env |"\$)([A-Z_]+)[ "]', DOOR))
    assert used == told == set(re.findall(r"(?m)^([A-Z_]+)=", example))
    # An older podman-compose takes `${NAME:-}` for its text.
    assert ":-" not in (DEPLOY / "compose.yaml").read_text()


def test_the_services_are_told_settings_that_exist() -> None:
    services = COMPOSE["services"]
    assert services["orchestrator"]["environment"].keys() <= names(Settings) | {"DOCKER_HOST"}
    assert services["supabase"]["environment"].keys() <= names(StandInSettings)
    assert services["supabase"]["command"] == "stand-in"
    door = set(re.findall(r"--env ([A-Z_]+)", DOOR))
    assert door <= names(DoorSettings)
    # It listens on loopback unless it is told otherwise.
    assert "DOOR_HOST" not in door
    assert {"PREVIEW_DOMAIN", "DOOR_KEYS"} <= door & services["orchestrator"]["environment"].keys()
    assert services["orchestrator"]["environment"]["DATABASE_URL"] in DOOR
    image = dict(re.findall(r"([A-Z_]+)=(\S+)", DOCKERFILE.split("ENV ", 1)[1].split("USER", 1)[0]))
    assert image.keys() - {"PATH"} <= names(Settings) | names(StandInSettings)


def test_nothing_but_loopback_is_published_and_the_database_is_reached_by_its_socket_alone() -> None:
    services = COMPOSE["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
    others = {network for name in ("supabase", "orchestrator") for network in services[name]["networks"]}
    assert not others & set(services["database"]["networks"])
    assert "listen_addresses=" in services["database"]["command"]
