"""The fuzz target over its seeds: it can fail, and does not on known inputs. `make fuzz` searches further."""

from __future__ import annotations

import pytest

from tests.fuzz.unzip import CORPUS, check, read, seeds

SEEDS = seeds()


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_and_its_near_relatives(name: str) -> None:
    data = SEEDS[name]
    check(data)
    for at in range(0, len(data), max(1, len(data) // 40)):
        check(data[:at])
        check(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        check(data[:at] + data[at + 1 :])


def test_what_the_fuzzer_found_worth_keeping() -> None:
    kept = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    assert kept
    for data in kept:
        check(data)


def test_the_seeds_reach_both_ends() -> None:
    outcomes = {name: read([data]) for name, data in SEEDS.items()}
    assert outcomes["plain"][0][0] == ".preview-sync/manifest.json"
    assert outcomes["plain"] == outcomes["described"]
    assert outcomes["zip64"] == [("a", b"12345")]
    assert len({o for o in outcomes.values() if isinstance(o, str)}) > 20
