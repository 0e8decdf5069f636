"""When a path is read, and what is offered of it: cases that the state machine of `test_states_machine` never meets."""

from __future__ import annotations

from agent.core.globs import Rule, roots
from agent.core.model import Entry, RelPath, digest_of
from agent.write_back.states import MOST_PATHS, QUIET, Answered, Found, Phase, States

LOCK = RelPath("lock")
RULES = (Rule("lock"), Rule("gen/**", deletes=True))
ONE, TWO = (digest_of(each) for each in (b"1", b"2"))
BEFORE = Entry(4, ONE, 1)


def test_a_path_is_read_when_it_is_quiet_and_after_two_seconds_at_the_latest() -> None:
    states = States(RULES)
    for step in range(12):
        states.touched(LOCK, 10, step * 0.25)
        assert states.due(step * 0.25) == ([LOCK] if step >= 8 else [])
    quiet = States(RULES)
    quiet.touched(LOCK, 10, 0.0)
    assert quiet.due(QUIET - 0.01) == []
    assert quiet.due(QUIET) == [LOCK]


def test_a_file_that_grows_is_waited_for_until_it_stands_still() -> None:
    states = States(RULES)
    now = 0.0
    for size in range(100):
        now = size * 0.25
        states.touched(LOCK, size, now)
        assert states.due(now) == []
    states.unstable(LOCK, 200, now + QUIET)  # it grew while it was read
    assert states.due(now + QUIET) == []
    assert states.due(now + 2 * QUIET) == [LOCK]


def test_an_output_that_was_not_sent_is_taken_back_when_the_tool_goes_on() -> None:
    states = States(RULES)
    states.touched(LOCK, 1, 0.0)
    first = states.read(LOCK, Found(TWO, 1), BEFORE, "e")
    assert first is not None
    assert first.base == 4
    states.touched(LOCK, 1, 1.0)
    assert states.read(LOCK, Found(ONE, 1), BEFORE, "e") is None, "it is what it was"
    assert (states.taken_back, states.outputs, states.paths) == ([first.number], {}, {})


def test_a_refusal_that_passes_is_offered_again_under_another_name() -> None:
    states = States(RULES)
    states.touched(LOCK, 1, 0.0)
    output = states.read(LOCK, Found(TWO, 1), BEFORE, "e")
    assert output is not None
    (sent,) = states.sent([output], "first")
    states.answered(sent, Answered("refused", rule="rate", retry_after=3), BEFORE, 1.0)
    assert [each.offer for each in states.batch(lambda each: each.size, 50, 100)] == [None]
    (sent,) = states.sent([sent], "second")
    moved = states.answered(sent, Answered("applied", 5, 9), BEFORE, 2.0)
    assert moved == Entry(5, TWO, 1, revision=9)


def test_of_what_saves_replace_one_after_the_other_the_latest_is_offered() -> None:
    states = States(RULES)
    kept = [states.keep(LOCK, Found(digest_of(b"%d" % n), 1), BEFORE, "e") for n in range(4)]
    assert list(states.outputs.values()) == kept[3:]
    assert states.superseded == [each.number for each in kept[:3]]
    states.sent(kept[3:], "offer")
    later = states.keep(LOCK, Found(ONE, 1), BEFORE, "e")
    assert len(states.outputs) == 2, "what is on its way stays as it is"
    assert states.batch(lambda each: each.size, 50, 100)[0].offer == "offer"
    assert later.number in states.outputs


def test_an_offer_has_each_path_once_and_is_bounded() -> None:
    states = States(RULES)
    for name in ("gen/a", "gen/b", "gen/c"):
        states.touched(RelPath(name), 40, 0.0)
        states.read(RelPath(name), Found(TWO, 40), None, "e")
    states.keep(RelPath("gen/a"), Found(ONE, 1), None, "e")
    assert [each.path for each in states.batch(lambda each: each.size, 50, 100)] == ["gen/a", "gen/b"]
    assert [each.path for each in states.batch(lambda each: each.size, 1, 100)] == ["gen/a"]


def test_more_paths_than_are_followed_are_counted() -> None:
    states = States(RULES)
    for number in range(MOST_PATHS + 10):
        states.touched(RelPath(f"gen/{number}"), 1, 0.0)
    states.touched(RelPath("outside"), 1, 0.0)
    assert (len(states.paths), states.left_out) == (MOST_PATHS, 10)
    states.unfit(RelPath("gen/1"), "size")
    assert states.paths[RelPath("gen/1")].phase is Phase.REFUSED


def test_what_is_watched_for_a_rule() -> None:
    rules = [Rule(glob) for glob in ("lock", "src/*.gen.ts", "src/deep/**", "**/x", "a/b*/c")]
    assert roots(rules) == {"": True, "src": False, "src/deep": True, "a": True}
