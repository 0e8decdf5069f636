"""What a room does next, under every order of keys, answers, losses and other people's saves."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator_stub.rooms.state import (
    CLOSE_SECONDS,
    MOST_LOADS,
    MOST_SECONDS,
    RETRY_SECONDS,
    Load,
    Over,
    Read,
    RoomState,
    Save,
    Wait,
)


@dataclass
class Database:
    """A file whose text is a set of keys, with what it answered by correlation id."""

    version: int = 1
    text: frozenset[str] = frozenset({"seed"})
    answers: dict[str, int] = field(default_factory=dict)
    saves: int = 0

    def save(self, text: str, expected: int, key: str) -> int | None:
        if key in self.answers:
            return self.answers[key]
        if expected != self.version:
            return None
        self.version, self.text = self.version + 1, frozenset(text.split())
        self.answers[key] = self.version
        self.saves += 1
        return self.version


class Rooms(RuleBasedStateMachine):
    """A room beside a database. `text` and `base` are what a document would hold: sets of keys merge without order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.database = Database()
        self.room = RoomState(7)
        self.text: frozenset[str] = frozenset()
        self.base: frozenset[str] = frozenset()
        self.at_send: frozenset[str] = frozenset()
        self.typed: set[str] = set()
        self.keys = 0
        self.ended = False
        self.first_unsaved: float | None = None
        self.faulty = False

    def key(self) -> str:
        self.keys += 1
        return f"k{self.keys}"

    @precondition(lambda self: self.room.version is not None and not self.ended)
    @rule(user=st.sampled_from(["ann", "bob"]))
    def type(self, user: str) -> None:
        key = self.key()
        self.text |= {key}
        self.typed.add(key)
        self.first_unsaved = self.now if self.first_unsaved is None else self.first_unsaved
        self.room.edited(self.now, user)

    @rule(told=st.booleans())
    def somebody_saves(self, told: bool) -> None:
        key = self.key()
        self.typed.add(key)
        self.database.version += 1
        self.database.text |= {key}
        if told:
            self.room.outside()

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(fault=st.sampled_from([None, None, None, "away", "lost"]))
    def work(self, fault: str | None) -> None:
        """Do what the room says, once; the database may not answer, or its answer be lost."""
        job = self.room.next(self.now)
        self.faulty = self.faulty or fault is not None
        match job:
            case Wait():
                return
            case Over():
                self.ended = True
                return
            case Load():
                assert self.room.version is None
                if fault:
                    self.room.unreachable(self.now)
                    return
                self.text = self.base = self.database.text
                self.room.loaded(self.database.version)
            case Read():
                self.room.begin_read()
                if fault:
                    self.room.unreachable(self.now)
                    return
                gone = self.base - self.database.text
                self.text = (self.text - gone) | (self.database.text - self.base)
                self.base = self.database.text
                self.room.read(self.now, self.database.version, differs=self.text != self.base)
            case Save():
                assert self.room.version is not None, "nothing is saved before it was loaded"
                assert not self.ended, "nothing is saved after the end"
                if self.room.sending is None:
                    self.at_send = self.text
                sent = self.room.begin_save(" ".join(sorted(self.text)))
                assert sent.users or self.keys
                if fault == "away":
                    self.room.unreachable(self.now)
                    return
                version = self.database.save(sent.text, sent.version, sent.correlation_id)
                if fault == "lost":
                    self.room.unreachable(self.now)
                elif version is None:
                    self.room.conflict(self.now)
                else:
                    self.base = self.at_send
                    self.room.saved(version)
        if self.text == self.base:
            self.first_unsaved = None

    @invariant()
    def what_is_not_saved_is_never_left_alone(self) -> None:
        """A debounce that waits for ever is one that died."""
        if self.ended or self.room.version is None or self.text == self.base:
            return
        job = self.room.next(self.now)
        assert job != Wait(None)
        if isinstance(job, Wait):
            assert job.seconds is not None
            assert job.seconds <= max(MOST_SECONDS, RETRY_SECONDS[-1])

    def teardown(self) -> None:
        """When everything answers again, all that anybody typed or saved is in the file, and in the room."""
        for _ in range(60):
            job = self.room.next(self.now)
            if job == Wait(None) or isinstance(job, Over):
                break
            if isinstance(job, Wait):
                assert job.seconds is not None
                self.now += job.seconds
            else:
                self.work(None)
        if isinstance(job, Over):
            assert job.why == "unreachable"
            assert self.database.saves == 0, "a load that failed stores nothing"
            return
        assert not self.room.dirty
        self.room.outside()
        for _ in range(4):
            if isinstance(self.room.next(self.now), Wait):
                self.now += MOST_SECONDS
            self.work(None)
        assert self.database.text >= self.typed
        assert self.text == self.database.text


TestRooms = Rooms.TestCase
TestRooms.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_keys_are_saved_a_moment_after_the_last_and_a_second_after_the_first() -> None:
    room = RoomState(1)
    room.loaded(3)
    assert room.next(0.0) == Wait(None)
    for tenth in range(20):
        now = tenth / 10
        job = room.next(now)
        if now >= MOST_SECONDS:
            assert job == Save()
            break
        assert not isinstance(job, Save), now
        room.edited(now, "ann")
    sent = room.begin_save("text")
    assert (sent.version, sent.users) == (3, ("ann",))
    room.saved(4)
    assert room.next(now) == Wait(None)


def test_who_typed_last_is_last_and_nobody_is_forgotten_by_a_conflict() -> None:
    room = RoomState(1)
    room.loaded(1)
    for user in ("ann", "bob", "ann"):
        room.edited(0.0, user)
    assert room.begin_save("a").users == ("bob", "ann")
    room.edited(0.1, "cat")
    room.conflict(0.2)
    assert room.next(0.2) == Read()
    room.begin_read()
    room.read(0.3, 2, differs=True)
    assert room.begin_save("b").users == ("bob", "ann", "cat")


def test_a_lost_answer_is_asked_for_with_the_same_text() -> None:
    room = RoomState(1)
    room.loaded(1)
    room.edited(0.0, "ann")
    first = room.begin_save("one")
    room.unreachable(0.5)
    room.edited(0.6, "ann")
    assert isinstance(room.next(0.6), Wait)
    assert room.next(0.5 + RETRY_SECONDS[0]) == Save()
    assert room.begin_save("two") == first
    room.saved(2)
    assert room.begin_save("two").correlation_id != first.correlation_id


def test_how_it_ends() -> None:
    never = RoomState(1)
    for number in range(MOST_LOADS):
        assert never.next(number * 10.0) == Load()
        never.unreachable(number * 10.0)
    assert never.next(100.0) == Over("unreachable")

    room = RoomState(1)
    room.loaded(1)
    room.edited(0.0, "ann")
    room.close(0.0, "idle")
    assert room.next(0.0) == Save()  # at once
    room.reopened()
    assert isinstance(room.next(0.0), Wait)
    room.close(0.0, "stopped")
    room.reopened()
    room.begin_save("x")
    room.unreachable(0.0)
    assert room.next(CLOSE_SECONDS) == Over("unsaved")
    room.end("lost")
    room.end("idle")
    assert room.next(0.0) == Over("lost")
