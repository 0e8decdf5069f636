"""Event names, metrics, logs, redaction: what the agent says of itself.

A log line is an event with fields: a dotted name, then keys. JSON unless somebody reads it on a terminal. Every
string that leaves goes through the redactor, which knows the secrets by value, not by the name of their field.
Metrics carry no project, session or path: Fly keeps every label it ever saw.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from agent.config import Settings
from agent.core.model import TraceParent

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds. From one rename to a machine that slept through five minutes."""

_PREFIX = "preview_agent"
_SIGNED = re.compile(r"(?i)([?&](?:token|apikey|sig|signature|x-(?:amz|goog)-[a-z-]+)=)[^&\s\"']+")
_JWT = re.compile(r"eyJ[A-Za-z0-9_-]+\.eyJ[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?")
"""Also one that was cut: an error that quotes at most so many characters must not end its disguise."""
_SECRET_KEY = re.compile(r"sb_secret_[A-Za-z0-9_-]+")
REDACTED = "[redacted]"


@dataclass(slots=True)
class Metrics:
    """Every metric of the agent, on a registry of its own."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    event_lag: Histogram = field(init=False)
    apply: Histogram = field(init=False)
    hydrate: Histogram = field(init=False)
    snapshot_build: Histogram = field(init=False)
    session_start: Gauge = field(init=False)
    events: Counter = field(init=False)
    resyncs: Counter = field(init=False)
    coalesced: Counter = field(init=False)
    installs: Counter = field(init=False)
    dev_server_restarts: Counter = field(init=False)
    problems_opened: Counter = field(init=False)
    drift_files: Gauge = field(init=False)
    dev_server_state: Gauge = field(init=False)

    def __post_init__(self) -> None:
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
        self.drift_files = gauge("drift_files", "Files changed by something else inside the container.")
        self.dev_server_state = gauge("dev_server_state", "1 for the state the dev server is in.", "state")


def show_state(gauge: Gauge, states: Iterable[str], current: str) -> None:
    """Set a state gauge: 1 for `current`, 0 for every other of `states`."""
    for state in states:
        gauge.labels(state).set(1.0 if state == current else 0.0)


class Redactor:
    """A structlog processor that takes secrets out of every string, however deep, whatever the key.

    Known secrets go by value; signed URLs, Supabase's secret keys and anything that looks like a JWT go by shape, for
    those that were minted after the start or should never have been here.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = {secret for secret in secrets if len(secret) >= 8}

    def add(self, secret: str) -> None:
        """From now on, this does not leave either."""
        if len(secret) >= 8:
            self._secrets.add(secret)

    def text(self, value: str) -> str:
        """`value` without secrets."""
        for secret in self._secrets:
            if secret in value:
                value = value.replace(secret, REDACTED)
        if "=" in value:
            value = _SIGNED.sub(rf"\1{REDACTED}", value)
        if "eyJ" in value:
            value = _JWT.sub(REDACTED, value)
        if "sb_secret_" in value:
            value = _SECRET_KEY.sub(REDACTED, value)
        return value

    def value(self, value: object) -> object:
        """Any JSON-like value without secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(each) for each in value]
        if value is None or isinstance(value, (int, float, bool)):
            return value
        return self.text(str(value))

    def __call__(self, logger: WrappedLogger, method: str, event_dict: EventDict) -> EventDict:
        return {key: self.value(each) for key, each in event_dict.items()}


def redactor_for(settings: Settings) -> Redactor:
    """A redactor that knows the secrets of the settings."""
    given = (settings.snapshot_url, settings.realtime_token, settings.realtime_api_key)
    return Redactor(secret.get_secret_value() for secret in given if secret is not None)


def configure_logs(settings: Settings, redactor: Redactor) -> None:
    """Set structlog up once, at the start of the process. Lines go to standard output."""
    console = settings.log_format == "console" or (settings.log_format == "auto" and sys.stdout.isatty())
    render: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), pad_event_to=24)
        if console
        else structlog.processors.JSONRenderer(sort_keys=False)
    )
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            *before,
            structlog.processors.format_exc_info,
            redactor,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module; only what they warn of is worth a line here, and no line passes by the
    # redactor.
    lines = logging.StreamHandler(sys.stdout)
    lines.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=before,
            processors=[_of_a_library, structlog.processors.format_exc_info, redactor, render],
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    # Both write addresses, and with them tokens, at their information level.
    for name in ("httpx", "httpcore", "websockets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(
        project_id=str(settings.project_id), session_id=str(settings.session_id)
    )


def _of_a_library(logger: WrappedLogger, method: str, event_dict: EventDict) -> EventDict:
    """A record of the standard module as one of our lines."""
    record: logging.LogRecord = event_dict.pop("_record")
    del event_dict["_from_structlog"]
    return {"event": "library.log", "logger": record.name, "said": event_dict.pop("event"), **event_dict}


def log_uncaught() -> None:
    """From now on, what nothing catches, in whatever thread, is a line like any other: `agent.bug`, and redacted."""
    log = get_logger("process")

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("agent.bug", exc_info=(kind, error, trace))

    def in_thread(told: threading.ExceptHookArgs) -> None:
        error = told.exc_value or told.exc_type()
        log.critical(
            "agent.bug",
            thread=told.thread.name if told.thread else None,
            exc_info=(told.exc_type, error, told.exc_traceback),
        )

    def unraisable(told: UnraisableHookArgs) -> None:
        error = told.exc_value or told.exc_type()
        log.error(
            "agent.bug",
            why=told.err_msg,
            where=repr(told.object),
            exc_info=(told.exc_type, error, told.exc_traceback),
        )

    sys.excepthook = uncaught
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable


def traced(trace: TraceParent | None) -> contextlib.AbstractContextManager[object]:
    """Every log line written meanwhile carries `trace_id`; nothing is done without a trace."""
    if trace is None:
        return contextlib.nullcontext()
    return structlog.contextvars.bound_contextvars(trace_id=trace.trace_id)


def process_age() -> float:
    """Seconds since this process was started by the system; where it does not say, since its interpreter was."""
    try:
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.process_time()


def get_logger(part: str) -> FilteringBoundLogger:
    """A logger whose lines say which part of the agent speaks."""
    logger: FilteringBoundLogger = structlog.get_logger(part=part)
    return logger
