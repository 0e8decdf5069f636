"""Decides what becomes of each path that a tool in the container changed. Pure; time is passed in, monotonic seconds.

    clean ──a change is seen──▶ dirty ──quiet, and read──▶ offered ──answer──▶ clean | proposed | conflict | refused

The tree's entry of a path is its *ancestor*: what the database had there when the disk was last equal to it. It stays
while the path is dirty, so the tree's hash and the next base are the database's. An *output* is what was read there:
it is on record, with its base and its bytes, before it is offered, and until it is answered.

What the database says of a path never waits for any of this. `before` says, per operation, whether the bytes that it
replaces are known somewhere else, are to be kept first, or whether the operation is our own output coming back while
the tool has gone on, which is not written at all.

The invariants, by the names the tests use:

- W1: bytes on disk are replaced only if they are the ancestor, in the history, a conflict, a proposal, or kept here.
- W2: what equals the disk moves the ancestor only.
- W3: our own output that comes back never touches the disk.
- W4: one output makes at most one version.
- W5: nothing outside the rules is offered.
- W6: a deletion never beats content.
- W7: when all is quiet, the disk and the database are equal, or the path says what it waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Final

from msgspec import Struct, structs

from agent.core.globs import Rule, rule_for
from agent.core.model import Digest, Entry, Operation, RelPath

QUIET: Final = 0.3
"""Seconds without a change after which a path is read: formatters and generators write in several steps."""
LONGEST: Final = 2.0
"""Seconds after which it is read although it goes on changing; one that grows is waited for."""
MOST_PATHS: Final = 5_000
"""Followed at once; each is half a KB of memory."""
MOST_VANISHED: Final = 3
VANISHED_SHARE: Final = 0.2
"""More files than that gone, and more than that share of those under the rules: nothing is offered. A tool that cleans
its output, or a checkout of something else, must not become the project."""
IN_HISTORY: Final = frozenset({"came_before"})
"""Rules of a refusal that say that the database has these bytes."""
PASSING: Final = frozenset({"rate"})
"""Rules of a refusal that may pass by itself."""


class Phase(StrEnum):
    """Where a path is. One that is not listed is clean."""

    DIRTY = "dirty"
    OFFERED = "offered"
    PROPOSED = "proposed"
    CONFLICT = "conflict"
    REFUSED = "refused"


class Output(Struct, frozen=True, gc=False):
    """Bytes that a tool made, as they are offered. `digest` None: a deletion.

    `base`: the ancestor's version. `kept`: the database's have replaced them on the disk. `epoch`: of the base.
    `offer`: the offer that it went out with; None: none yet, or one that is answered and tried again.
    """

    number: int
    path: RelPath
    base: int
    digest: Digest | None
    size: int = 0
    executable: bool = False
    epoch: str | None = None
    kept: bool = False
    offer: str | None = None


class Answered(Struct, frozen=True, gc=False):
    """What the orchestrator says of one output: `applied`, `same`, `proposed`, `conflict` or `refused`."""

    outcome: str
    version: int | None = None
    revision: int | None = None
    rule: str | None = None
    retry_after: float | None = None


class Found(Struct, frozen=True, gc=False):
    """What stands at a path. `digest` None: nothing."""

    digest: Digest | None
    size: int = 0
    executable: bool = False


class PathState(Struct):
    """One path that is not clean.

    `due`: when it is to be read, None: not before it changes. `since`: of the cap. `digest`, `base`: what was offered,
    or answered last. `number`: of the output on its way.
    """

    phase: Phase
    due: float | None = None
    since: float = 0.0
    size: int = -1
    digest: Digest | None = None
    base: int = -1
    number: int | None = None
    rule: str | None = None


class Before(StrEnum):
    """What an operation means for the bytes that it would replace."""

    WRITE = "write"
    """They are known elsewhere."""
    KEEP = "keep"
    """They are to be kept first."""
    ECHO = "echo"
    """It is our own output, and the disk has gone on: the ancestor moves, the disk stays."""


class States:
    """See the module's text. `rules`: what may be given back; empty: nothing."""

    def __init__(
        self, rules: Sequence[Rule] = (), outputs: Iterable[Output] = (), last_number: int = 0
    ) -> None:
        """Go on with the `outputs` on record; `last_number` is the highest that was ever given."""
        self.rules = tuple(rules)
        self.paths: dict[RelPath, PathState] = {}
        self.outputs: dict[int, Output] = {}
        """On their way or waiting, by number: on record before they are offered."""
        self.taken_back: list[int] = []
        """Outputs that are to be on record no more; whoever keeps it empties this."""
        self.superseded: list[int] = []
        """Outputs that stay on record and are not offered; whoever keeps it empties this."""
        self.vanished: set[RelPath] = set()
        """Files of the tree that are not on the disk."""
        self.left_out = 0
        """How often a path was not taken up, because there were so many."""
        self.files = 0
        """How many files the tree has under the rules."""
        self._number = last_number
        for output in outputs:
            self._remember(output)

    def _remember(self, output: Output) -> None:
        self.outputs[output.number] = output
        self._number = max(self._number, output.number)
        if not output.kept:
            state = PathState(Phase.OFFERED, digest=output.digest, base=output.base, number=output.number)
            self.paths[output.path] = state

    def rule(self, path: RelPath) -> Rule | None:
        """Return the rule that speaks of `path`."""
        return rule_for(self.rules, path)

    def follow(self, rules: Sequence[Rule]) -> list[int]:
        """Take other rules. What they do not speak of is not offered any more, and is drift again from now on.

        Returns the outputs that stay on record for a person, since saves have replaced them. What was sent already is
        answered; what was replaced and may be given back still is offered.
        """
        self.rules = tuple(rules)
        left: list[int] = []
        for output in [o for o in self.outputs.values() if o.offer is None and self.rule(o.path) is None]:
            if output.kept:
                del self.outputs[output.number]
                left.append(output.number)
            else:
                self.forget(output)
        self._leave([path for path in self.paths if self.rule(path) is None])
        self.vanished = {path for path in self.vanished if self.rule(path) is not None}
        return left

    def _leave(self, paths: Iterable[RelPath]) -> None:
        """Follow paths no longer, unless an answer for them is on its way."""
        for path in paths:
            if (state := self.paths.get(path)) is not None and not self._on_its_way(state):
                del self.paths[path]

    # --- what is seen

    def touched(self, path: RelPath, size: int, now: float) -> None:
        """Note that `path` changed, and has `size` bytes now (-1: nothing is there). Outside the rules: nothing."""
        if self.rule(path) is None:
            return
        if len(self.paths) >= MOST_PATHS and path not in self.paths:
            self.left_out += 1  # it is found again by the next comparison of everything
            return
        state = self.paths.setdefault(path, PathState(Phase.DIRTY))
        if state.due is None or size > state.size >= 0:
            state.since = now  # it begins, or grows: what grows is not cut off by the cap
        state.size = size
        state.due = min(now + QUIET, max(now, state.since + LONGEST))

    def due(self, now: float) -> list[RelPath]:
        """Return the paths that are to be read now: those that were quiet, and whose output is not on its way."""
        return [path for path, at in self._readable() if at <= now]

    def next_due(self) -> float | None:
        """Return when the next path is to be read."""
        return min((at for _, at in self._readable()), default=None)

    def _readable(self) -> Iterator[tuple[RelPath, float]]:
        for path, state in self.paths.items():
            if state.due is not None and not self._on_its_way(state):
                yield path, state.due

    def _on_its_way(self, state: PathState) -> bool:
        return state.number is not None and self.outputs[state.number].offer is not None

    def unstable(self, path: RelPath, size: int, now: float) -> None:
        """Note that `path` changed while it was read."""
        state = self.paths[path]
        state.size, state.since, state.due = size, now, now + QUIET

    def unfit(self, path: RelPath, rule: str) -> None:
        """Note that what stands at `path` is nothing to offer: a link, another's file, too large, no text."""
        self._rest(path, rule)

    def read(self, path: RelPath, found: Found, ancestor: Entry | None, epoch: str | None) -> Output | None:
        """Judge what stands at `path`. Returns the output that is to be recorded and offered, if it is one.

        An output that was made of it before and never sent is taken back.
        """
        state = self.paths[path]
        state.due = None
        if state.number is not None:
            if self.outputs[state.number].digest == found.digest:
                return None
            self.forget(self.outputs[state.number])
        base = ancestor.version if ancestor is not None else 0
        before = ancestor.digest if ancestor is not None else None
        rule = self.rule(path)
        gone = found.digest is None and before is not None
        (self.vanished.add if gone else self.vanished.discard)(path)
        if rule is None or found.digest == before or (gone and not rule.deletes):
            del self.paths[path]
            return None
        if state.phase is not Phase.DIRTY and (state.digest, state.base) == (found.digest, base):
            return None  # answered already, and neither side has moved
        output = self._output(path, found, base, epoch, kept=False)
        state.phase, state.digest, state.base = Phase.OFFERED, found.digest, base
        state.number, state.rule = output.number, None
        return output

    def _output(self, path: RelPath, found: Found, base: int, epoch: str | None, *, kept: bool) -> Output:
        self._number += 1
        output = Output(self._number, path, base, found.digest, found.size, found.executable, epoch, kept)
        self.outputs[output.number] = output
        return output

    def forget(self, output: Output) -> None:
        """Take back an output that was not sent."""
        if self.outputs.pop(output.number, None) is not None:
            self.taken_back.append(output.number)
        state = self.paths.get(output.path)
        if state is not None and state.number == output.number:
            state.number, state.digest, state.phase = None, None, Phase.DIRTY

    # --- what is offered

    def batch(self, size: Callable[[Output], int], most: int, most_bytes: int) -> list[Output]:
        """Return the outputs for the next offer: of each path the oldest, all of one epoch.

        One that was sent and not answered is sent again as it was.
        """
        sent = [each for each in self.outputs.values() if each.offer is not None]
        if sent:
            return [each for each in sent if each.offer == sent[0].offer]
        chosen: dict[RelPath, Output] = {}
        room = most_bytes
        for each in self.outputs.values():
            first = next(iter(chosen.values()), each)
            if each.path in chosen or each.epoch != first.epoch:
                continue
            if len(chosen) == most or size(each) > room:
                break
            chosen[each.path] = each
            room -= size(each)
        return list(chosen.values())

    def sent(self, outputs: Sequence[Output], offer: str | None) -> list[Output]:
        """Note the offer that outputs go out with, before they do; None: they are to go out with another."""
        changed = [structs.replace(each, offer=offer) for each in outputs]
        self.outputs.update((each.number, each) for each in changed)
        return changed

    @property
    def halted(self) -> bool:
        """Whether so much has vanished that nothing is offered."""
        return len(self.vanished) > max(MOST_VANISHED, VANISHED_SHARE * self.files)

    # --- what the database says

    def before(self, operation: Operation, found: Found, ancestor: Entry | None) -> Before:
        """Say what is to be done with what stands at the operation's path before it is replaced.

        What was offered from there and is not answered is on record already; it is kept from now on.
        """
        path, digest = operation.path, operation.entry.digest
        state = self.paths.get(path)
        before = ancestor.digest if ancestor is not None else None
        if state is not None and state.number is not None and state.digest == digest != found.digest:
            return Before.ECHO
        if found.digest in (None, before, digest):
            return Before.WRITE
        if state is None or state.digest != found.digest:
            return Before.KEEP
        if state.number is not None:
            self.outputs[state.number] = structs.replace(self.outputs[state.number], kept=True)
            state.number, state.phase, state.digest = None, Phase.DIRTY, None
            return Before.WRITE
        in_history = state.phase is Phase.REFUSED and state.rule in IN_HISTORY
        return Before.WRITE if in_history or state.phase in (Phase.PROPOSED, Phase.CONFLICT) else Before.KEEP

    def keep(self, path: RelPath, found: Found, ancestor: Entry | None, epoch: str | None) -> Output:
        """Return the output to record of what is about to be replaced at `path`.

        One that was kept before and is not sent yet stays on record and is not offered: saves at the pace of typing
        over a tool that runs would make hundreds of conflicts, which nobody reads.
        """
        for older in [o for o in self.outputs.values() if o.path == path and o.kept and o.offer is None]:
            del self.outputs[older.number]
            self.superseded.append(older.number)
        return self._output(path, found, ancestor.version if ancestor is not None else 0, epoch, kept=True)

    def replaced(self, path: RelPath, now: float) -> None:
        """Note that an operation on `path` was done, or was an echo: it is looked at again."""
        if path in self.paths or self.rule(path) is not None:
            self.touched(path, -1, now)

    # --- answers

    def answered(self, output: Output, answer: Answered, ancestor: Entry | None, now: float) -> Entry | None:
        """Take the answer to an output, which is then on record no more. Returns the ancestor to take, if it moves.

        A refusal that may pass keeps the output; one of what is on the disk no more keeps the bytes (`Store`).
        """
        moved: Entry | None = None
        output = self.outputs.get(output.number, output)
        if answer.outcome in ("applied", "same") and not output.kept:
            version = answer.version or 0
            if version > (ancestor.version if ancestor is not None else 0):
                moved = Entry(version, output.digest, output.size, output.executable, answer.revision or 0)
        if answer.outcome == "refused" and answer.rule in PASSING:
            self.sent([output], None)
            return None
        self.outputs.pop(output.number, None)
        state = self.paths.get(output.path)
        if state is None or state.number != output.number:
            return moved
        state.number = None
        if answer.outcome in ("applied", "same"):
            state.phase, state.rule = Phase.DIRTY, None  # until it is read: the tool may have gone on
            self.touched(output.path, state.size, now)
        else:
            phase = Phase(answer.outcome)
            state.phase, state.rule = phase, answer.rule
            if state.due is None:
                self.touched(output.path, state.size, now)  # what changed meanwhile is told by reading
        if self.rule(output.path) is None:
            self._leave([output.path])
        return moved

    # --- status

    def report(self, most: int) -> dict[str, object]:
        """Return what waits and why, for people: counts, and at most so many paths."""
        waiting = sorted(self.paths.items())
        return {
            "rules": len(self.rules),
            "states": dict(Counter(state.phase.value for _, state in waiting)),
            "offers_waiting": len(self.outputs),
            "halted": f"{len(self.vanished)} files vanished" if self.halted else None,
            "left_out": self.left_out,
            "paths": [
                {"file_path": path, "state": state.phase.value, "rule": state.rule}
                for path, state in waiting[:most]
            ],
        }

    def _rest(self, path: RelPath, rule: str) -> None:
        state = self.paths[path]
        if state.number is not None and not self._on_its_way(state):
            self.forget(self.outputs[state.number])
        state.phase, state.digest, state.base, state.rule, state.due = Phase.REFUSED, None, -1, rule, None
