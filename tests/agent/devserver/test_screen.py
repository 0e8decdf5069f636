"""The other end of the dev server's plugin, against a socket that says anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.core.model import RelPath
from agent.devserver.sandbox import User, project_secrets
from agent.devserver.screen import LONGEST, OBSERVED_WITHIN, Screen, with_plugin
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Applied
from tests.agent.processes import until

A, B = RelPath("src/a.ts"), RelPath("src/b.ts")


@contextlib.asynccontextmanager
async def opened(
    root: Path, metrics: Metrics | None = None
) -> AsyncIterator[tuple[Screen, Mapping[str, str]]]:
    screen = Screen(
        root, metrics=metrics or Metrics(), last_applied=lambda: Applied("file:update", 1, 0.25, None)
    )
    try:
        yield screen, await screen.open(None)
    finally:
        screen.close()


class Plugin:
    """Speaks as the plugin does, or does not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, env: Mapping[str, str], secret: str | None = None) -> Plugin:
        host, port = env["PREVIEW_SYNC_AGENT"].split()
        plugin = cls(*await asyncio.open_connection(host, int(port)))
        plugin.say({"hello": env["PREVIEW_SYNC_SECRET"] if secret is None else secret})
        return plugin

    def say(self, message: object) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    async def hear(self) -> Any:
        async with asyncio.timeout(10):
            return json.loads(await self.reader.readline() or b"null")


def state(revision: int = 1, **other: object) -> dict[str, object]:
    shown = {
        "revision": revision,
        "at": 5e9,
        "how": "update",
        "pages": {"visible": 1, "hidden": 0, "behind": 0},
        "blank": False,
    }
    return {"state": {"checked": revision, "shown": shown, "errors": [], **other}}


def error(n: int = 0, **other: object) -> dict[str, object]:
    return {"kind": "runtime", "message": f"boom {n}", "file": "src/a.ts", "line": 2, "column": 3, **other}


async def test_a_batch_is_told_in_order_and_what_is_shown_comes_back(tmp_path: Path) -> None:
    metrics = Metrics()
    async with opened(tmp_path, metrics) as (screen, env):
        screen.commit(1, {})
        plugin = await Plugin.connect(env)
        assert await plugin.hear() == {"root": str(tmp_path), "commit": 1}
        assert screen.observed
        screen.begin([A, B])
        screen.commit(2, {A: "change", B: "unlink"})
        screen.commit(2, {})
        screen.undo()
        assert [await plugin.hear() for _ in range(3)] == [
            {"begin": ["src/a.ts", "src/b.ts"]},
            {"commit": 2, "changes": {"src/a.ts": "change", "src/b.ts": "unlink"}},
            {"undo": True},
        ]
        screen.changed.clear()
        plugin.say(state(1, errors=[error(frame="x", stack="y")]))
        plugin.say({"gate": {"seconds": 0.02, "merged": 3, "sent": 1}})
        await asyncio.wait_for(screen.changed.wait(), 10)
        assert screen.shown is not None
        assert (screen.shown.revision, screen.shown.how) == (1, "update")
        assert [(each.file, each.line, each.column) for each in screen.errors] == [("src/a.ts", 2, 3)]
        samples = {each.name: each.value for family in metrics.registry.collect() for each in family.samples}
        assert samples["preview_agent_preview_observed"] == 1
        assert samples["preview_agent_shown_seconds_count"] == 1
        assert samples["preview_agent_shown_seconds_sum"] > 0.25
        plugin.writer.close()
        await until(lambda: not screen.observed)
        assert (screen.shown, screen.errors) == (None, ())


async def test_nothing_is_shown_that_was_not_committed(tmp_path: Path) -> None:
    async with opened(tmp_path) as (screen, env):
        screen.commit(3, {})
        plugin = await Plugin.connect(env)
        plugin.say(state(99, errors=[error(revision=99)]))
        await until(lambda: screen.shown is not None)
        assert screen.shown is not None
        assert (screen.shown.revision, screen.errors[0].revision, screen.report()["checked"]) == (3, 3, 3)


@pytest.mark.parametrize("secret", ["", "guess", "é" * 1000])
async def test_whoever_does_not_know_the_secret_is_not_heard(tmp_path: Path, secret: str) -> None:
    async with opened(tmp_path) as (screen, env):
        plugin = await Plugin.connect(env, secret)
        plugin.say(state())
        assert await plugin.hear() is None
        assert not screen.observed
        assert screen.shown is None


async def test_a_second_server_waits_until_the_first_is_gone(tmp_path: Path) -> None:
    async with opened(tmp_path) as (screen, env):
        first = await Plugin.connect(env)
        await first.hear()
        second = await Plugin.connect(env)
        assert await second.hear() is None
        first.say(state(0))
        await until(lambda: screen.shown is not None)
        first.writer.close()
        await until(lambda: not screen.observed)
        third = await Plugin.connect(env)
        assert await third.hear() == {"root": str(tmp_path), "commit": 0}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]\n",
        b'"x"\n',
        b'{"state": 7}\n',
        b'{"state": {"checked": -1, "shown": null, "errors": []}}\n',
        json.dumps(state(errors=[error(kind="nonsense")])).encode() + b"\n",
        json.dumps(state(errors=[error(line=2**80)])).encode() + b"\n",
        json.dumps(state(errors=[error(message="x" * 5000)])).encode() + b"\n",
        json.dumps(state(errors=[error(n) for n in range(51)])).encode() + b"\n",
        b'{"gate": {"seconds": 1e999}}\n',
        b"x" * (LONGEST + 2),
        b"\xff\xfe\n",
    ],
    ids=range(12),
)
async def test_nonsense_ends_the_connection_and_nothing_else(tmp_path: Path, line: bytes) -> None:
    async with opened(tmp_path) as (screen, env):
        plugin = await Plugin.connect(env)
        await plugin.hear()
        with contextlib.suppress(ConnectionError):
            plugin.writer.write(line)
            plugin.writer.write_eof()
        await until(lambda: not screen.observed)
        assert (await Plugin.connect(env)) is not None


async def test_a_plugin_that_does_not_read_is_dropped(tmp_path: Path) -> None:
    async with opened(tmp_path) as (screen, env):
        plugin = await Plugin.connect(env)
        await plugin.hear()
        paths = [RelPath(f"src/{n:0200}.ts") for n in range(1000)]
        for _ in range(200):
            screen.begin(paths)
        assert not screen.observed
        assert plugin.writer is not None


async def test_the_projects_own_node_options_come_first(tmp_path: Path) -> None:
    async with opened(tmp_path) as (_, env):
        both = with_plugin({"NODE_OPTIONS": "--max-old-space-size=512", "PATH": "/bin"}, env)
        own, ours = both["NODE_OPTIONS"].split(" ")
        assert own == "--max-old-space-size=512"
        assert ours.startswith("--import=file:///")
        assert ours.endswith("/agent/preview/hook.mjs")
    assert with_plugin({"NODE_OPTIONS": "--x"}, {}) == {"NODE_OPTIONS": "--x"}


async def test_a_user_who_cannot_read_the_hook_gets_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed" / "preview"
    closed.mkdir(parents=True)
    (closed / "hook.mjs").write_text("")
    monkeypatch.setattr("agent.devserver.screen.PREVIEW", closed)
    somebody = User("somebody", os.getuid() + 12345, os.getgid() + 12345, "/")
    for each in (tmp_path, *tmp_path.parents):
        with contextlib.suppress(PermissionError):
            if each != Path("/tmp") and str(each).startswith("/tmp/"):
                each.chmod(0o755)
    screen = Screen(tmp_path, metrics=Metrics())
    assert await screen.open(somebody) != {}
    closed.parent.chmod(0o700)
    assert await screen.open(somebody) == {}
    assert await screen.open(None) != {}
    (closed / "hook.mjs").unlink()
    assert await screen.open(None) == {}
    screen.close()


async def test_a_ready_server_that_nothing_observes_is_a_problem(tmp_path: Path) -> None:
    now = 100.0
    screen = Screen(tmp_path, metrics=Metrics(), clock=lambda: now)
    assert screen.problems(ready=False) == ()
    assert screen.problems(ready=True) == ()
    now += OBSERVED_WITHIN
    assert [each.kind for each in screen.problems(ready=True)] == ["preview_unobserved"]
    assert screen.problems(ready=False) == ()
    env = await screen.open(None)
    plugin = await Plugin.connect(env)
    await plugin.hear()
    screen.problems(ready=True)
    now += OBSERVED_WITHIN
    assert screen.problems(ready=True) == ()
    screen.close()


def test_what_an_error_may_print_of_the_projects_secrets_is_known() -> None:
    given = {
        "DEV_ENV_OPENAI_API_KEY": "sk-1",
        "DEV_ENV_DATABASE_URL": "postgres://u:p@h/d",
        "DEV_ENV_AUTH_SECRET": "s",
        "DEV_ENV_VITE_API_URL": "https://api.example",
        "DEV_ENV_SUPABASE_PUBLISHABLE_KEY": "public",
        "DEV_ENV_NODE_ENV": "development",
        "REALTIME_TOKEN": "not the project's",
    }
    assert project_secrets(given) == ["sk-1", "postgres://u:p@h/d", "s"]
