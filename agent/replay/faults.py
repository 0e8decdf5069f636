"""What the channel between a database and an agent does to a scenario: disorder, doubles, losses, breaks. Pure.

The same seed gives the same disorder, on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agent.replay.scenario import Step

PAUSES = (0.0, 0.0, 0.0, 0.01, 0.1, 0.5)
"""Seconds between two steps that are shuffled: nothing, less and more than the loop's spacing and its patience with
a hole (`core.scheduler`)."""

AWAY = 0.1
"""Share of answers, of what is shuffled, that are 503 instead."""

DELTAS = 0.2
"""Share of answers, of what is shuffled, that come as a delta snapshot, as those do that are too large for one."""


@dataclass(frozen=True, slots=True)
class Mischief:
    """What the channel does to deliveries on top of the scenario's own faults. Probabilities in 0…1."""

    seed: int = 0
    shuffle: bool = False
    duplicate: float = 0.0
    drop: float = 0.0
    disconnect: int = 0
    crash: int = 0

    reach: int = 5
    """How many events later a shuffled or doubled one may come."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The step's event is in the log now."""

    step: Step


@dataclass(frozen=True, slots=True)
class Delivered:
    """The step's event reaches the agent."""

    step: Step


@dataclass(frozen=True, slots=True)
class Broken:
    """A fault happens: one of `replay.scenario.FAULTS`, or `crash`."""

    fault: str
    step: Step | None = None
    """The scenario's own, when it is."""


@dataclass(frozen=True, slots=True)
class Paused:
    """Nothing happens for so many seconds."""

    seconds: float


Happening = Committed | Delivered | Broken | Paused


def play(steps: Sequence[Step], mischief: Mischief) -> Iterator[Happening]:
    """The steps as they happen to an agent: commits in their order, deliveries as the channel would have them.

    An event is never delivered before it is committed, because the database never says what it has not done.
    """
    dice = random.Random(mischief.seed)  # noqa: S311 - a reproducible disorder is the point
    waiting: list[tuple[float, Step]] = []
    extra = _extra_faults(len(steps), mischief, dice)
    lost = 0
    for number, step in enumerate(steps):
        if mischief.shuffle and (pause := dice.choice(PAUSES)):
            yield Paused(pause)
        for fault in extra.get(number, ()):
            yield Broken(fault)
        if step.fault is not None:
            yield Broken(step.fault, step)
            lost = max(lost, step.lost)
            continue
        yield Committed(step)
        if lost:
            lost -= 1
        elif dice.random() >= mischief.drop:
            waiting.append((number + (dice.uniform(0, mischief.reach) if mischief.shuffle else 0), step))
            if dice.random() < mischief.duplicate:
                waiting.append((number + dice.uniform(0, mischief.reach), step))
        waiting.sort(key=lambda due: due[0])
        while waiting and waiting[0][0] <= number:
            yield Delivered(waiting.pop(0)[1])
    for _, step in waiting:
        yield Delivered(step)


def _extra_faults(steps: int, mischief: Mischief, dice: random.Random) -> dict[int, list[str]]:
    extra: dict[int, list[str]] = {}
    for fault, times in (("disconnect", mischief.disconnect), ("crash", mischief.crash)):
        for _ in range(times):
            extra.setdefault(dice.randrange(max(steps, 1)), []).append(fault)
    return extra
