"""`fly.toml`, never deployed here: its keys are flyctl's, and it comes to the machine that the control plane makes."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from agent.config import Settings
from orchestrator_stub.machines.fly import machine_request
from tests.fakes.fly import APP, DOCUMENT
from tests.fakes.openapi import OpenApi
from tests.orchestrator.machines.test_fly import SHAPE, spec_for

ROOT = Path(__file__).parents[3]

KEYS: dict[str, set[str]] = {
    "": {"app", "primary_region", "kill_signal", "kill_timeout", "build", "env", "http_service", "checks", "metrics",
         "restart", "vm"},
    "build": {"dockerfile"},
    "http_service": {"internal_port", "force_https", "auto_stop_machines", "auto_start_machines", "concurrency"},
    "http_service.concurrency": {"type", "soft_limit", "hard_limit"},
    "checks.*": {"type", "port", "path", "method", "interval", "timeout", "grace_period"},
    "metrics": {"port", "path"},
    "restart": {"policy", "retries"},
    "vm": {"size", "memory"},
}  # fmt: skip
"""Those of flyctl's own reader that we use (superfly/flyctl, internal/appconfig: Config, HTTPService, ToplevelCheck,
Restart, Compute). A key it does not know is dropped without a word, which is why they are held against a list."""

FLY: dict[str, Any] = tomllib.loads((ROOT / "fly.toml").read_text())


def as_a_machine(given: dict[str, Any]) -> dict[str, Any]:
    """What flyctl makes of it for the Machines API (its `toMachineConfig`)."""
    service, (restart,), (vm,) = given["http_service"], given["restart"], given["vm"]
    kind, _, cpus = vm["size"].removesuffix("x").split("-")
    return {
        "name": given["app"],
        "region": given["primary_region"],
        "config": {
            "image": "registry.fly.io/previews:1",
            "env": given["env"],
            "guest": {"cpu_kind": kind, "cpus": int(cpus), "memory_mb": 1024 * int(vm["memory"].removesuffix("gb"))},
            "restart": {"policy": restart["policy"], "max_retries": restart["retries"]},
            "stop_config": {"signal": given["kill_signal"], "timeout": given["kill_timeout"]},
            "metrics": given["metrics"],
            "checks": {n: check | {"method": check["method"].upper()} for n, check in given["checks"].items()},
            "services": [
                {
                    "protocol": "tcp",
                    "internal_port": service["internal_port"],
                    "autostart": service["auto_start_machines"],
                    "autostop": service["auto_stop_machines"],
                    "concurrency": service["concurrency"],
                    "ports": [
                        {"port": 80, "handlers": ["http"], "force_https": service["force_https"]},
                        {"port": 443, "handlers": ["http", "tls"]},
                    ],
                }
            ],
        },
    }  # fmt: skip


def test_its_keys_are_those_that_flyctl_reads() -> None:
    def keys(place: str, value: object) -> list[str]:
        if isinstance(value, list):
            return [problem for item in value for problem in keys(place, item)]
        if not isinstance(value, dict) or place == "env":
            return []
        if place == "checks":
            return [problem for check in value.values() for problem in keys("checks.*", check)]
        unknown = [f"{place}.{name}" for name in value.keys() - KEYS[place]]
        return unknown + [p for name, item in value.items() for p in keys(f"{place}.{name}".strip("."), item)]

    assert keys("", FLY) == []


def test_the_machines_api_takes_what_it_comes_to() -> None:
    if not DOCUMENT.exists():
        pytest.skip("Fly's OpenAPI document is not beside the checkout")
    assert OpenApi(DOCUMENT).problems("POST", f"/apps/{APP}/machines", as_a_machine(FLY)) == []


def test_it_comes_to_the_machine_that_the_control_plane_makes() -> None:
    here, there = as_a_machine(FLY)["config"], machine_request(spec_for(), SHAPE)["config"]
    for name in ("restart", "stop_config", "metrics"):
        assert here[name] == there[name], name
    assert here["guest"]["cpu_kind"] == there["guest"]["cpu_kind"]
    for name, check in there["checks"].items():
        for part in ("type", "port", "method", "path"):
            assert here["checks"][name][part] == check[part]
    for part in ("internal_port", "ports", "autostart", "autostop"):
        assert here["services"][0][part] == there["services"][0][part]


def test_it_agrees_with_the_agent_and_the_image() -> None:
    settings = Settings(project_id=UUID(int=1), session_id=UUID(int=1))
    assert settings.stop_grace < float(FLY["kill_timeout"].removesuffix("s"))
    assert FLY["http_service"]["internal_port"] == settings.dev_port
    assert {check["port"] for check in FLY["checks"].values()} == {settings.health_port}
    dockerfile = (ROOT / FLY["build"]["dockerfile"]).read_text()
    assert f"EXPOSE {settings.dev_port} {settings.health_port}" in dockerfile
    assert f"STOPSIGNAL {FLY['kill_signal']}" in dockerfile
    for name in FLY["env"]:
        assert name.lower() in Settings.model_fields, name
