"""Injects faults into a scenario: reorders, doubles and drops its events, breaks the channel, kills the agent. Pure.

The same seed gives the same faults, on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from agent.replay.scenario import Step

PAUSES = (0.0, 0.0, 0.0, 0.01, 0.1, 0.5)
"""Seconds between two shuffled steps: none, less and more than the scheduler's spacing and its grace for a hole."""

UNAVAILABLE_SHARE = 0.1
"""Share of answers that are 503 instead, when shuffled."""

DELTA_SHARE = 0.2
"""Share of answers that come as a delta snapshot, when shuffled, as those do that are too large to be inline."""


REACH = 5
"""How many events later a shuffled or doubled one may come."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Which faults to inject beside the scenario's own.

    Attributes:
        seed: reproduces the run.
        shuffle: whether events come out of order, with pauses, and answers late or not at all.
        duplicate: probability in 0…1 that an event is delivered twice.
        drop: probability in 0…1 that an event is not delivered.
        disconnect: how often the channel breaks.
        crash: how often the agent is killed.
    """

    seed: int = 0
    shuffle: bool = False
    duplicate: float = 0.0
    drop: float = 0.0
    disconnect: int = 0
    crash: int = 0


NO_FAULTS: Final = FaultPlan()
"""The scenario as it was recorded."""


@dataclass(frozen=True, slots=True)
class Committed:
    """The step's event is in the log now."""

    step: Step


@dataclass(frozen=True, slots=True)
class Delivered:
    """The step's event reaches the agent."""

    step: Step


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault happens: one of `replay.scenario.FAULTS`, or `crash`. `step`: the scenario's own, when it is one."""

    kind: str
    step: Step | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Nothing happens for so many seconds."""

    seconds: float


Occurrence = Committed | Delivered | Fault | Pause


def inject(steps: Sequence[Step], plan: FaultPlan) -> Iterator[Occurrence]:
    """Yield what happens to an agent: commits in their order, deliveries and faults as the plan has them.

    An event is never delivered before it is committed, because the database never broadcasts what it has not done.
    """
    dice = random.Random(plan.seed)  # noqa: S311 - a reproducible disorder is the point
    waiting: list[tuple[float, Step]] = []
    extra = _extra_faults(len(steps), plan, dice)
    lost = 0
    for number, step in enumerate(steps):
        if plan.shuffle and (pause := dice.choice(PAUSES)):
            yield Pause(pause)
        for kind in extra.get(number, ()):
            yield Fault(kind)
        if step.fault is not None:
            yield Fault(step.fault, step)
            lost = max(lost, step.lost)
            continue
        yield Committed(step)
        if lost:
            lost -= 1
        elif dice.random() >= plan.drop:
            waiting.append((number + (dice.uniform(0, REACH) if plan.shuffle else 0), step))
            if dice.random() < plan.duplicate:
                waiting.append((number + dice.uniform(0, REACH), step))
        waiting.sort(key=lambda due: due[0])
        while waiting and waiting[0][0] <= number:
            yield Delivered(waiting.pop(0)[1])
    for _, step in waiting:
        yield Delivered(step)


def _extra_faults(steps: int, plan: FaultPlan, dice: random.Random) -> dict[int, list[str]]:
    extra: dict[int, list[str]] = {}
    for kind, times in (("disconnect", plan.disconnect), ("crash", plan.crash)):
        for _ in range(times):
            extra.setdefault(dice.randrange(max(steps, 1)), []).append(kind)
    return extra
