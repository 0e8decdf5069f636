"""Where a save stands in its writer's trace: the W3C `traceparent` that an event may carry. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
"""W3C Trace Context, 3.2. A version after 00 may have more behind another dash."""


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The span that caused an event. Lower-case hex: 32 digits of the trace, 16 of the span, 2 of flags."""

    trace_id: str
    span_id: str
    flags: str = "00"

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"

    @property
    def sampled(self) -> bool:
        """Whether the writer records its part of the trace."""
        return bool(int(self.flags, 16) & 1)


def read_traceparent(value: object) -> TraceParent | None:
    """The parent that `value` names. None when there is none, or it is not a valid one: a trace is never worth an
    event.
    """
    if not isinstance(value, str):
        return None
    found = _FORM.fullmatch(value)
    if found is None:
        return None
    version, trace_id, span_id, flags, more = found.groups()
    if (
        version == "ff"
        or (version == "00" and more is not None)
        or not (int(trace_id, 16) and int(span_id, 16))
    ):
        return None
    return TraceParent(trace_id, span_id, flags)
