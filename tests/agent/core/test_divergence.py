"""A difference is what stood: any history of looks, held against the definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.divergence import Comparison, Rule
from agent.core.model import Digest, Entry, RelPath, digest_of
from tests.profiles import examples

SETTLE = 10.0
PATHS = [RelPath(path) for path in ("a.ts", "src/b.ts", "dist/c.js", "debug.log")]


def entry(text: str | None) -> Entry:
    return Entry(1, None if text is None else digest_of(text.encode()))


def found(**files: str | None) -> dict[RelPath, Digest | None]:
    return {RelPath(path): None if text is None else digest_of(text.encode()) for path, text in files.items()}


def rules(comparison: Comparison) -> dict[str, str]:
    return {path: difference.rule.value for path, difference in comparison.open.items()}


def test_what_stands_for_the_settling_time_is_a_difference_and_what_moves_is_not() -> None:
    comparison = Comparison(SETTLE)
    wanted = {RelPath("a"): entry("new"), RelPath("b"): entry("b"), RelPath("gone"): entry(None)}
    comparison.compare(wanted, found(a="old", gone="still", x="x"), 0)
    assert rules(comparison) == {}
    assert comparison.unsettled == 4
    comparison.compare(wanted, found(a="old", gone="still", x="x"), SETTLE)
    assert rules(comparison) == {"a": "differs", "b": "missing", "gone": "extra", "x": "extra"}
    assert comparison.counts() == {"differs": 1, "missing": 1, "extra": 2, "unreadable": 0}
    # Either side moves: it may be in flight again.
    comparison.compare(wanted, found(a="other", b=None, x="x"), SETTLE + 2)
    assert rules(comparison) == {"x": "extra"}
    comparison.compare(wanted, found(a="new", b=None, x="x"), 3 * SETTLE)
    assert rules(comparison) == {"b": "unreadable", "x": "extra"}
    comparison.compare(wanted, found(a="new", b="b"), 4 * SETTLE)
    assert (rules(comparison), comparison.unsettled, comparison.compared) == ({}, 0, 2)


def test_patterns_excuse_extra_files_only() -> None:
    comparison = Comparison(SETTLE, ["dist", "*.log"])
    files = {
        RelPath("dist/x.js"): digest_of(b"x"),
        RelPath("a/b.log"): digest_of(b"x"),
        RelPath("login.ts"): None,
    }
    for now in (0, SETTLE):
        comparison.compare({}, files, now)
    assert rules(comparison) == {"login.ts": "extra"}
    for now in (20, 20 + SETTLE):
        comparison.compare({RelPath("dist/x.js"): entry("y"), RelPath("a/b.log"): entry(None)}, files, now)
    assert rules(comparison) == {"dist/x.js": "differs", "a/b.log": "extra", "login.ts": "extra"}


TEXTS = st.one_of(st.none(), st.sampled_from(["one", "two"]))
SIDES = st.fixed_dictionaries(dict.fromkeys(PATHS, TEXTS))
LOOKS = st.lists(st.tuples(st.floats(0.1, 15), SIDES, SIDES, st.booleans()), min_size=1, max_size=25)


@given(LOOKS)
@examples(200, 5_000)
def test_any_history_of_looks(
    history: list[tuple[float, dict[RelPath, str | None], dict[RelPath, str | None], bool]],
) -> None:
    comparison = Comparison(SETTLE)
    now = 0.0
    seen: list[tuple[float, dict[RelPath, tuple[str | None, str | None]]]] = []
    for step, wanted, here, repeat in history:
        now += step
        sides = seen[-1][1] if repeat and seen else {path: (wanted[path], here[path]) for path in PATHS}
        seen.append((now, sides))
        comparison.compare(
            {path: entry(side[0]) for path, side in sides.items()},
            {path: digest_of(side[1].encode()) for path, side in sides.items() if side[1] is not None},
            now,
        )
        for path, (want, have) in sides.items():
            stood = now
            for at, before in reversed(seen):
                if before[path] != (want, have):
                    break
                stood = at
            different = want != have
            assert (path in comparison.open) == (different and now - stood >= SETTLE)
            if path in comparison.open:
                rule = Rule.MISSING if have is None else Rule.EXTRA if want is None else Rule.DIFFERS
                assert comparison.open[path].rule is rule
        assert comparison.unsettled == sum(w != h for w, h in sides.values()) - len(comparison.open)
