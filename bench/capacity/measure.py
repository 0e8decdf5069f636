"""Reads what a process has used: processor time in nanoseconds, memory, and how much log the database wrote."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import psycopg


@dataclass(frozen=True, slots=True)
class Reading:
    """What was used since the beginning. `cpu` in seconds and `memory` in bytes, by process; `wal` in bytes."""

    at: float
    cpu: Mapping[str, float]
    memory: Mapping[str, int]
    wal: int


@dataclass(frozen=True, slots=True)
class Used:
    """What was used between two readings, `seconds` apart."""

    seconds: float
    cpu: Mapping[str, float]
    wal: int

    @classmethod
    def between(cls, before: Reading, after: Reading) -> Used:
        cpu = {name: after.cpu[name] - before.cpu[name] for name in after.cpu}
        return cls(after.at - before.at, cpu, after.wal - before.wal)


def read(pids: Mapping[str, int], connection: psycopg.Connection[tuple[object, ...]]) -> Reading:
    """What those processes have used, each with its descendants."""
    cpu, memory = {}, {}
    for name, pid in pids.items():
        family = [pid]
        with suppress(psutil.Error):
            family += [child.pid for child in psutil.Process(pid).children(recursive=True)]
        cpu[name] = sum(map(_cpu, family)) + _of_the_dead(pid)
        memory[name] = sum(map(_memory, family))
    found = connection.execute("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::int8").fetchone()
    assert found is not None
    assert isinstance(found[0], int)
    return Reading(time.monotonic(), cpu, memory, found[0])


def _cpu(pid: int) -> float:
    """Seconds of all threads of a process; the scheduler counts nanoseconds."""
    spent = 0
    with suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError, ValueError):
                spent += int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0])
    return spent / 1e9


def _of_the_dead(pid: int) -> float:
    """Seconds of the children that ended and were waited for, such as an autovacuum's."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _memory(pid: int) -> int:
    """Bytes, what is shared by several divided among them."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
