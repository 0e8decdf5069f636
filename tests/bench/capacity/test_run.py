"""The capacity run itself, tiny: everything is started, every part of it is measured, and what it says is judged."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest

from bench.capacity.estimate import Refused, Size
from bench.capacity.measure import Used
from bench.capacity.report import BEGIN, END, PLACE, keep, picture_of, report_of, table_of
from bench.capacity.run import Measured, Profile, measure

TINY = Profile((2, 4, 6), settle=0.0, window=0.5, windows=2, each=6, blocks=2)
PARTS = ("orchestrator", "realtime", "postgres")


def made(**changed: object) -> Measured:
    """A run as it would be without noise: each session takes 100 µs a second of everything, and the rest 5 ms."""
    sizes = (500, 1000, 2000, 4000)

    def used(n: int) -> Used:
        return Used(2.0, dict.fromkeys(PARTS, 2.0 * (0.005 + n * 1e-4)), 2 * n * 300)

    block = Used(0.01, dict.fromkeys(PARTS, 0.0005), 900)
    measured = Measured(
        sizes=[Size(n, 0.01, {"orchestrator": 0.4}) for n in sizes],
        windows=[(n, used(n)) for n in sizes for _ in range(4)],
        memory=[(n, dict.fromkeys(PARTS, 50_000_000 + n * 10_000)) for n in sizes],
        kinds={"heartbeat": [block] * 3},
        storms={"socket lost, joined again": block},
    )
    return dataclasses.replace(measured, **changed)  # type: ignore[arg-type]


def test_a_run_is_carried_on_and_says_what_it_does_not_say() -> None:
    report = report_of(made(), 100_000)
    whole = {cost.name: (round(cost.whole.value, 3), cost.unit, cost.bent) for cost in report.costs}
    assert whole == {
        **{f"{part}: processor": (10.005, "cores", None) for part in PARTS},
        "log of the database": (30.0, "MB/s", None),
        **{f"{part}: memory": (1.05, "GB", None) for part in PARTS},
    }
    table = table_of(report)
    assert "| orchestrator: processor | 100 ± " in table
    assert "| heartbeat | 0.5 ± 0 | 0.5 ± 0 | 0.5 ± 0 | 0.9 ± 0 |" in table
    assert "Commits share a flush" in table
    assert "Left out" not in table


def test_a_busy_size_is_left_out_in_words_and_a_noisy_run_says_nothing() -> None:
    sizes = made().sizes
    busy = [*sizes[:3], Size(4000, 0.01, {"orchestrator": 0.9})]
    assert "- 4000: orchestrator was busy for 90% of the time" in table_of(report_of(made(sizes=busy), 10))
    with pytest.raises(Refused, match="others took 30%"):
        report_of(made(sizes=[dataclasses.replace(each, taken=0.3) for each in sizes]), 100_000)


def test_it_is_written_where_the_page_has_a_place_for_it(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    measured = made()
    report = report_of(measured, 100_000)
    for _ in range(2):
        keep(measured, report, {"at": "now", "machine": {"cores": 2, "cpu": "X"}}, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n")  # noqa: PT018
    assert "old" not in text
    assert text.count("Measured now on 2 cores") == 1
    assert json.loads((tmp_path / "capacity.json").read_text())["windows"]
    assert (tmp_path / "capacity.svg").read_text() == picture_of(measured, report)
    assert BEGIN in (PLACE / "README.md").read_text()


@pytest.mark.nightly
async def test_the_tiniest_run_measures_every_part() -> None:
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="capacity-") as place:
        Path(place).chmod(0o711)
        measured = await measure(Path(place), TINY, said.append)
    assert [size.sessions for size in measured.sizes] == [2, 4, 6]
    assert [n for n, _ in measured.windows] == [2, 2, 4, 4, 6, 6]
    assert all(memory[part] > 1_000_000 for _, memory in measured.memory for part in PARTS)
    assert len(measured.kinds) == 6
    for kind, blocks in measured.kinds.items():
        assert len(blocks) == 2
        assert all(sum(used.cpu[part] for used in blocks) >= 0 for part in PARTS)
        if "save" in kind and "report" not in kind:
            assert all(used.wal > 500 for used in blocks), kind
    beat = measured.kinds["heartbeat"]
    assert all(0 < used.cpu["orchestrator"] < 0.1 and used.wal > 100 for used in beat)
    assert set(measured.storms) == {"socket lost, joined again", "first heartbeat to a new orchestrator"}
    assert all(used.cpu["orchestrator"] > 0 for used in measured.storms.values())
    assert said[0].startswith("up after")
