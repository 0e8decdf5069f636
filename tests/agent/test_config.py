"""A start that is refused says everything that is wrong, at once, without showing a value."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import traceback
from uuid import UUID

import pytest

from agent.config import Settings, read_environment, read_settings
from agent.core.errors import SettingsError


def jwt(**claims: object) -> str:
    def part(obj: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(obj).encode()).decode().rstrip("=")

    return f"{part({'alg': 'HS256'})}.{part(claims)}.c2lnbmF0dXJl"


GOOD = {
    "PROJECT_ID": "7b0c6a1e-3f55-4f0e-9f5e-0d8a5f6b2c11",
    "SESSION_ID": "3a1f0a52-6a0b-4f6e-8a50-0b6c0a9d1e77",
    "SNAPSHOT_URL": "https://storage.example/x.zip?token=canary-snapshot",
    "REALTIME_TOKEN": jwt(role="preview_agent", exp=4_000_000_000),
    "REALTIME_URL": "wss://project.example/realtime/v1",
    "SESSION_API_URL": "https://orchestrator.example",
}


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsError) as refused:
        read_environment(environ)
    assert refused.value.exit_code == 64
    return list(refused.value.problems)


def test_a_whole_environment_is_admitted() -> None:
    settings = read_environment(
        {**GOOD, "DEV_COMMAND": "npx vite --port 5173", "HEALTH_PORT": "0", "NOISE": "x"}
    )
    assert settings.dev_command == ("npx", "vite", "--port", "5173")
    assert settings.staging == settings.project_dir.parent / ".preview-sync"
    assert "canary" not in repr(settings)
    assert GOOD["REALTIME_TOKEN"] not in repr(settings)


def test_settings_are_what_they_are_given_and_nothing_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DEV_PORT", "4000")
    monkeypatch.setenv("LOG_LEVEL", "loud")
    monkeypatch.setenv("SNAPSHOT_MAX_ENTRIES", "3")
    given = {name: GOOD[name] for name in ("PROJECT_ID", "SESSION_ID")}
    for settings in (
        read_settings(given),
        Settings(project_id=UUID(given["PROJECT_ID"]), session_id=UUID(given["SESSION_ID"])),
    ):
        assert (settings.dev_port, settings.log_level, settings.snapshot_max_entries) == (
            5173,
            "info",
            50_001,
        )


def test_a_name_in_small_letters_is_the_same_and_an_empty_value_is_none() -> None:
    settings = read_environment({**GOOD, "dev_port": "4000", "DEV_USER": "", "DEV_COMMAND": " "})
    assert (settings.dev_port, settings.dev_user, settings.dev_command) == (4000, None, None)


def test_a_name_of_a_file_need_not_be_utf_8() -> None:
    settings = read_environment({**GOOD, "PROJECT_DIR": "/srv/caf\udce9", "DEV_COMMAND": "vite 'caf\udce9'"})
    assert os.fsencode(settings.project_dir) == b"/srv/caf\xe9"
    assert settings.dev_command == ("vite", "caf\udce9")


def test_every_problem_is_said_at_once_one_line_each() -> None:
    said = problems(
        {"PROJECT_ID": "seven", "DEV_PORT": "99999", "REALTIME_URL": "ftp://x", "LOG_LEVEL": "loud"}
    )
    names = [line.partition(":")[0] for line in said]
    assert names == sorted(
        ["PROJECT_ID", "DEV_PORT", "REALTIME_URL", "LOG_LEVEL", "SESSION_ID", "REALTIME_TOKEN"]
    )
    assert all("\n" not in line and "seven" not in line for line in said)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("PROJECT_ID", "seven", "a UUID"),
        ("DEV_PORT", "99999", "a whole number of at least 1 and of at most 65535"),
        ("HEALTH_PORT", "x", "a whole number of at least 0 and of at most 65535"),
        ("STOP_GRACE", "-1", "a number above 0"),
        ("STOP_GRACE", "nan", "a number above 0"),
        ("HEARTBEAT_SECONDS", "0.1", "a number of at least 0.2"),
        ("SNAPSHOT_RATIO_FLOOR_BYTES", "-1", "a whole number of at least 0"),
        ("SNAPSHOT_ATTEMPTS", "0", "a whole number of at least 1"),
        ("DEV_PROCESSES", "0", "a whole number above 0"),
        ("SESSION_API_URL", "orchestrator", "a URL with a host, beginning with http, https"),
        ("SHADOW_IGNORE", " ", "words as in a shell"),
        ("LOG_LEVEL", "loud", "one of debug, error, info, warning"),
        ("DEV_ESSENTIAL", "maybe", "true or false"),
        ("DEV_COMMAND", "npm run 'dev", "words as in a shell (a quotation mark is not closed)"),
    ],
)
def test_a_refused_setting_says_what_it_takes(name: str, text: str, said: str) -> None:
    assert problems({**GOOD, name: text}) == [f"{name}: must be {said}"]


@pytest.mark.parametrize("name", ["PROJECT_ID", "SESSION_ID", "REALTIME_TOKEN", "REALTIME_URL"])
def test_what_is_required_is_named(name: str) -> None:
    assert problems({k: v for k, v in GOOD.items() if k != name})[0].startswith(f"{name}: is required")
    assert problems({**GOOD, name: ""})[0].startswith(f"{name}: is required")


def test_a_service_role_key_is_refused_wherever_it_hides() -> None:
    for name in ("SUPABASE_SERVICE_ROLE_KEY", "supabase_service_role_key", "SUPABASE_SECRET_KEY"):
        (line,) = problems({**GOOD, name: "canary"})
        assert "service-role key must not be in the container" in line
        assert "canary" not in line
    (line,) = problems({**GOOD, "REALTIME_TOKEN": jwt(role="service_role", exp=4_000_000_000)})
    assert line.startswith("REALTIME_TOKEN: its role is service_role")


@pytest.mark.parametrize("url", ["ftp://x", "ws://", "ws://h:99999/x", "nonsense", "ws://h:0/"])
def test_a_url_that_leads_nowhere_is_refused(url: str) -> None:
    (line,) = problems({**GOOD, "REALTIME_URL": url})
    assert line.startswith("REALTIME_URL: must be a URL")


@pytest.mark.parametrize(
    ("text", "value"), [("on", True), ("yes", True), ("1", True), ("off", False), ("False", False)]
)
def test_yes_and_no_are_understood_as_people_write_them(text: str, value: bool) -> None:
    assert read_environment({**GOOD, "OPTIMISTIC_EVENTS": text}).optimistic_events is value


@pytest.mark.parametrize(
    ("dev", "health"), [("4000", "4000"), ("9464", ""), ("", "5173")], ids=["both", "dev", "health"]
)
def test_one_port_for_both_is_refused_beside_whatever_else_is_wrong(dev: str, health: str) -> None:
    given = {**GOOD, "DEV_PORT": dev, "HEALTH_PORT": health, "LOG_LEVEL": "loud"}
    assert [line.partition(":")[0] for line in problems(given)] == ["HEALTH_PORT", "LOG_LEVEL"]


@pytest.mark.parametrize(
    "name", ["DRIFT_POLICY", "DEV_PORT", "INSTALL_COMMAND", "SNAPSHOT_URL", "REALTIME_URL"]
)
def test_a_secret_in_the_wrong_place_is_not_shown(name: str) -> None:
    given = {**GOOD, name: "canary '"}
    with pytest.raises(SettingsError) as refused:
        read_environment(given)
    (line,) = refused.value.problems
    assert line.startswith(f"{name}: ")
    assert "canary" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize("token", ["", "x.y", "a.b.c", "not a jwt"])
def test_a_token_that_is_none_is_refused(token: str) -> None:
    assert problems({**GOOD, "REALTIME_TOKEN": token})[0].startswith("REALTIME_TOKEN: ")


def test_the_process_ends_with_64_and_only_those_lines() -> None:
    environ = {"PATH": os.environ["PATH"], "PROJECT_ID": "seven", "SUPABASE_SERVICE_ROLE_KEY": "canary-key"}
    ended = subprocess.run(
        [sys.executable, "-m", "agent", "run"], env=environ, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 64
    assert ended.stdout == ""
    lines = ended.stderr.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("preview-agent: ") for line in lines)
    assert "canary" not in ended.stderr


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "DYLD_INSERT_LIBRARIES", "GCONV_PATH", "LOCPATH",
             "GLIBC_TUNABLES"],
)  # fmt: skip
def test_what_loads_code_into_every_program_is_refused_by_name(name: str) -> None:
    (line,) = problems({**GOOD, f"DEV_ENV_{name}": "canary"})
    assert line.startswith(f"DEV_ENV_{name}: ")
    assert "canary" not in line


@pytest.mark.parametrize(
    "name", ["NODE_OPTIONS", "PYTHONPATH", "BASH_ENV", "ENV", "PATH", "LDFLAGS", "VITE_LD_X", "TZDIR"]
)
def test_what_one_language_reads_is_the_projects_own_matter(name: str) -> None:
    """Only its own programs read it, as its own user."""
    assert read_environment({**GOOD, f"DEV_ENV_{name}": "x", "DEV_ENV_LD_DEBUG": "", "LD_PRELOAD": "ours"})
