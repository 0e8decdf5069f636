"""Samples what the processes use, and how far behind the agents are, every few seconds, from outside.

Memory and descriptors come from the kernel, for each run of a process (a restart is another run of the same name). Lag
and counts come from each agent's `/metrics`, as a scraper sees them; a counter that begins again after a restart is
added up.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from soak.stack import Stack

PAGE = os.sysconf("SC_PAGE_SIZE")

LAG = "preview_agent_event_lag_seconds_bucket"
KEPT = ("preview_agent_events_total", "preview_agent_resyncs_total", "preview_agent_dev_server_restarts_total",
        "preview_agent_link_refusals_total", "preview_agent_coalesced_total")  # fmt: skip


@dataclass
class ProcessRun:
    """One process from its start to its end. `samples`: seconds of the soak, bytes of memory, descriptors."""

    role: str
    name: str
    pid: int
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def memory(self) -> list[tuple[float, float]]:
        return [(at, float(rss)) for at, rss, _ in self.samples]

    def descriptors(self) -> list[tuple[float, float]]:
        return [(at, float(count)) for at, _, count in self.samples]


@dataclass(frozen=True, slots=True)
class Tick:
    """One look at the fleet. `lags`: buckets of the events applied since the last look (upper bound, count)."""

    at: float
    lags: tuple[tuple[float, float], ...]
    behind: int
    """Agents whose revision is below the database's."""
    live: int
    """Agents that answered, with a live link."""
    dev_servers: int
    """Bytes of everything that the agents started."""


class Watch:
    """Looks. `at` in seconds since the soak began."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.lives: list[ProcessRun] = []
        self.ticks: list[Tick] = []
        self.totals: Counter[str] = Counter()
        self.lag_buckets: Counter[float] = Counter()
        self._current: dict[str, tuple[int, float, ProcessRun]] = {}
        self._counted: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
        self._http = httpx.AsyncClient(timeout=3, trust_env=False)

    async def look(self, at: float) -> None:
        """One tick."""
        processes: dict[str, tuple[str, psutil.Process]] = {}
        for number in self._stack.sessions:
            if (process := self._stack.process(number)) is not None:
                processes[f"agent {number}"] = ("agent", process)
        for program in self._stack.programs:
            if program.pid is not None:
                processes[program.name] = (program.name, psutil.Process(program.pid))
        for name, (role, process) in processes.items():
            self._measure(at, role, name, process)
        scrapes = await asyncio.gather(*(self._scrape(number) for number in self._stack.sessions))
        heads = {
            row["project_id"]: row["revision"]
            for row in await self._stack.rows("select project_id, revision from public.project_heads")
        }
        lags: Counter[float] = Counter()
        behind = live = 0
        for number, metrics in zip(self._stack.sessions, scrapes, strict=True):
            if metrics is None:
                behind += 1
                continue
            lags += self._take(number, metrics)
            behind += metrics.get("preview_agent_revision", -1) < heads.get(
                self._stack.sessions[number].project_id, 0
            )
            live += metrics.get('preview_agent_link_state{state="live"}', 0) == 1
        self.lag_buckets += lags
        agents = [process for name, (role, process) in processes.items() if role == "agent"]
        below = await asyncio.to_thread(_memory_below, agents)
        self.ticks.append(Tick(at, tuple(sorted(lags.items())), behind, live, below))

    def _measure(self, at: float, role: str, name: str, process: psutil.Process) -> None:
        try:
            born = process.create_time()
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE
            descriptors = len(os.listdir(f"/proc/{process.pid}/fd"))
        except (OSError, psutil.Error):
            return
        known = self._current.get(name)
        if known is None or known[:2] != (process.pid, born):
            known = self._current[name] = (process.pid, born, ProcessRun(role, name, process.pid))
            self.lives.append(known[2])
        known[2].samples.append((at, resident, descriptors))

    async def _scrape(self, number: int) -> Mapping[str, float] | None:
        record = self._stack.record(number)
        if record is None:
            return None
        try:
            answer = await self._http.get(f"http://127.0.0.1:{record.health_port}/metrics")
        except httpx.HTTPError:
            return None
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        found["pid"] = record.pid
        return found

    def _take(self, number: int, metrics: Mapping[str, float]) -> Counter[float]:
        """Add what the counters grew by; the lags of what was applied since."""
        before = self._counted[(f"agent {number}", int(metrics["pid"]))]
        grown: dict[str, float] = {}
        for name, value in metrics.items():
            if name.startswith((LAG, *KEPT)):
                grown[name] = value - before.get(name, 0.0)
                before[name] = value
        lags: Counter[float] = Counter()
        below = 0.0
        buckets = sorted((_bound(name), value) for name, value in grown.items() if name.startswith(LAG))
        for bound, value in buckets:
            if value > below:
                lags[bound] += value - below  # type: ignore[assignment]  # counts are whole numbers, sent as floats
            below = value
        for name, value in grown.items():
            if not name.startswith(LAG) and value:
                self.totals[name.removeprefix("preview_agent_")] += int(value)
        return lags

    def current(self, role: str) -> list[ProcessRun]:
        """The newest run of each process of a role."""
        return [life for _, _, life in self._current.values() if life.role == role]

    async def close(self) -> None:
        await self._http.aclose()


def quantile(buckets: Iterable[tuple[float, float]], share: float) -> float | None:
    """The quantile of a histogram given as (upper bound, count), linear within a bucket; None without samples."""
    ordered = sorted(buckets)
    total = sum(count for _, count in ordered)
    if not total:
        return None
    wanted, passed, below = share * total, 0.0, 0.0
    for bound, count in ordered:
        if passed + count >= wanted:
            if bound == float("inf"):
                return below
            return below + (bound - below) * (wanted - passed) / count
        passed, below = passed + count, bound
    return below


def _bound(name: str) -> float:
    return float(name.partition('le="')[2].partition('"')[0])


def _memory_below(agents: Iterable[psutil.Process]) -> int:
    total = 0
    for agent in agents:
        try:
            total += sum(child.memory_info().rss for child in agent.children(recursive=True))
        except psutil.Error:
            continue
    return total
