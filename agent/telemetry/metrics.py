"""Declares the agent's metrics. None carries a project, session or path: Fly keeps every label it ever saw."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

from agent.telemetry.timeline import StartTimeline

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of the histograms, in seconds: from one rename to a machine that slept through five minutes."""

_PREFIX = "preview_agent"


class Metrics:
    """Every metric of the agent, on a registry of its own. What the parts know is read at the scrape (`Report`)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.start = StartTimeline()
        ProcessCollector(registry=self.registry, namespace=_PREFIX)
        PlatformCollector(registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"{_PREFIX}_{name}", text, registry=self.registry, buckets=SHORT)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

        self.event_lag = histogram("event_lag_seconds", "From the commit in the database to the last rename.")
        self.apply = histogram("apply_seconds", "From the decision to the last rename of one batch.")
        self.hydrate = histogram("hydrate_seconds", "From asking for a snapshot to its promotion.")
        self.snapshot_build = histogram("snapshot_build_seconds", "What building took, as the manifest says.")
        self.session_start = gauge("session_start_seconds", "From the start of the process to ready.")
        self.shown = histogram("shown_seconds", "From the commit in the database to the paint in a browser.")
        self.gate = histogram("gate_seconds", "What the dev server took for the changes of one revision.")
        self.preview_errors = gauge("preview_errors", "Open errors of the preview.", "kind")
        self.preview_observed = gauge("preview_observed", "1 while the dev server's plugin reports.")
        self.events = counter("events_total", "Events by what became of them.", "event", "outcome")
        self.resyncs = counter("resyncs_total", "Catch-ups by what made them necessary.", "reason")
        self.coalesced = counter("coalesced_total", "Writes that a newer one of the same path made needless.")
        self.write_back = counter("write_back_total", "What tools made, by what became of it.", "outcome")
        self.installs = counter("installs_total", "Dependency installs.", "result")
        self.modules = counter("modules_total", "Dependency layers by what became of them.", "outcome")
        self.modules_seconds = histogram("modules_seconds", "From asking for a layer to its files in place.")
        self.dev_server_restarts = counter("dev_server_restarts_total", "Dev server restarts.", "reason")
        self.problems_opened = counter(
            "problems_opened_total", "Problems opened, also those that closed between two scrapes.", "kind"
        )
        self.agent_errors = counter(
            "agent_errors_total", "Bugs that were contained, by the agent's part.", "part"
        )
        self.drift_files = gauge("drift_files", "Files changed by something else inside the container.")
        self.dev_server_state = gauge("dev_server_state", "1 for the state the dev server is in.", "state")


def show_state(gauge: Gauge, states: Iterable[str], current: str) -> None:
    """Set a state gauge: 1 for `current`, 0 for every other of `states`."""
    for state in states:
        gauge.labels(state).set(1.0 if state == current else 0.0)
