"""Reports on the whole agent for `/status`, `/readyz`, `/metrics` and the heartbeat.

Reads the parts and changes none of them. The agent's state is derived at every reading: a stored one can be wrong.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from immutables import Map
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent import __version__
from agent.config import Settings
from agent.core.clock_skew import Bounds, ClockSkew, Moment
from agent.core.model import Entry, Problem, ProblemKind, RelPath
from agent.core.patches import PatchOutcome
from agent.devserver.screen import Screen
from agent.devserver.supervisor import Supervisor
from agent.health.status_body import MOST_BYTES, fitted, fitted_errors
from agent.link.run_settings import RunSettingsFollower
from agent.link.source import EventSource
from agent.link.types import LinkState
from agent.sync.catchup import CatchUp
from agent.sync.engine import Sync
from agent.sync.shadow import Shadow
from agent.telemetry.errors import Errors
from agent.telemetry.log_writer import LogWriter
from agent.telemetry.logging import Redactor
from agent.telemetry.loop import LoopStalls
from agent.telemetry.status import AgentState, Problems, SyncPhase, SyncStatus, agent_state
from agent.write_back.flow import WriteBack

_PREFIX = "preview_agent"

HARMLESS: frozenset[ProblemKind] = frozenset(
    {
        "content_unavailable",
        "drift",
        "hmr_unreachable",
        "lock_unusable",
        "path_refused",
        "preview_error",
        "preview_unobserved",
        "shadow_difference",
        "write_back_conflict",
    }
)
"""Kinds that are shown and leave the preview what it should be."""


@dataclass(slots=True, eq=False, kw_only=True)
class Report(Collector):
    """Reads every part and owns none. `draining` is set by the daemon alone."""

    settings: Settings
    sync: Sync
    sync_status: SyncStatus
    catch_up: CatchUp
    link: EventSource
    dev: Supervisor
    screen: Screen
    problems: Problems
    redactor: Redactor
    skew: ClockSkew
    run_settings: RunSettingsFollower
    shadow: Shadow | None = None
    """With SYNC_MODE=shadow: what stands in the dev server's place."""
    write_back: WriteBack | None = None
    """What tools made, given back; None where there is nobody to give it to."""
    stalls: LoopStalls | None = None
    """How long the event loop kept everything waiting; None in a replay."""
    lines: LogWriter | None = None
    """Where the log goes; set by the daemon alone."""
    _hashed: tuple[Map[RelPath, Entry], str, int] | None = None
    """The latest tree's entries, hash and number of files."""
    draining: bool = False

    @property
    def errors(self) -> Errors:
        """The bugs that were contained."""
        return self.problems.errors

    def _dev_server_state(self) -> str:
        """What the dev server's part in the agent's state is: in shadow mode another flow has one of its own."""
        if self.shadow is not None:
            return "ready"
        return self.dev.state.value if self.run_settings.known.is_set() else "installing"

    @property
    def state(self) -> AgentState:
        """The state of the agent as a whole."""
        return agent_state(
            self.sync_status.phase,
            self._dev_server_state(),
            link_down_for=self._link_down_for(),
            draining=self.draining,
            problems=sum(1 for problem in self.all_problems() if problem.kind not in HARMLESS),
        )

    def ready(self) -> bool:
        """Return whether the tree is whole and the preview served, or compared in shadow mode."""
        hydrated = self.sync_status.phase in (SyncPhase.FOLLOWING, SyncPhase.HALTED)
        served = self.dev.ready if self.shadow is None else self.shadow.looks > 0
        return hydrated and served and not self.draining

    def heartbeat(self, room: int = MOST_BYTES, *, hashed: bool = True) -> dict[str, object]:
        """Return the body of PUT …/status, harmful problems first.

        Args:
            room: Bytes: as many problems as fit, and errors into half of it.
            hashed: With the tree's hash, which takes 1 ms for a thousand files.
        """
        screen = self.redactor.value(self.screen.report())
        assert isinstance(screen, dict)
        errors = fitted_errors(screen["errors"], room // 2)
        tree = self.sync.tree
        head = {
            "state": self.state.value,
            "revision": tree.cursor.revision,
            "epoch": tree.cursor.epoch,
            "tree_hash": self._tree_hash()[0] if hashed else None,
            "dev_server": self.dev.state.value,
            "link": self.link.state.value,
            "agent_version": __version__,
            "run_revision": self.run_settings.revision,
            "start": self.problems.metrics.start.report(),
            **screen,
            **errors,
        }
        problems = self._shown(sorted(self.all_problems(), key=lambda problem: problem.kind in HARMLESS))
        return fitted(head, problems, room)

    def status(self) -> Mapping[str, object]:
        """Return all that is known, for people; no secret."""
        tree = self.sync.tree
        body: dict[str, object] = {
            "state": self.state.value,
            "ready": self.ready(),
            "agent_version": __version__,
            "project_id": str(self.settings.project_id),
            "session_id": str(self.settings.session_id),
            "uptime_seconds": round(time.time() - self.sync_status.started_at, 3),
            "revision": tree.cursor.revision,
            "epoch": tree.cursor.epoch,
            "tree_hash": self._tree_hash()[0],
            "islands": sorted(tree.cursor.islands),
            "head_revision": self.sync.head_revision,
            "files": self._tree_hash()[1],
            "pending_files": len(self.sync.pending_paths),
            "catch_up": [reason.value for reason in self.sync.pending],
            "last_lag_seconds": self.sync_status.lags[-1] if self.sync_status.lags else None,
            "recent_lags_seconds": list(self.sync_status.lags),
            "last_event_at": self.sync_status.last_event_at,
            "last_catch_up_at": self.sync_status.last_catch_up_at,
            "hydrate": {"mode": self.sync_status.mode, **self.catch_up.snapshots.progress.report()},
            "start": self.problems.metrics.start.report(),
            "link": self.link.report(),
            "dev_server": self.dev.report(),
            **self.screen.report(),
            "last_applied": self.sync_status.last_applied and asdict(self.sync_status.last_applied),
            "clock": self._clock(),
            "loop": self.stalls.report() if self.stalls is not None else None,
            "log_lines_dropped": self.lines.dropped if self.lines is not None else 0,
            "run_revision": self.run_settings.revision,
            "sync_mode": self.settings.sync_mode,
            "shadow": self.shadow.report() if self.shadow is not None else None,
            "write_back": self.write_back.report() if self.write_back is not None else None,
            "session_api": "set" if self.catch_up.api is not None else "absent: no catch-up",
            "problems": self._shown(self.all_problems()),
            "problems_not_kept": dict(self.problems.dropped),
            "waiting_paths": len(self.sync.waiting_paths),
            "agent_errors": self.errors.report(),
        }
        clean = self.redactor.value(body)
        assert isinstance(clean, dict)
        return clean

    def _tree_hash(self) -> tuple[str, int]:
        """Return the tree's hash and how many files it has, counted once a tree: 30 ms for 10,000 files."""
        entries = self.sync.tree.entries
        if self._hashed is None or self._hashed[0] is not entries:
            self._hashed = entries, self.sync.tree.hash(), len(self.sync.tree.files())
        return self._hashed[1:]

    def why(self) -> str:
        """Return the sentence that goes with `ready`."""
        kinds = sorted({problem.kind for problem in self.all_problems()})
        return f"{self.state.value}, dev server {self.dev.state.value}" + (
            f"; {', '.join(kinds)}" if kinds else ""
        )

    def collect(self) -> Iterator[Metric]:
        """Yield the parts' own figures, read at each scrape (Prometheus' collector protocol)."""
        link: dict[str, Any] = self.link.report()
        for name, text, value in self._levels(link):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)
        for name, text, count in self._counts(link):
            yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=count)
        problems = GaugeMetricFamily(f"{_PREFIX}_problems", "Open problems.", labels=["kind"])
        for kind, number in sorted(Counter(problem.kind for problem in self.all_problems()).items()):
            problems.add_metric([kind], number)
        state = GaugeMetricFamily(
            f"{_PREFIX}_link_state", "1 for the state the link is in.", labels=["state"]
        )
        for each in LinkState:
            state.add_metric([each.value], float(each is self.link.state))
        refusals = CounterMetricFamily(
            f"{_PREFIX}_link_refusals", "Connections and joins turned away.", labels=["reason"]
        )
        for reason, number in link["refusals"].items():
            refusals.add_metric([reason], number)
        patches = CounterMetricFamily(
            f"{_PREFIX}_patches", "Changes that came as splices, by what became of them.", labels=["outcome"]
        )
        for outcome in PatchOutcome:
            patches.add_metric([outcome.value], self.sync.patches.outcomes[outcome])
        yield from (problems, state, refusals, patches)
        if self.shadow is not None:
            yield from self.shadow.collect()

    def _levels(self, link: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
        """Figures that go up and down, without labels: name, what it says, value."""
        yield "revision", "Everything up to this revision is on disk.", self.sync.tree.cursor.revision
        yield "head_revision", "The highest revision heard of.", self.sync.head_revision
        yield "pending_files", "Paths waiting for content by reference.", len(self.sync.pending_paths)
        queued = self.sync.queue_depth + link["queue_depth"]
        yield "queue_depth", "Events received and not yet applied.", queued
        if (skew := self._skew_bounds()) is not None:
            yield (
                "clock_skew_seconds",
                "The orchestrator's clock minus ours, as the lag is corrected for; absent until it has answered.",
                skew.estimate,
            )
            yield (
                "clock_skew_uncertainty_seconds",
                "The most by which the skew, and so the lag, may be wrong.",
                skew.uncertainty,
            )
        if self.stalls is not None:
            yield (
                "loop_stall_seconds",
                "The longest time in the last five minutes for which the event loop did nothing else.",
                self.stalls.recent(),
            )

    def _counts(self, link: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
        """Figures that only go up, without labels: name, what it says, count."""
        yield "clock_jumps", "Suspensions and clock steps noticed.", link["clock_jumps"]
        yield (
            "patches_saved_bytes",
            "Bytes of content that were made from splices and did not travel.",
            self.sync.patches.saved_bytes,
        )
        yield (
            "watch_renewals",
            "Times the watch over the project was made again: a name that is not UTF-8, or too many at once.",
            self.sync.watch_renewals,
        )
        yield (
            "log_lines_dropped",
            "Lines of the log that whoever reads it did not take, or the disk did not.",
            self.lines.dropped if self.lines is not None else 0,
        )

    def _skew_bounds(self) -> Bounds | None:
        return self.skew.bounds(Moment(time.time(), time.monotonic()))

    def _clock(self) -> Mapping[str, object] | None:
        """Say what is known of the orchestrator's clock; None before its first answer."""
        known = self._skew_bounds()
        if known is None:
            return None
        return {
            "skew_seconds": round(known.estimate, 4),
            "uncertainty_seconds": round(known.uncertainty, 4),
            "at_least_seconds": round(known.low, 4),
            "at_most_seconds": round(known.high, 4),
            "answers": known.answers,
            "resets": self.skew.resets,
        }

    def _link_down_for(self) -> float:
        if self.link.state is LinkState.LIVE:
            return 0.0
        return time.time() - self.link.since

    def all_problems(self) -> list[Problem]:
        api = self.catch_up.api
        return [
            *self.problems.open.values(),
            *(api.problems() if api is not None else ()),
            *self.link.problems(),
            *self.dev.problems(),
            *self.screen.problems(ready=self.dev.ready),
            *self.run_settings.problems(),
        ]

    def _shown(self, problems: Iterable[Problem]) -> list[dict[str, str | bool | None]]:
        """Write problems as they travel, without secrets."""

        def clean(text: str | None) -> str | None:
            return text and self.redactor.text(text)

        return [
            {
                "kind": problem.kind,
                "rule": clean(problem.rule),
                "file_path": clean(problem.path),
                "detail": clean(problem.detail),
                **({"waiting": True} if problem.waiting else {}),
            }
            for problem in problems
        ]
