"""Configures the log, takes secrets out of every line, and hands out loggers.

A log line is an event with fields: a dotted name, then keys. JSON, unless somebody reads it on a terminal. The redactor
knows secrets by value and by shape, not by the name of the field they are in.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

from agent.config import Settings
from agent.core.model import TraceParent

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_SIGNED = re.compile(r"(?i)([?&](?:token|apikey|sig|signature|x-(?:amz|goog)-[a-z-]+)=)[^&\s\"']+")
_DOTTED = re.compile(r"[A-Za-z0-9_.-]+")
"""What a JWT is made of. It takes a run whole, whatever is in it: a pattern of the JWT itself is tried at each of its
characters, and one line of 4 KB of `eyJ…` took 7.6 ms."""
_SECRET_KEY = re.compile(r"sb_secret_[A-Za-z0-9_-]+")
REDACTED = "[redacted]"
MOST_RENEWED = 8
"""Renewed tokens that are known by value. Each is good for minutes, and each is searched in every line."""


class Redactor:
    """Takes secrets out of every string, however deep and whatever the key; a structlog processor.

    Known secrets are found by value; signed URLs, Supabase's secret keys and JWTs by shape, because they may have been
    minted after the start or should never have been here.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = {secret for secret in secrets if len(secret) >= 8}
        self._renewed: deque[str] = deque(maxlen=MOST_RENEWED)

    def add(self, secret: str) -> None:
        """Take out `secret` too from now on; one below 8 characters would blank ordinary words, and is not."""
        if len(secret) >= 8:
            self._secrets.add(secret)

    def add_renewed(self, token: str) -> None:
        """Take out `token` too, until `MOST_RENEWED` newer ones came: also where it is no JWT, or is only a part."""
        if len(token) >= 8 and token not in self._renewed:
            self._renewed.append(token)

    def text(self, value: str) -> str:
        """Return `value` without secrets."""
        for secret in (*self._secrets, *self._renewed):
            if secret in value:
                value = value.replace(secret, REDACTED)
        if "=" in value:
            value = _SIGNED.sub(rf"\1{REDACTED}", value)
        if "eyJ" in value:
            value = _DOTTED.sub(_without_jwt, value)
        if "sb_secret_" in value:
            value = _SECRET_KEY.sub(REDACTED, value)
        return value

    def value(self, value: object) -> object:
        """Return any JSON-like value without secrets."""
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


def _without_jwt(run: re.Match[str]) -> str:
    """Take a JWT out of a run of its characters: from a header to the end, for its claims may have been cut: an error
    that quotes at most so many characters must not end its disguise.
    """
    text = run[0]
    header = text.find("eyJ")
    return text if header < 0 or text.find(".eyJ", header) < 0 else text[:header] + REDACTED


def redactor_for(settings: Settings) -> Redactor:
    """Make a redactor that knows the secrets of the settings."""
    given = (
        settings.snapshot_url,
        settings.realtime_token,
        settings.nats_jwt,
        settings.realtime_api_key,
        settings.modules_parts,
    )
    return Redactor(secret.get_secret_value() for secret in given if secret is not None)


def configure_logs(settings: Settings, redactor: Redactor, file: TextIO | None = None) -> None:
    """Set structlog up, once, at the start of the process. Lines go through `redactor` to `file`, or to stdout."""
    file = file or sys.stdout
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
        processors=[*before, structlog.processors.format_exc_info, redactor, render],
        wrapper_class=structlog.make_filtering_bound_logger(settings.log_level),
        logger_factory=structlog.WriteLoggerFactory(file),
        cache_logger_on_first_use=False,
    )
    # Libraries log through the standard module: their warnings become lines, redacted like the others.
    lines = logging.StreamHandler(file)
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
    """Turn a record of the standard module into one of our lines."""
    record: logging.LogRecord = event_dict.pop("_record")
    del event_dict["_from_structlog"]
    return {"event": "library.log", "logger": record.name, "said": event_dict.pop("event"), **event_dict}


def log_uncaught() -> None:
    """Log what nothing catches, in any thread, as `agent.bug`: the interpreter's own traceback is not redacted."""
    log = get_logger("process")

    def bug(
        kind: type[BaseException], error: BaseException | None, trace: TracebackType | None, **fields: object
    ) -> None:
        log.critical("agent.bug", exc_info=(kind, error or kind(), trace), **fields)

    def in_thread(args: threading.ExceptHookArgs) -> None:
        bug(args.exc_type, args.exc_value, args.exc_traceback, thread=args.thread and args.thread.name)

    def unraisable(args: UnraisableHookArgs) -> None:
        bug(args.exc_type, args.exc_value, args.exc_traceback, why=args.err_msg, where=repr(args.object))

    sys.excepthook = bug
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable


def traced(trace: TraceParent | None) -> contextlib.AbstractContextManager[object]:
    """Add `trace_id` to every log line written meanwhile; does nothing without a trace."""
    if trace is None:
        return contextlib.nullcontext()
    return structlog.contextvars.bound_contextvars(trace_id=trace.trace_id)


def get_logger(part: str) -> FilteringBoundLogger:
    """Return a logger whose lines carry `part`."""
    logger: FilteringBoundLogger = structlog.get_logger(part=part)
    return logger
