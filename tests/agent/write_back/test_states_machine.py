"""Write-back against a world that does its worst: what a tool made is not lost, what a person saved is not replaced.

`Database` keeps versions, history, answers by offer and the losers of conflicts. Two `Session`s of one project have a
disk each, on which a tool writes; their events, offers and answers are lost, doubled and late, and they are killed and
come back from their record. A person saves and deletes. `quiet` lets everything arrive, and then all must agree. The
invariants W1 to W7 are those of `agent.write_back.states`.

Two mutants show that the world is bad enough: the rule of before (whatever the database says replaces the file) and an
upload without a base.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase as Step
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from agent.core.globs import Rule
from agent.core.model import Entry, Operation, RelPath, Remove, Write, digest_of
from agent.write_back.states import Answered, Before, Found, Output, Phase, States
from tests.profiles import NIGHTLY, examples

LOCK, GEN, SOURCE = RelPath("lock"), RelPath("gen/a.gen.ts"), RelPath("src/a.ts")
PATHS = st.sampled_from([LOCK, LOCK, LOCK, GEN, SOURCE])
SIDES = st.sampled_from([0, 0, 0, 1])
RULES = (Rule("lock"), Rule("gen/**", deletes=True))
ALLOWED = {LOCK, GEN}


@dataclass
class Head:
    version: int
    content: bytes | None


@dataclass
class Database:
    head: dict[RelPath, Head] = field(default_factory=dict)
    history: dict[RelPath, list[tuple[bytes | None, str]]] = field(default_factory=dict)
    kept: dict[RelPath, set[bytes]] = field(default_factory=dict)
    answers: dict[str, list[Answered]] = field(default_factory=dict)
    checks_base: bool = True

    def save(self, path: RelPath, content: bytes | None, sender: str) -> int:
        version = self.head[path].version + 1 if path in self.head else 1
        self.head[path] = Head(version, content)
        self.history.setdefault(path, []).append((content, sender))
        return version

    def offer(self, offer: str, outputs: list[tuple[Output, bytes | None]], sender: str) -> list[Answered]:
        if offer not in self.answers:
            self.answers[offer] = [self._one(output, content, sender) for output, content in outputs]
        return self.answers[offer]

    def _one(self, output: Output, content: bytes | None, sender: str) -> Answered:
        path = output.path
        assert path in ALLOWED, "W5: outside the rules"
        now = self.head.get(path, Head(0, None))
        if now.content == content:
            return Answered("same", now.version)
        past = self.history.get(path, [])
        if self.checks_base and output.base != now.version:
            if content is not None and content not in [each for each, _ in past]:
                self.kept.setdefault(path, set()).add(content)
            return Answered("conflict", now.version)
        since = max((n for n, (_, who) in enumerate(past) if who == "person"), default=0)
        if self.checks_base and content in [each for each, _ in past[since:]]:
            return Answered("refused", rule="came_before")
        return Answered("applied", self.save(path, content, sender))

    def knows(self, path: RelPath, content: bytes) -> bool:
        return content in self.kept.get(path, ()) or content in [
            each for each, _ in self.history.get(path, ())
        ]


@dataclass
class Session:
    """The shell of `agent.write_back` and of the loop, in a few lines."""

    name: str
    database: Database
    states: States = field(default_factory=lambda: States(RULES))
    disk: dict[RelPath, bytes] = field(default_factory=dict)
    entries: dict[RelPath, Entry] = field(default_factory=dict)
    recorded: dict[RelPath, Entry] = field(default_factory=dict)
    contents: dict[int, bytes | None] = field(default_factory=dict)
    """Of the outputs on record."""
    shelf: list[bytes | None] = field(default_factory=list)
    """On record, and followed by a newer one before it could be offered."""
    requests: list[tuple[str, list[tuple[Output, bytes | None]]]] = field(default_factory=list)
    responses: list[tuple[list[Output], list[Answered]]] = field(default_factory=list)
    now: float = 0.0
    offers: int = 0
    mutant: str = ""

    def found(self, path: RelPath) -> Found:
        content = self.disk.get(path)
        return Found(None) if content is None else Found(digest_of(content), len(content))

    def event(self, path: RelPath, version: int, content: bytes | None) -> None:
        before = self.entries.get(path)
        if version <= (before.version if before else 0):
            return
        entry = Entry(version, None if content is None else digest_of(content), len(content or b""))
        if before is None or before.digest != entry.digest:
            self.operate(
                Remove(path, entry) if content is None else Write(path, entry, content), before, content
            )
        self.entries[path] = entry
        self.states.replaced(path, self.now)

    def operate(self, operation: Operation, before: Entry | None, content: bytes | None) -> None:
        path, here = operation.path, self.disk.get(operation.path)
        if path in ALLOWED and not self.mutant:
            found = self.found(path)
            verdict = self.states.before(operation, found, before)
            if verdict is Before.ECHO:
                return
            if verdict is Before.KEEP:
                output = self.states.keep(path, found, before, None)
                self.contents[output.number] = here
                while self.states.superseded:
                    self.shelf.append(self.contents.pop(self.states.superseded.pop()))
        if here is not None and here != content:
            known = before is not None and before.digest == digest_of(here)
            known = known or here in [*self.contents.values(), *self.shelf] or self.database.knows(path, here)
            assert known or path not in ALLOWED, "W1: a tool's output is lost"
        if content is None:
            self.disk.pop(path, None)
        else:
            self.disk[path] = content

    def look(self) -> None:
        if self.mutant == "today":
            return
        for path in ALLOWED:
            self.states.touched(path, len(self.disk.get(path, b"")) if path in self.disk else -1, self.now)
        self.now += 2.5
        for path in self.states.due(self.now):
            output = self.states.read(path, self.found(path), self.entries.get(path), None)
            while self.states.taken_back:
                del self.contents[self.states.taken_back.pop()]
            if output is not None:
                self.contents[output.number] = self.disk.get(path)

    def send(self) -> None:
        batch = self.states.batch(lambda output: output.size, 50, 4_000_000)
        if batch and not self.states.halted:
            self.offers += batch[0].offer is None
            offer = batch[0].offer or f"{self.name}-{self.offers}"
            batch = self.states.sent(batch, offer)
            self.requests.append((offer, [(each, self.contents[each.number]) for each in batch]))

    def arrive(self, *, answered: bool) -> None:
        offer, outputs = self.requests.pop(0)
        answers = self.database.offer(offer, outputs, self.name)
        if answered:
            self.responses.append(([output for output, _ in outputs], answers))

    def hear(self) -> None:
        outputs, answers = self.responses.pop(0)
        for output, answer in zip(outputs, answers, strict=True):
            current = self.states.outputs.get(output.number)
            if current is None:
                continue
            ancestor = self.entries.get(output.path)
            moved = self.states.answered(output, answer, ancestor, self.now)
            if moved is not None:
                self.entries[output.path] = moved
            if not (answer.outcome == "refused" and answer.rule != "came_before" and current.kept):
                self.contents.pop(output.number, None)

    def kill(self) -> None:
        """The outputs are on record; the ledger may be a moment behind."""
        self.requests.clear()
        self.responses.clear()
        self.entries = dict(self.recorded)
        self.states = States(RULES, self.states.outputs.values())


class WriteBackMachine(RuleBasedStateMachine):
    mutant = ""

    def __init__(self) -> None:
        super().__init__()
        self.database = Database(checks_base=self.mutant != "naive")
        self.sessions = [Session(name, self.database, mutant=self.mutant) for name in "AB"]
        self.lost: list[list[tuple[RelPath, int, bytes | None]]] = [[], []]
        self.made = 0
        self.saves: dict[RelPath, set[bytes]] = {}
        self.seen: dict[RelPath, int] = {}

    def content(self, who: str) -> bytes:
        self.made += 1
        return f"{who} {self.made}".encode()

    def publish(self, path: RelPath) -> None:
        head = self.database.head[path]
        for inbox in self.lost:
            inbox.append((path, head.version, head.content))

    def since(self) -> None:
        """What offers have made is told like everything else."""
        for path, head in self.database.head.items():
            if self.seen.get(path, 0) < head.version:
                self.seen[path] = head.version
                self.publish(path)

    @rule(path=PATHS, deleted=st.sampled_from([False, False, False, True]))
    def a_person_saves(self, path: RelPath, deleted: bool) -> None:
        if deleted and self.database.head.get(path, Head(0, None)).content is None:
            return
        self.database.save(path, None if deleted else self.content("person"), "person")
        self.since()

    @rule(side=SIDES, path=PATHS, how=st.sampled_from(["new", "new", "same", "removed"]))
    def a_tool_writes(self, side: int, path: RelPath, how: str) -> None:
        disk = self.sessions[side].disk
        if how == "removed":
            disk.pop(path, None)
        else:
            disk[path] = self.content("tool") if how == "new" else f"generated by {side}".encode()

    @rule(side=SIDES, fate=st.sampled_from(["lost", "doubled", "late", "there", "there"]))
    def an_event_comes(self, side: int, fate: str) -> None:
        inbox = self.lost[side]
        if not inbox:
            return
        event = inbox.pop(-1 if fate == "late" else 0)
        for _ in range({"lost": 0, "doubled": 2}.get(fate, 1)):
            self.sessions[side].event(*event)

    @rule(side=SIDES)
    def it_catches_up(self, side: int) -> None:
        for path, head in self.database.head.items():
            self.sessions[side].event(path, head.version, head.content)

    @rule(side=SIDES, offers=st.sampled_from([True, True, False]))
    def the_agent_looks(self, side: int, offers: bool) -> None:
        self.sessions[side].look()
        if offers:
            self.sessions[side].send()

    @rule(side=SIDES, fate=st.sampled_from(["lost", "unanswered", "unanswered", "there"]))
    def an_offer_comes(self, side: int, fate: str) -> None:
        session = self.sessions[side]
        if session.requests and fate == "lost":
            session.requests.pop(0)
        elif session.requests:
            session.arrive(answered=fate == "there")
            self.since()

    @rule(side=SIDES)
    def an_answer_comes(self, side: int) -> None:
        if self.sessions[side].responses:
            self.sessions[side].hear()

    @rule(side=SIDES)
    def the_ledger_is_written(self, side: int) -> None:
        self.sessions[side].recorded = dict(self.sessions[side].entries)

    @rule(side=SIDES)
    def it_is_killed(self, side: int) -> None:
        self.sessions[side].kill()

    def teardown(self) -> None:
        """All is quiet: nothing is lost any more, and the tools have stopped."""
        versions = {path: head.version for path, head in self.database.head.items()}
        for _ in range(12):
            for side, session in enumerate(self.sessions):
                self.it_catches_up(side)
                session.look()
                session.send()
                while session.requests:
                    session.arrive(answered=True)
                while session.responses:
                    session.hear()
                self.since()
                self.it_catches_up(side)
        for session in self.sessions:
            session.look()
            self.agrees(session)
        for path in ALLOWED:
            written = [c for c, who in self.database.history.get(path, ()) if who != "person"]
            fresh = [c for c in written if c is not None and c.startswith(b"tool")]
            assert len(fresh) == len(set(fresh)), "W4: one output, two versions"
            assert self.database.head.get(path, Head(0, None)).version <= versions.get(path, 0) + 8, (
                "it goes on"
            )
        self.tramples_nobody()

    def agrees(self, session: Session) -> None:
        for path in ALLOWED:
            head = self.database.head.get(path, Head(0, None)).content
            state = session.states.paths.get(path)
            shown = state is not None and state.phase is Phase.REFUSED
            missing = path == LOCK and path not in session.disk  # deletions of it are not given back
            assert session.disk.get(path) == head or shown or missing, "W7: quiet, and not equal"
        assert not session.states.outputs, "W7: quiet, and something waits"
        assert not session.contents, "W1: what was kept was never given"

    def tramples_nobody(self) -> None:
        """What a container wrote stood on the version before it: a person's save in between would be a conflict."""
        if self.mutant == "naive":
            for path, past in self.database.history.items():
                for (content, who), (after, then) in itertools.pairwise(past):
                    replaced = who == "person" and then != "person" and content is not None
                    assert not replaced, f"a person's save of {path} was replaced by {after!r}"


class Today(WriteBackMachine):
    mutant = "today"


class Naive(WriteBackMachine):
    mutant = "naive"


TestWriteBack = WriteBackMachine.TestCase
TestWriteBack.settings = settings(
    examples(25, int(os.environ.get("WRITE_BACK_EXAMPLES", "10000"))),
    stateful_step_count=60 if NIGHTLY else 40,
)


@pytest.mark.parametrize("mutant", [Today, Naive])
def test_the_world_is_bad_enough_for_the_rules_of_before(mutant: type[WriteBackMachine]) -> None:
    few = settings(
        max_examples=200, database=None, derandomize=True, stateful_step_count=40, deadline=None,
        phases=[Step.generate], report_multiple_bugs=False, print_blob=False,
    )  # fmt: skip
    with pytest.raises(AssertionError):
        run_state_machine_as_test(mutant, settings=few)
