"""The contestants of the mirror: a landing is seen once it is whole, each peer mirrors, and nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from pathlib import Path

import psutil
import pytest

from bench.harness.inotify import Landing, NotLanded
from bench.harness.machine import PROGRAMS, version_of
from bench.harness.peers import FILES, MIRRORS, Mirror, content_of, name_of, pauses


def put(directory: Path, name: str, content: str) -> None:
    (directory / ".staged").write_text(content)
    os.rename(directory / ".staged", directory / name)


def test_a_file_has_landed_when_all_of_it_is_under_its_name(tmp_path: Path) -> None:
    landing = Landing(tmp_path)
    try:
        put(tmp_path, "a", "old")
        landing.forget()
        with pytest.raises(NotLanded, match="1 of 1 files"):
            landing.wait({"a": 3}, 0.01)  # what was forgotten is not seen again
        put(tmp_path, "a", "half")
        put(tmp_path, "other", "whole!")
        with pytest.raises(NotLanded):
            landing.wait({"a": 6}, 0.01)
        put(tmp_path, "a", "whole!")
        (tmp_path / "b").write_text("in place")
        assert landing.wait({"a": 6, "b": 8}, 1) > 0
    finally:
        landing.close()


async def test_the_same_on_an_event_loop(tmp_path: Path) -> None:
    landing = Landing(tmp_path)
    try:
        waiting = asyncio.create_task(landing.arrival({"a": 1, "b": 1}, 5))
        await asyncio.sleep(0)
        put(tmp_path, "a", "1")
        put(tmp_path, "b", "1")
        assert await waiting > 0
        with pytest.raises(NotLanded, match="1 of 1"):
            await landing.arrival({"c": 1}, 0.01)
    finally:
        landing.close()


def test_no_two_contents_of_a_file_in_a_row_are_of_one_size() -> None:
    assert name_of(3) == name_of(3 + FILES)
    assert len(content_of(3)) != len(content_of(3 + FILES))


def test_edits_meet_every_part_of_a_period() -> None:
    import random

    spread = sorted(pauses(6, 1.0, random.Random(3)))
    assert all(n / 6 <= pause <= (n + 1) / 6 for n, pause in enumerate(spread))


@pytest.mark.parametrize("kind", MIRRORS, ids=lambda kind: kind.name)
def test_a_peer_mirrors_and_is_gone_after_it(kind: type[Mirror], tmp_path: Path) -> None:
    if missing := kind.missing():
        pytest.skip(f"{', '.join(missing)} not installed; `make bench-peers`")
    assert all(str(version_of(program))[0].isdigit() for program in kind.programs if program in PROGRAMS)
    mirror = kind(tmp_path / "place")
    mirror.edits = 1
    try:
        (taken,) = mirror.edit_all()
        assert 0 < taken < 30
    finally:
        mirror.stop()
    assert not _with(tmp_path)


class Stubborn(Mirror):
    """Copies, with somebody beside it who is deaf to SIGTERM."""

    name = "stubborn"
    grace = 0.1

    def commands(self) -> list[list[str]]:
        copy = f'for n in {{1..500}}; do cp "{self.source}"/* "{self.target}"; sleep 0.02; done'
        return [["bash", "-c", f"trap '' TERM; (while :; do sleep 0.1; done) & trap - TERM; {copy}"]]


def test_nothing_of_a_peer_runs_once_it_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its leader ends at the first signal; one that is killed ends when a processor gets to it, here after a while."""
    killpg = os.killpg

    def late(group: int, number: int) -> None:
        if number == signal.SIGKILL:
            killing.append(threading.Timer(0.3, killpg, (group, number)))
            killing[-1].start()
        else:
            killpg(group, number)

    killing: list[threading.Timer] = []
    monkeypatch.setattr(os, "killpg", late)
    mirror = Stubborn(tmp_path / "place")
    mirror.edits = 1
    try:
        mirror.edit_all()
    finally:
        mirror.stop()
    left = _with(tmp_path)
    for timer in killing:
        timer.join()
    assert killing
    assert not left


@pytest.mark.nightly
def test_both_of_ours_land_and_every_row_names_its_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import ExitStack, nullcontext
    from itertools import count

    from anyio.from_thread import start_blocking_portal

    from bench.cases import mirror

    monkeypatch.setattr(mirror, "MIRRORS", [kind for kind in MIRRORS if kind.name == "inotifywait + cp"])
    monkeypatch.setattr(mirror, "EDITS", 3)
    numbers = count()

    def fresh() -> nullcontext[Path]:
        place = tmp_path / str(next(numbers))
        place.mkdir()
        return nullcontext(place)

    with start_blocking_portal() as portal, ExitStack() as stack:
        contest = mirror.Contest(portal, fresh, stack)
        for peer in contest.mirrors.values():
            peer.edits = 3
        rows = [*mirror.latency(contest, 1), *mirror.burst(contest, 1)]
        if not contest.mirrors:
            assert len(contest.edits(mirror.SAVE)) == 3
            pytest.skip("inotifywait not installed; `make bench-peers`")
    assert len(rows) == 6
    assert all(row.peer == "inotifywait + cp" and row.ratio and row.ours > 0 for row in rows)


def _with(place: Path) -> list[str]:
    """The command lines that name the place."""
    lines = (" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [line for line in lines if str(place) in line]
