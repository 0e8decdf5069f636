"""Declares the agent's metrics. None carries a project, session or path: Fly keeps every label it ever saw."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of the histograms, in seconds: from one rename to a machine that slept through five minutes."""

_PREFIX = "preview_agent"


class Metrics:
    """Every metric of the agent, on a registry of its own. What the parts know is read at the scrape (`Report`)."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.events = counter("events_total", "Events by what became of them.", "event", "outcome")
        self.resyncs = counter("resyncs_total", "Catch-ups by what made them necessary.", "reason")
        self.coalesced = counter("coalesced_total", "Writes that a newer one of the same path made needless.")
        self.installs = counter("installs_total", "Dependency installs.", "result")
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


def process_age() -> float:
    """Return the seconds since the system started this process; where it does not say, processor seconds used."""
    try:
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.process_time()
