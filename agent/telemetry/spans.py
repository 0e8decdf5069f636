"""Sends the agent's part of a distributed trace as OpenTelemetry spans, when a collector is configured.

The SDK is an extra (`pip install 'preview-sync[otel]'`) of some nine megabytes in memory, so it is imported only
when OTEL_EXPORTER_OTLP_ENDPOINT says where spans go. Its other OTEL_* variables work as its own documentation says;
none of them reaches the project's code.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote
from uuid import UUID

from agent import __version__
from agent.core.model import TraceParent
from agent.telemetry.logging import get_logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = get_logger("spans")

ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
HEADERS: Final = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
"""Where a collector's credentials are: the redactor has to know them."""

EXPORT_SECONDS: Final = "2"
"""For one export, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise; a collector is near, and spans may be lost."""

FLUSH_SECONDS: Final = 0.5
"""At the end, for what has not been sent: the rest of the grace belongs to the dev server."""

Attributes = Mapping[str, str | int | float | None]


class Spans:
    """Sends spans to a collector, in a thread of the SDK's own."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("preview-agent", __version__)

    def record(
        self, name: str, start: float, end: float, attributes: Attributes, parent: TraceParent | None = None
    ) -> None:
        """Record one span, from `start` to `end` in Unix seconds; leaves out attributes that are None."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {} if parent is None else {"traceparent": str(parent)}
        context = TraceContextTextMapPropagator().extract(carrier, Context())
        span = self._tracer.start_span(
            name,
            context,
            SpanKind.CONSUMER,
            {key: value for key, value in attributes.items() if value is not None},
            start_time=int(start * 1e9),
        )
        span.end(int(max(start, end) * 1e9))

    def close(self) -> None:
        """Send what is left, for at most `FLUSH_SECONDS`."""
        ending = threading.Thread(target=self._provider.shutdown, name="spans-shutdown", daemon=True)
        ending.start()
        ending.join(FLUSH_SECONDS)


def credentials(environ: Mapping[str, str]) -> list[str]:
    """List every value of the collector's headers, as given and as sent, and each pair whole, for the redactor."""
    found = []
    for name in HEADERS:
        for pair in environ.get(name, "").split(","):
            value = pair.partition("=")[2].strip()
            found += [pair.strip(), value, unquote(value)]
    return list(dict.fromkeys(text for text in found if text))


def open_spans(environ: Mapping[str, str], project_id: UUID, session_id: UUID) -> Spans | None:
    """Open the way to the collector that `environ` names, which must be the process's own; None: it names none."""
    if not environ.get(ENDPOINT):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as missing:
        log.error(
            "spans.unavailable",
            why=f"{ENDPOINT} is set and the OpenTelemetry SDK is not installed ({missing.name}); no spans are sent",
            remedy="pip install 'preview-sync[otel]', or unset the variable",
        )
        return None
    resource = {
        "service.version": __version__,
        "preview.project_id": str(project_id),
        "preview.session_id": str(session_id),
    }
    if not environ.get("OTEL_SERVICE_NAME"):
        resource["service.name"] = "preview-agent"
    timeout = environ.get("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT") or environ.get("OTEL_EXPORTER_OTLP_TIMEOUT")
    exporter = OTLPSpanExporter(timeout=float(timeout or EXPORT_SECONDS))
    provider = TracerProvider(resource=Resource.create(resource), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    log.info("spans.on", sdk=version("opentelemetry-sdk"))
    return Spans(provider)
