"""Run settings are asked for before anything starts, again when they change, and until there is an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from uuid import UUID

import pytest

from agent.config import Settings
from agent.core.errors import CredentialRejected, MalformedMessage, Unavailable
from agent.core.globs import Rule
from agent.link import run_settings as module
from agent.link.run_settings import RunSettings, RunSettingsFollower, merged
from agent.retry import Backoff
from tests.agent.processes import until

BASE = Settings(project_id=UUID(int=1), session_id=UUID(int=1))


class Answers:
    """A session API that gives one answer after another, and the last one from then on."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def run_settings(self) -> object:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", Backoff(first=0.001, most=0.001))


class Heard:
    """What a follower told."""

    def __init__(self, first: int | None, *answers: object) -> None:
        self.api = Answers(*answers)
        self.settings: list[RunSettings] = []
        self.secrets: list[str] = []
        self.follower = RunSettingsFollower(
            self.api if answers else None,  # type: ignore[arg-type]
            first, on_settings=self.settings.append, on_secret=self.secrets.append,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[RunSettingsFollower]:
        task = asyncio.create_task(self.follower.run())
        try:
            yield self.follower
        finally:
            task.cancel()
            await asyncio.wait({task})


@pytest.mark.parametrize("first", [None, 0])
async def test_where_there_are_none_nothing_is_waited_for_or_asked(first: int | None) -> None:
    heard = Heard(first, {"run_revision": 1})
    async with heard.running() as follower:
        assert follower.known.is_set()
        await asyncio.sleep(0)
        assert heard.api.asked == 0


async def test_nothing_is_known_until_there_is_an_answer_and_the_problem_says_so() -> None:
    heard = Heard(
        3, Unavailable("session API (run)", "HTTP 503"), CredentialRejected("it expired"), {"run_revision": "x"},
        {"run_revision": 3, "env": {"A": "a-secret-value"}},
    )  # fmt: skip
    assert not heard.follower.known.is_set()
    problems = []
    async with heard.running() as follower:
        while not follower.known.is_set():
            problems += follower.problems()
            await asyncio.sleep(0)
        assert follower.problems() == ()
    assert {problem.kind for problem in problems} == {"run_settings_unavailable"}
    assert all(problem.detail.endswith("nothing is started until they are there") for problem in problems)
    assert heard.secrets == ["a-secret-value"]
    assert [run.revision for run in heard.settings] == [3]


async def test_a_change_is_asked_for_once_and_only_when_it_is_another() -> None:
    heard = Heard(0, {"run_revision": 1, "root": "web"}, {"run_revision": 2})
    async with heard.running() as follower:
        for revision in (None, 0, 1, 1):
            follower.hear(revision)
        await until(lambda: heard.settings)
        follower.hear(1)
        await asyncio.sleep(0.01)
        assert heard.api.asked == 1
        follower.hear(2)
        await until(lambda: len(heard.settings) == 2)
    assert [run.root for run in heard.settings] == ["web", None]


def test_what_came_from_run_settings_follows_them_and_what_is_the_images_stays() -> None:
    image = BASE.model_copy(update={"preview_host": "baked.example", "dev_command": ("baked",)})
    machine = image.model_copy(update={"dev_root": "web", "run_names": ("DEV_ROOT",)})
    none = merged(machine, RunSettings(1))
    assert (none.dev_root, none.preview_host, none.dev_command) == (None, "baked.example", ("baked",))
    run = RunSettings(
        2, root="apps", dev_command=("npm", "start"), dev_port=3000, allowed_hosts=("x.example", ".y.example")
    )
    told = merged(machine, run)
    assert (told.dev_root, told.dev_command, told.dev_server_port) == ("apps", ("npm", "start"), 3000)
    assert told.preview_host == "x.example .y.example"


def test_a_secret_of_many_lines_is_taken_out_line_by_line() -> None:
    run = RunSettings(
        1, env={"KEY": "first-line-of-it\nsecond-line-of-it", "N": "1"}, npmrc='//x/:_auth="in-quotes-x"\n'
    )
    assert run.secrets() == {
        "first-line-of-it\nsecond-line-of-it", "first-line-of-it", "second-line-of-it", "in-quotes-x",
    }  # fmt: skip


def test_what_may_be_given_back_is_read_and_what_cannot_be_read_allows_nothing() -> None:
    rule = {"glob": "**/package-lock.json", "mode": "generated", "max_bytes": 1_000, "deletes": False}
    read = module.read_run_settings({"run_revision": 1, "write_back": [rule]})
    assert read.write_back == (Rule("**/package-lock.json", "generated", 1_000),)
    for nothing in (None, False, True, []):  # the flags are an older orchestrator's
        assert module.read_run_settings({"run_revision": 1, "write_back": nothing}).write_back == ()
    for wrong in (
        "lock",
        {},
        [1],
        [{**rule, "glob": ""}],
        [{**rule, "mode": "x"}],
        [{**rule, "max_bytes": "1"}],
    ):
        with pytest.raises(MalformedMessage):
            module.read_run_settings({"run_revision": 1, "write_back": wrong})
