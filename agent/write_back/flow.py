"""Runs write-back: reads changed files, records them, offers them and applies the answers.

What is decided is decided in `states`; here are the disk, the record, the requests and the time. Without rules there
is no task, no watch, no file and no request.

`before` and `exempt` are the loop's: they are called between two of its awaits, and never wait. Nothing that the
orchestrator answers to an offer ends the session: whether that is over, the heartbeat hears.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from msgspec import structs

from agent.core.errors import (
    AgentError,
    CredentialRejected,
    TooLarge,
)
from agent.core.globs import Rule
from agent.core.model import Entry, Operation, Problem, RelPath, Tree, digest_of
from agent.core.reconcile import Plan
from agent.fs.foreign import Growing, Unfit, Whole
from agent.fs.inspect import UNREAD, Drift, FileStat
from agent.fs.project_dir import ProjectDir
from agent.session_api import SessionApi
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from agent.tokens import Token
from agent.write_back import wire
from agent.write_back.pace import GONE_RETRY, Pace
from agent.write_back.states import Answered, Before, Found, Output, States
from agent.write_back.store import Store, StoreFailed
from agent.write_back.watch import Watch

log = get_logger("write_back")

MOST_FILE: Final = 2**20
"""Bytes of one file that is given back, whatever its rule says."""
MOST_OFFER: Final = 4 * 2**20
"""Bytes of one offer's contents."""
MOST_WAITING: Final = 200
"""Outputs read and not answered: four offers. What else a tool made stays on the disk until then."""
MOST_KEPT_AT_ONCE: Final = 16 * 2**20
"""Bytes that one plan has read and kept, on the event loop: some 20 ms. Past it the database's word replaces the rest,
as it does where there are no rules."""
TURN: Final = 0.005
RECORD_RETRY: Final = 60.0
"""Seconds until a path is read again whose output could not be put on record."""
MOST_SHOWN: Final = 20

Confirm = Callable[[Mapping[RelPath, tuple[Entry, FileStat | None]], int | None], None]


class WriteBack:
    """What of the container goes back to the project.

    Args:
        place: the record's file.
        disk: the project's directory.
        api: where offers go; None: nowhere, and nothing is given back.
        problems: has the metrics and the errors, too.
        tree: gives the tree as it is now.
        stats: gives the stat of each file when its content was known; may be added to.
        confirm: has the loop take ancestors that the database has confirmed, and the revision that they are all of.
        clock: gives monotonic seconds.
    """

    def __init__(
        self,
        place: Path,
        disk: ProjectDir,
        api: SessionApi | None,
        problems: Problems,
        *,
        tree: Callable[[], Tree],
        stats: Callable[[], dict[RelPath, FileStat]],
        confirm: Confirm,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._disk = disk
        self._api = api
        self._errors = problems.errors
        self._problems = problems.owned_by("write_back.flow")
        self._metrics: Metrics = problems.metrics
        self._tree = tree
        self._stats = stats
        self._confirm = confirm
        self._clock = clock

        # What is known, and its record.
        self._store = Store(place)
        self._states: States | None = None
        """None until the record was read."""
        self._read_stats: dict[int, FileStat] = {}
        """By output, the stat of the file that it was read from."""

        # The task, and when it offers.
        self._task: asyncio.Task[None] | None = None
        self._watch: Watch | None = None
        self._wake = asyncio.Event()
        self._pace = Pace(clock)
        self.outcomes: Counter[str] = Counter()
        self._conflicts: dict[RelPath, int] = {}
        """By path, the version that a tool's output was a conflict with: a later one ends it."""

    @property
    def states(self) -> States:
        """What is known of the paths that are not clean; the record is read on the first use."""
        if self._states is None:
            rules, outputs, last = self._store.load() if self._api is not None else ((), [], 0)
            self._states = States(rules, outputs, last)
            if self._store.unread is not None:
                log.error("write_back.unread", why=self._store.unread)
        return self._states

    # --- start and end

    def configure(self, rules: Sequence[Rule]) -> None:
        """Take what may be given back from now on. Empty: what runs ends, and nothing is offered any more."""
        if self._api is None or (not rules and not self.states.rules and self._task is None):
            return
        if tuple(rules) == self.states.rules and self._task is not None:
            return
        self.stop()
        left = self.states.follow(rules)
        try:
            self._store.set_rules(rules)
            for number in left:
                self._store.refuse(number, "glob")
            self._store.remove(self.states.taken_back)
            self.states.taken_back.clear()
        except StoreFailed as error:
            log.warning("write_back.unrecorded", why=str(error))
        log.info("write_back.rules", rules=len(rules))
        if rules:
            self.start()

    def start(self) -> None:
        """Begin to see and to offer."""
        self._task = asyncio.create_task(
            self._errors.keep_running("write-back", self._run), name="write-back"
        )

    def stop(self) -> None:
        """End what runs. What is on record stays there."""
        if self._task is not None:
            self._task.cancel()
        self._task = self._watch = None

    def close(self) -> None:
        """Release everything."""
        self.stop()
        self._store.close()

    # --- what the loop asks

    def exempt(self, drift: Drift) -> bool:
        """Return whether a change is a tool's to make: our watch sees it too, and it is no drift."""
        rule = self.states.rule(drift.path) if self.states.rules else None
        if rule is None or drift.rule == "not_a_file":
            return False
        return drift.rule != "missing" or rule.deletes

    def before(self, plan: Plan) -> Plan:
        """Keep what the plan's operations would replace and nobody else has. Returns the plan to carry out.

        RACE: a tool may write between this reading and the exchange, or into the file that was exchanged. Worst case:
        what it wrote in these microseconds is lost on this disk, and made again by its next run.
        """
        if not self.states.rules or not plan.operations:
            return plan
        left = MOST_KEPT_AT_ONCE
        kept: list[Operation] = []
        for operation in plan.operations:
            path = operation.path
            if self.states.rule(path) is None:
                kept.append(operation)
                continue
            verdict, size = self._before(operation, left)
            left -= size
            if verdict is Before.ECHO:
                self._count("echo")
            else:
                kept.append(operation)
            self.states.replaced(path, self._clock())
            if operation.entry.version > self._conflicts.get(path, operation.entry.version):
                self._settled(path)
        self._wake.set()
        return plan if len(kept) == len(plan.operations) else structs.replace(plan, operations=tuple(kept))

    def _before(self, operation: Operation, most: int) -> tuple[Before, int]:
        """Judge one operation, and keep what has to be kept. Returns also how many bytes were read."""
        path = operation.path
        ancestor, known = self._tree().entries.get(path), self._stats().get(path)
        if known is not None and self._disk.stat(path) == known:
            return Before.WRITE, 0
        whole = self._disk.read_foreign(path, min(most, MOST_FILE))
        content = whole.content if isinstance(whole, Whole) else None
        found = Found(None if whole is None else UNREAD)
        if isinstance(whole, Whole):
            found = Found(digest_of(whole.content), len(whole.content), whole.executable)
        state = self.states.paths.get(path)
        number = state.number if state is not None else None
        verdict = self.states.before(operation, found, ancestor)
        try:
            if verdict is Before.KEEP:
                self._keep(path, found, ancestor, content)
            elif number is not None and verdict is Before.WRITE and number in self.states.outputs:
                self._store.update([self.states.outputs[number]])
        except StoreFailed as error:
            self._count("lost")
            log.warning("write_back.not_kept", file_path=path, why=str(error))
        return verdict, len(content or b"")

    def _keep(self, path: RelPath, found: Found, ancestor: Entry | None, content: bytes | None) -> None:
        """Put on record what is about to be replaced. Raises `StoreFailed`."""
        if content is None:  # a link, another's, too large: as where there are no rules
            self._count("lost")
            log.warning("write_back.not_kept", file_path=path, why="it is nothing to give back")
            return
        output = self.states.keep(path, found, ancestor, self._tree().cursor.epoch)
        try:
            self._store.add(output, content)
            while self.states.superseded:
                self._store.refuse(self.states.superseded.pop(), "superseded")
        except StoreFailed:
            self.states.forget(output)
            raise
        self._count("kept")
        log.info("write_back.kept", file_path=path, bytes=len(content))

    def takes(self, path: str) -> bool:
        """Return whether a file at `path` would be offered."""
        return self._task is not None and self.states.rule(RelPath(path)) is not None

    def hand_over(self, raw: str, content: bytes) -> None:
        """Offer a file that was made beside the project: the installer's lock file. It comes back as a version."""
        path = RelPath(raw)
        ancestor = self._tree().entries.get(path)
        if not self.takes(path) or self.states.paths.get(path) is not None:
            return
        digest = digest_of(content)
        if (ancestor is not None and ancestor.digest == digest) or len(content) > MOST_FILE:
            return
        with contextlib.suppress(StoreFailed):
            self._keep(path, Found(digest, len(content)), ancestor, content)
        self._wake.set()

    # --- the task

    async def _run(self) -> None:
        self._watch = Watch(
            self._disk, self.states.rules, lambda: (self._tree().entries, self._stats()), self._touched
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch.run(), name="write-back-watch")
            tasks.create_task(self._keep_offering(), name="write-back-offers")

    def _touched(self, path: RelPath, size: int) -> None:
        self.states.touched(path, size, self._clock())
        self._wake.set()

    async def _keep_offering(self) -> None:
        while True:
            self._wake.clear()
            await self._read_due()
            await self._offer()
            due = self.states.next_due() if len(self.states.outputs) < MOST_WAITING else None
            times = [at for at in (due, self._next_offer()) if at is not None]
            wait = max(0.0, min(times) - self._clock()) + 0.001 if times else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    def _next_offer(self) -> float | None:
        if not self.states.outputs or self.states.halted:
            return None
        return self._pace.next()

    # --- reading

    async def _read_due(self) -> None:
        over = time.monotonic() + TURN
        for path in self.states.due(self._clock()):
            if len(self.states.outputs) >= MOST_WAITING:
                break  # the rest is read when these are answered
            if path in self.states.paths:
                self._read(path)
            if time.monotonic() >= over:
                await asyncio.sleep(0)
                over = time.monotonic() + TURN
        if self.states.vanished:
            entries = self._tree().entries.items()
            self.states.files = sum(1 for path, e in entries if e.is_file and self.states.rule(path))

    def _read(self, path: RelPath) -> None:
        """Read and judge one path; nothing is awaited between the two."""
        states, tree = self.states, self._tree()
        ancestor, rule = tree.entries.get(path), states.rule(path)
        known, here = self._stats().get(path), self._disk.stat(path)
        if rule is None or (
            ancestor is not None and ancestor.is_file and known is not None and here == known
        ):
            digest = ancestor.digest if ancestor is not None else None
            self._judged(path, Found(digest), None)
            return
        found = self._disk.read_foreign(path, min(rule.max_bytes, MOST_FILE))
        if found is None:
            self._judged(path, Found(None), None)
        elif isinstance(found, Growing):
            states.unstable(path, found.size, self._clock())
        elif isinstance(found, Unfit) or not _is_text(found.content):
            why = found.rule if isinstance(found, Unfit) else "text"
            if states.paths[path].rule != why:
                self._count("refused")
                log.warning("write_back.refused", file_path=path, rule=why)
            states.unfit(path, why)
        else:
            self._judged(path, Found(digest_of(found.content), len(found.content), found.executable), found)

    def _judged(self, path: RelPath, found: Found, whole: Whole | None) -> None:
        tree = self._tree()
        ancestor = tree.entries.get(path)
        output = self.states.read(path, found, ancestor, tree.cursor.epoch)
        if whole is not None and ancestor is not None and ancestor.digest == found.digest:
            self._stats()[path] = whole.stat
        try:
            if taken_back := self.states.taken_back:
                self._store.remove(taken_back)
                for number in taken_back:
                    self._read_stats.pop(number, None)
                taken_back.clear()
            if output is not None:
                self._store.add(output, whole.content if whole is not None else None)
                if whole is not None:
                    self._read_stats[output.number] = whole.stat
        except StoreFailed as error:
            log.warning("write_back.unrecorded", file_path=path, why=str(error))
            if output is not None:  # what is not on record is not offered
                self.states.forget(output)
                self.states.unstable(path, found.size, self._clock() + RECORD_RETRY)

    # --- offering

    async def _offer(self) -> None:
        """Send what waits, as much as one offer takes, if it is time."""
        due = self._next_offer()
        if due is None or due > self._clock():
            return
        token = await self._token()
        batch = self.states.batch(lambda output: output.size, self._pace.most, MOST_OFFER)
        if token is None or self._api is None or not batch:
            return
        offer_id = batch[0].offer or uuid.uuid4().hex
        batch = self.states.sent(batch, offer_id)
        try:
            self._store.update(batch)
            contents = {each.number: self._text(each) for each in batch}
        except StoreFailed as error:
            self._pace.failed(error)
            return
        self._pace.sent()
        body = wire.offer(offer_id, token.generation or 0, batch, contents)
        try:
            answers = wire.read_answer(await self._api.offer_changes(body, token), batch)
        except TooLarge as error:
            self._too_large(batch, error)
        except AgentError as error:
            if isinstance(error, CredentialRejected):
                self._api.forget_write_token()
            self._pace.failed(error)
        else:
            self._pace.answered()
            self._take([(output, *answer) for output, answer in zip(batch, answers, strict=True)])

    def _text(self, output: Output) -> str | None:
        content = self._store.content(output.number)
        return None if output.digest is None or content is None else content.decode()

    async def _token(self) -> Token | None:
        assert self._api is not None
        token = self._api.write_token
        if token is not None and not token.expired(time.time() + 10.0):
            return token
        try:
            await self._api.renew_token()
        except AgentError as error:
            self._pace.failed(error)
            return None
        token = self._api.write_token
        if token is None:
            self._pace.wait(GONE_RETRY, "the session may give nothing back")
        return token

    def _too_large(self, batch: Sequence[Output], error: TooLarge) -> None:
        """Offer half as much; a single output that is too large is refused."""
        if len(batch) == 1:
            self._answered(batch[0], Answered("refused", rule="size"), None)
            return
        self._pace.most = len(batch) // 2
        with contextlib.suppress(StoreFailed):
            self._store.update(self.states.sent(batch, None))
        log.info("write_back.halved", why=str(error), paths=self._pace.most)

    def _take(self, answers: Sequence[tuple[Output, Answered, str | None]]) -> None:
        """Take the answer to an offer. What it wrote is one commit, and on the disk already unless it was kept."""
        before = self.states.outputs
        written = {answer.revision for _, answer, _ in answers if answer.outcome == "applied"}
        here = all(
            not before[o.number].kept for o, a, _ in answers if a.outcome == "applied" and o.number in before
        )
        moved: dict[RelPath, tuple[Entry, FileStat | None]] = {}
        for output, answer, kept_id in answers:
            stat = self._read_stats.pop(output.number, None)
            if (entry := self._answered(output, answer, kept_id)) is not None:
                moved[output.path] = entry, stat
        if answers[0][0].epoch == self._tree().cursor.epoch:
            self._confirm(moved, written.pop() if len(written) == 1 and here else None)

    def _answered(self, output: Output, answer: Answered, kept_id: str | None) -> Entry | None:
        path, ancestor = output.path, self._tree().entries.get(output.path)
        current = self.states.outputs.get(output.number, output)
        moved = self.states.answered(output, answer, ancestor, self._clock())
        self._count(answer.outcome)
        log.info("write_back.answered", file_path=path, outcome=answer.outcome, rule=answer.rule)
        try:
            if answer.outcome == "refused" and output.number in self.states.outputs:
                self._store.update([self.states.outputs[output.number]])
                self._pace.wait(answer.retry_after or 5.0)
            elif answer.outcome == "refused" and current.kept and answer.rule != "came_before":
                self._store.refuse(output.number, answer.rule or "refused")
            else:
                self._store.remove([output.number])
        except StoreFailed as error:
            log.warning("write_back.unrecorded", file_path=path, why=str(error))
        if answer.outcome == "conflict" and output.digest is not None:
            where = f" (conflict {kept_id})" if kept_id else ""
            detail = f"a tool's {path} was not taken: the project has another version; it is kept{where}"
            self._problems.add(Problem("write_back_conflict", detail, path))
            version = ancestor.version if ancestor is not None else 0
            self._conflicts[path] = max(version, output.base + 1, answer.version or 0)
        elif answer.outcome in ("applied", "same"):
            self._settled(path)
        return moved

    def _settled(self, path: RelPath) -> None:
        if self._conflicts.pop(path, None) is not None:
            self._problems.clear("write_back_conflict", paths=[path])

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._metrics.write_back.labels(outcome).inc()

    # --- status

    def report(self) -> dict[str, object] | None:
        """Return what waits and why, for people; None where nothing may be given back."""
        if self._states is None or not self._states.rules:
            return None
        refused = 0
        with contextlib.suppress(StoreFailed):
            refused = self._store.refused
        return {
            **self._states.report(MOST_SHOWN),
            "outcomes": dict(self.outcomes),
            "kept_refused": refused,
            "failure": self._store.unread or self._pace.failure or None,
            "unwatched_directories": self._watch.unwatched if self._watch is not None else 0,
        }


def _is_text(content: bytes) -> bool:
    if b"\0" in content:
        return False
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True
