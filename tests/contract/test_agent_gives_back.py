"""What the agent offers, and what it makes of the answer, as both sides agree on it."""

from __future__ import annotations

from agent.core.globs import Rule
from agent.core.model import RelPath, digest_of
from agent.link.run_settings import read_run_settings
from agent.write_back import wire
from agent.write_back.states import Answered, Output
from tests.contract.golden import load


def outputs() -> list[Output]:
    return [
        Output(
            number, RelPath(each["file_path"]), each["base_version"],
            None if each["content"] is None else digest_of(each["content"].encode()),
            epoch=load("changes.request")["epoch"],
        )
        for number, each in enumerate(load("changes.request")["changes"])
    ]  # fmt: skip


def test_an_offer_is_written_as_agreed() -> None:
    golden = load("changes.request")
    contents = {number: each["content"] for number, each in enumerate(golden["changes"])}
    written = wire.offer(golden["offer_id"], golden["generation"], outputs(), contents)
    golden["changes"] = [{"executable": False, **each} for each in golden["changes"]]
    assert written == golden


def test_an_answer_is_read_as_agreed() -> None:
    kept = "7c1f6d3e-5a1b-4b0c-8f70-2f1f5a3f4c11"
    asked = [
        Output(number, RelPath(each["file_path"]), 1, None)
        for number, each in enumerate(load("changes.answer")["results"])
    ]
    assert wire.read_answer(load("changes.answer"), asked) == [
        (Answered("applied", 4, 18), None),
        (Answered("proposed"), kept),
        (Answered("conflict"), None),
        (Answered("refused", rule="glob"), None),
    ]


def test_the_rules_are_read_as_agreed() -> None:
    assert read_run_settings(load("run.answer")).write_back == (
        Rule("**/package-lock.json", "generated", 2**20),
        Rule("src/components/**", "authored", 65_536, deletes=True),
    )
