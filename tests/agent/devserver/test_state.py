"""The dev server's table: examples for each row, and a state machine in which anything happens at any time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.devserver.state import (
    Answered,
    Command,
    DevServerState,
    Edited,
    Exited,
    Hydrated,
    Input,
    Installed,
    Missed,
    Outdated,
    Phase,
    RestartPolicy,
    Stop,
    Tick,
    step,
)

POLICY = RestartPolicy()
GOOD = Installed(ok=True, restart=False, usable=True)
SWAPPED = Installed(ok=True, restart=True, usable=True)
CODE = Edited(dependencies=False, relevant=True)
LOCK = Edited(dependencies=True, relevant=True)


class Play:
    """A state, its clock, and the commands it gave."""

    def __init__(self, *inputs: Input, jitter: float = 1.0) -> None:
        self.state = DevServerState()
        self.now = 0.0
        self.jitter = jitter
        self.asked: list[Command] = []
        self.give(*inputs)

    def give(self, *inputs: Input) -> Play:
        for each in inputs:
            self.state, commands = step(self.state, each, self.now, policy=POLICY, jitter=self.jitter)
            self.asked += commands
        return self

    def after(self, seconds: float, *inputs: Input) -> Play:
        self.now += seconds
        return self.give(*(inputs or (Tick(),)))

    def crash(self) -> Play:
        return self.give(Exited(self.state.generation, "exit"))

    @property
    def phase(self) -> Phase:
        return self.state.phase


def started() -> Play:
    return Play(Hydrated(True), GOOD)


def ready() -> Play:
    return started().give(Answered(1))


def test_a_project_is_installed_then_started_then_ready() -> None:
    play = Play()
    assert play.phase is Phase.ABSENT
    assert play.give(Hydrated(True)).phase is Phase.INSTALLING
    assert play.give(GOOD).phase is Phase.STARTING
    assert play.give(Answered(1)).phase is Phase.READY
    assert play.asked == [Command.INSTALL, Command.START]


def test_a_project_without_package_json_stays_absent_until_it_has_one() -> None:
    play = Play(Hydrated(False))
    assert play.give(Edited(True, True, runnable=False)).state.next_due is None
    assert play.after(1, Edited(True, True, runnable=True)).after(0.6).phase is Phase.INSTALLING


def test_nothing_starts_before_the_tree_is_whole() -> None:
    assert Play(LOCK).after(10).asked == []


@pytest.mark.parametrize(("usable", "phase"), [(True, Phase.STARTING), (False, Phase.FAILED)])
def test_a_first_install_that_fails_starts_what_is_there(usable: bool, phase: Phase) -> None:
    assert Play(Hydrated(True), Installed(False, False, usable)).phase is phase


def test_backoff_doubles_up_to_its_most_and_jitters_downwards() -> None:
    for jitter, factor in ((1.0, 1.0), (0.0, 0.5)):
        delays = []
        play = Play(Hydrated(True), GOOD, jitter=jitter)
        for _ in range(7):
            play.after(30.0).crash()  # too seldom to fail for good
            assert play.phase is Phase.BACKOFF
            assert play.state.due is not None
            delays.append(play.state.due - play.now)
            play.after(delays[-1])
        assert delays == pytest.approx([factor * d for d in (0.5, 1, 2, 4, 8, 10, 10)])


def test_five_crashes_in_a_minute_are_final_until_a_relevant_change() -> None:
    play = started()
    for _ in range(4):
        play.crash()
        assert play.phase is Phase.BACKOFF
        play.after(10)
    assert play.crash().phase is Phase.FAILED
    assert play.after(3600).phase is Phase.FAILED
    assert play.give(Edited(dependencies=False, relevant=False)).after(10).phase is Phase.FAILED
    assert play.give(CODE).phase is Phase.FAILED
    assert play.after(0.5).phase is Phase.INSTALLING
    assert play.give(GOOD).phase is Phase.STARTING


def test_a_healthy_minute_makes_crashes_history() -> None:
    play = started()
    for _ in range(4):
        play.crash().after(10)
    play.give(Answered(play.state.generation)).after(60).crash()
    assert play.phase is Phase.BACKOFF
    assert play.state.due == pytest.approx(play.now + 0.5)


def test_a_change_shortens_the_wait() -> None:
    play = started()
    for _ in range(4):
        play.crash().after(10)
    play = started().crash().after(1).crash().after(2).crash()
    assert play.state.due == pytest.approx(play.now + 2)
    play.give(CODE)
    assert play.state.due == pytest.approx(play.now + 0.5)


def test_a_server_that_never_answers_is_ended_and_tried_again() -> None:
    play = started().after(59.9)
    assert play.phase is Phase.STARTING
    assert play.after(0.1).phase is Phase.STOPPING
    assert play.crash().phase is Phase.BACKOFF
    assert play.state.reason == "late"


def test_a_server_that_answers_is_up_whatever_it_answers() -> None:
    play = started().give(Answered(1)).after(3600)
    assert play.phase is Phase.READY


def test_so_many_missed_probes_in_a_row_are_a_hung_server() -> None:
    most = POLICY.missed_probes
    play = ready().give(*[Missed(1)] * (most - 1), Answered(1), *[Missed(1)] * (most - 1))
    assert play.phase is Phase.READY
    assert play.give(Missed(1)).phase is Phase.STOPPING
    assert play.crash().state.reason == "hung"
    assert play.state.due is not None


def test_a_port_that_is_taken_is_no_crash_and_is_tried_for_ever() -> None:
    play = started()
    for _ in range(20):
        play.give(Exited(play.state.generation, "port_taken"))
        assert play.phase is Phase.BACKOFF
        assert play.state.due is not None
        assert play.state.due <= play.now + POLICY.backoff_most
        play.after(POLICY.backoff_most)
    assert play.give(Answered(play.state.generation)).phase is Phase.READY


def test_an_outdated_cache_is_cleared_once() -> None:
    play = started().give(Outdated(1)).after(3600)
    assert play.phase is Phase.STARTING
    assert play.give(Answered(1), Outdated(1)).phase is Phase.READY
    assert play.give(Outdated(1)).phase is Phase.STOPPING
    assert play.crash().asked[-1] is Command.START_FRESH
    play.give(Outdated(2), Outdated(2), Outdated(2))
    assert play.phase is Phase.READY


def test_a_lock_change_is_debounced_and_restarts_once() -> None:
    play = ready().give(LOCK).after(0.3, LOCK).after(0.3)
    assert play.asked.count(Command.INSTALL) == 1
    play.after(0.2)
    assert play.asked.count(Command.INSTALL) == 2
    assert play.phase is Phase.READY
    assert play.give(SWAPPED).phase is Phase.STOPPING
    assert play.crash().phase is Phase.STARTING
    assert play.state.failures == 0
    assert play.asked.count(Command.START) == 2


def test_a_lock_change_during_an_install_is_installed_afterwards() -> None:
    play = ready().give(LOCK).after(0.5).after(1, LOCK).after(5)
    assert play.asked.count(Command.INSTALL) == 2
    play.give(GOOD, Tick())
    assert play.asked.count(Command.INSTALL) == 3


@pytest.mark.parametrize("ended", [GOOD, Installed(False, False, True), Installed(False, False, False)])
def test_an_install_that_changes_nothing_leaves_the_preview_running(ended: Installed) -> None:
    play = ready().give(LOCK).after(0.5).give(ended)
    assert play.phase is Phase.READY
    assert Command.TERMINATE not in play.asked


def test_what_an_old_process_says_changes_nothing() -> None:
    play = ready().crash().after(0.5).give(Answered(2))
    before = play.state
    for late in (Exited(1, "exit"), Missed(1), Answered(1), Outdated(1), Exited(99, "exit")):
        assert play.give(late).state == before


@pytest.mark.parametrize("play", [Play(), Play(Hydrated(True)), started(), ready(), ready().crash()])
def test_after_stop_nothing_starts(play: Play) -> None:
    play.give(Stop())
    before = len(play.asked)
    play.give(GOOD, SWAPPED, Hydrated(True), LOCK).after(3600).crash().after(3600, LOCK).after(1)
    assert play.phase is Phase.ABSENT
    assert play.asked[before:] == []


class World(RuleBasedStateMachine):
    """Anything may happen at any time; the shell does what it is asked."""

    @initialize()
    def begin(self) -> None:
        self.state = DevServerState()
        self.now = 0.0
        self.process: int | None = None
        self.terminating = False
        self.installing = False
        self.stopped = False
        self.starts: list[float] = []

    def give(self, given: Input) -> None:
        before = self.state
        self.state, commands = step(before, given, self.now, policy=POLICY, jitter=0.5)
        for command in commands:
            match command:
                case Command.INSTALL:
                    assert not self.installing, "two installs at once"
                    assert not self.stopped
                    self.installing = True
                case Command.START | Command.START_FRESH:
                    assert self.process is None, "two servers at once"
                    assert not self.stopped
                    assert self.state.generation == before.generation + 1
                    self.process = self.state.generation
                    self.terminating = False
                case Command.TERMINATE:
                    assert self.process is not None
                    assert not self.terminating
                    self.terminating = True

    @rule(runnable=st.booleans())
    def hydrated(self, runnable: bool) -> None:
        self.give(Hydrated(runnable))

    @rule(dependencies=st.booleans(), relevant=st.booleans(), runnable=st.booleans())
    def edited(self, dependencies: bool, relevant: bool, runnable: bool) -> None:
        self.give(Edited(dependencies, relevant or dependencies, runnable))

    @precondition(lambda self: self.installing)
    @rule(ok=st.booleans(), restart=st.booleans(), usable=st.booleans())
    def installed(self, ok: bool, restart: bool, usable: bool) -> None:
        self.installing = False
        self.give(Installed(ok, restart and ok, usable or (restart and ok)))

    @precondition(lambda self: self.process is not None)
    @rule(say=st.sampled_from([Answered, Missed, Outdated]), late=st.booleans())
    def said(self, say: type[Answered], late: bool) -> None:
        assert self.process is not None
        self.give(say(self.process - (1 if late else 0)))

    @precondition(lambda self: self.process is not None)
    @rule(why=st.sampled_from(["exit", "signal", "oom"]))
    def exited(self, why: str) -> None:
        generation, self.process = self.process, None
        assert generation is not None
        self.give(Exited(generation, why))

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.5, 3.0, 20.0, 61.0]))
    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.give(Tick())

    @rule()
    def stop(self) -> None:
        self.stopped = True
        self.give(Stop())

    @invariant()
    def the_state_says_whether_there_is_a_process(self) -> None:
        assert self.state.alive == (self.process is not None)

    @invariant()
    def a_stop_under_way_is_called_stopping(self) -> None:
        if self.process is not None:
            assert self.terminating == (self.state.phase is Phase.STOPPING)

    @invariant()
    def installing_is_known(self) -> None:
        assert self.state.installing == self.installing or self.stopped

    @invariant()
    def backoff_always_has_an_end(self) -> None:
        if self.state.phase is Phase.BACKOFF:
            assert self.state.due is not None
            assert self.state.due <= self.now + POLICY.backoff_most

    @invariant()
    def a_well_behaved_world_ends_ready(self) -> None:
        """From wherever this is, unless it failed for good or was stopped: good outcomes lead to ready."""
        state, now = self.state, self.now
        if self.stopped or not state.hydrated or state.phase is Phase.ABSENT:
            return
        if state.phase is Phase.FAILED and state.install_due is None:
            state, _ = step(state, CODE, now, policy=POLICY, jitter=0.5)
        for _ in range(12):
            given: Input = Tick()
            if state.installing:
                given = GOOD
            elif state.phase is Phase.STOPPING:
                given = Exited(state.generation, "exit")
            elif state.phase is Phase.STARTING:
                given = Answered(state.generation)
            elif state.next_due is not None:
                now = max(now, state.next_due)
            elif state.phase is Phase.FAILED:
                given = CODE
            else:
                break
            state, _ = step(state, given, now, policy=POLICY, jitter=0.5)
        assert replace(state, since=0.0).phase is Phase.READY


TestWorld = World.TestCase
