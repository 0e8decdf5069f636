"""What the redactor costs for lines that a project makes up, and what it still finds in them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.devserver.process import LONGEST_LINE
from agent.telemetry.logging import MOST_RENEWED, REDACTED, Redactor
from tests.agent.built import built, settings
from tests.agent.test_config import GOOD, jwt

HOSTILE = {
    "heads": "eyJ" * LONGEST_LINE,
    "heads and dots": "eyJ." * LONGEST_LINE,
    "dots": "." * LONGEST_LINE * 2,
    "one long word": "eyJ" + "a" * LONGEST_LINE * 2,
    "pairs": "eyJa.eyJ" * LONGEST_LINE,
    "signed": "?token=" * LONGEST_LINE,
    "signed without end": "&x-amz-" + "a-" * LONGEST_LINE,
    "keys": "sb_secret_" * LONGEST_LINE,
}


@pytest.mark.parametrize("text", [text[:LONGEST_LINE] for text in HOSTILE.values()], ids=HOSTILE)
def test_no_line_costs_more_than_its_length(text: str) -> None:
    redact = Redactor([GOOD["REALTIME_TOKEN"]])
    began = time.thread_time()
    for _ in range(200):  # as many as status shows
        redact.text(text)
    assert (time.thread_time() - began) / 200 < 0.001


OLD = re.compile(r"eyJ[A-Za-z0-9_-]+\.eyJ[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?")
"""The shape of a JWT, said plainly."""

pieces = st.sampled_from(["eyJ", ".", "eyJhbGci", "a", "-", "_", " ", "x.y", '"', "é", ".eyJ", "\n"])


@given(st.lists(pieces, max_size=30).map("".join))
def test_no_jwt_survives_whatever_is_around_it(text: str) -> None:
    assert OLD.search(Redactor().text(text)) is None


@given(st.lists(st.sampled_from(["eyJ", "a", "-", " ", "x.y", '"', "é", "\n"]), max_size=30).map("".join))
def test_what_has_none_is_left_as_it_is(text: str) -> None:
    assert Redactor().text(text) == text


async def test_a_renewed_token_is_known_by_its_value(tmp_path: Path) -> None:
    """Also where only a part of it is quoted from its middle, or a proxy wrote it with other dots."""
    odd = "an-opaque-token-without-a-shape"
    async with built(settings(tmp_path)) as agent:
        assert agent.api is not None
        renewed = jwt(exp=time.time() + 600)
        agent.api._tokens.accept(renewed)
        redact = agent.report.redactor
        assert renewed in redact._renewed
        redact.add_renewed(odd)
        assert redact.text(f"why: {odd}!") == f"why: {REDACTED}!"


def test_only_the_latest_renewed_tokens_are_searched_for() -> None:
    redact = Redactor(["the first of all"])
    for number in range(100):
        redact.add_renewed(f"token number {number}")
    assert len(redact._renewed) == MOST_RENEWED
    assert redact.text("token number 99, the first of all") == f"{REDACTED}, {REDACTED}"


async def test_a_rotated_file_s_token_is_known_by_its_value(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(exp=time.time() + 600))
    given = settings(tmp_path, REALTIME_TOKEN="", REALTIME_TOKEN_FILE=str(file))
    async with built(given) as agent:
        assert agent.api is not None
        agent.api._tokens.current()
        assert file.read_text() in agent.report.redactor._renewed
