"""The log when nobody reads it: no writer waits, what is lost is counted, and the rest arrives whole."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.telemetry.log_writer import LogWriter
from tests.agent.loops import STALL, longest_turn

LINE = "x" * 99 + "\n"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for end in (reader, writer):
        with contextlib.suppress(OSError):
            os.close(end)


def read_all(reader: int, until: bytes) -> bytes:
    got = b""
    while until not in got and (more := os.read(reader, 65536)):
        got += more
    return got


def test_lines_arrive_in_their_order_and_whole(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        lines = LogWriter(file.fileno())
        for number in range(5_000):
            lines.write(f"{number} é \udcff\n")
        assert lines.drain()
    written = (tmp_path / "log").read_text().splitlines()
    assert written == [f"{number} é \\udcff" for number in range(5_000)]
    assert lines.dropped == 0


def test_a_reader_that_stalls_stalls_nobody(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    lines = LogWriter(writer, most=200_000)

    async def work() -> None:
        for _ in range(5_000):  # 500 KB: the pipe holds 64
            lines.write(LINE)

    began = time.monotonic()
    assert longest_turn(work) < STALL
    assert lines.dropped > 2_000
    assert not lines.drain(0.05)
    assert time.monotonic() - began < 30, "it waited for the reader"
    lines.write("the last\n")  # dropped too
    taken = threading.Thread(target=lambda: got.append(read_all(reader, b"after")))
    got: list[bytes] = []
    taken.start()
    assert lines.drain(30)
    lines.write("after\n")
    taken.join(30)
    (text,) = got
    assert set(text.split(b"\n")) <= {LINE.strip().encode(), b"after", b""}


def test_a_pipe_that_does_not_block_loses_nothing(pipe: tuple[int, int]) -> None:
    """Node gives its children such pipes."""
    reader, writer = pipe
    os.set_blocking(writer, False)
    lines = LogWriter(writer)
    for _ in range(5_000):
        lines.write(LINE)
    lines.write("end\n")
    assert read_all(reader, b"end\n") == LINE.encode() * 5_000 + b"end\n"
    assert lines.dropped == 0


@pytest.mark.parametrize("how", ["reader gone", "disk full"])
def test_what_the_system_refuses_is_counted(pipe: tuple[int, int], how: str) -> None:
    reader, writer = pipe
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        lines = LogWriter(writer if how == "reader gone" else full)
        for _ in range(10):
            lines.write(LINE)
        assert lines.drain(30)
        assert lines.dropped == 10
    finally:
        os.close(full)
