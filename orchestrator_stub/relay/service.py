"""Runs the relay: the database's outbox, emptied into NATS, inside `serve` or as `preview-orchestrator relay`.

Where the setting says `realtime` it only asks once a second whether that has changed.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final

import psycopg
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from orchestrator_stub.config import RelaySettings
from orchestrator_stub.relay.accounts import NatsKeys
from orchestrator_stub.relay.outbox import Outbox
from orchestrator_stub.relay.publisher import Lanes, NatsStream, Stream

log = structlog.get_logger("relay")

POLL_SECONDS: Final = 0.002
"""Between two looks into the outbox: half of it is added to each save's way, and it costs a tenth of a core. NOTIFY
would cost nothing here and a lock of the whole database at every commit."""

STANDBY_SECONDS: Final = 1.0
"""The same while events take the other way."""

BALANCE_SECONDS: Final = 0.5
"""How long the buckets of a relay that died lie idle at most."""

MEASURE_SECONDS: Final = 5.0

AGAIN_SECONDS: Final = 0.5
"""After the database was lost."""

OUTCOMES: Final = ("new", "duplicate", "retry", "dropped")

PREFIX: Final = "preview_orchestrator_"


class RelayMetrics:
    """One process's numbers of the relay; all of them 0 where none runs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.published = Counter(
            PREFIX + "relay_published",
            "Publications to NATS, by what came of them.",
            ["outcome"],
            registry=registry,
        )
        for outcome in OUTCOMES:
            self.published.labels(outcome)
        self.rows = Gauge(
            PREFIX + "outbox_rows", "Events on their way to NATS, of all relays.", registry=registry
        )
        self.age = Gauge(
            PREFIX + "outbox_age_seconds", "Since the oldest of them was saved.", registry=registry
        )
        self.buckets = Gauge(
            PREFIX + "relay_buckets",
            "Of 16, how many this relay owns; all relays together own 16.",
            registry=registry,
        )


class Relay:
    """One relay; any number of them share the work of one database."""

    def __init__(self, dsn: str, stream: Stream, metrics: RelayMetrics) -> None:
        """`dsn`: a direct or session-mode connection."""
        self._dsn = dsn
        self._stream = stream
        self._metrics = metrics

    async def run(self) -> None:
        """Relay until cancelled, over any loss of the database or of NATS."""
        try:
            await self._forever()
        finally:
            await self._stream.close()

    async def _forever(self) -> None:
        lost = False
        while True:
            try:
                outbox = await Outbox.open(self._dsn)
            except (psycopg.Error, OSError) as error:
                if not lost:
                    lost = True
                    log.warning("relay.database_lost", reason=_line(error))
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            lost = False
            lanes = Lanes(
                self._stream,
                may_publish=lambda outbox=outbox: outbox.certain,  # type: ignore[misc]
                done=outbox.done,
                count=lambda outcome: self._metrics.published.labels(outcome).inc(),
            )
            try:
                await self._relay(outbox, lanes)
            except (psycopg.Error, OSError) as error:
                log.warning("relay.database_lost", reason=_line(error))
            finally:
                # Before the locks go: what is on its way is the next owner's to publish, and the stream's to know.
                await lanes.close()
                self._metrics.buckets.set(0)
                with suppress(psycopg.Error, OSError):
                    await outbox.close()
            await asyncio.sleep(AGAIN_SECONDS)

    async def _relay(self, outbox: Outbox, lanes: Lanes) -> None:
        balance_at = measure_at = 0.0
        pause = STANDBY_SECONDS
        while True:
            now = time.monotonic()
            if now >= balance_at:
                balance_at = now + BALANCE_SECONDS
                await outbox.balance()
                self._metrics.buckets.set(len(outbox.owned))
                pause = STANDBY_SECONDS if await outbox.transport() == "realtime" else POLL_SECONDS
            if now >= measure_at:
                measure_at = now + MEASURE_SECONDS
                rows, age = await outbox.waiting()
                self._metrics.rows.set(rows)
                self._metrics.age.set(age)
            await outbox.delete_done()
            events = await outbox.read()
            for event in events:
                lanes.put(event)
            await asyncio.sleep(POLL_SECONDS if events or outbox.busy else pause)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def relay_of(settings: RelaySettings, keys: NatsKeys | None, registry: CollectorRegistry) -> Relay | None:
    """The relay that the settings name; None without NATS, and its numbers are there all the same."""
    metrics = RelayMetrics(registry)
    if settings.nats_url is None or keys is None:
        return None
    stream = NatsStream(settings.nats_url, keys, replicas=settings.nats_replicas)
    return Relay(settings.database_url.get_secret_value(), stream, metrics)
