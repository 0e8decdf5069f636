"""Every fault of `schedule`, made for real: signals, cut sockets, a killed database, a file changed behind our back.

`strike` comes back when the fault is over, with one sentence of what was done. Faults overlap as they happen to; what
is taken down for a while is brought back by who took it down.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
import psutil
import psycopg

from soak.hostile import Hostile
from soak.program import CannotRun, Program
from soak.schedule import Fault, Kind
from soak.stack import Stack

CODES = (1000, 1001, 1012)
"""Of a socket that is closed in order."""

REFUSALS = ((429, "Too many connected users"), (401, "Unauthorized"), (503, "not now"))

BACKENDS = (
    "select pid from pg_stat_activity"
    " where backend_type = 'client backend' and pid <> pg_backend_pid() and datname is not null"
)


class Faults:
    """Strikes the stack. `projects` gives a project's id by its number."""

    def __init__(self, stack: Stack, projects: Mapping[int, UUID], seed: int) -> None:
        self._stack = stack
        self._projects = projects
        self._dice = random.Random(f"details {seed}")
        self.drifted: dict[int, set[str]] = defaultdict(set)
        """By agent: files that were changed or removed in its tree. The next save of them heals it."""
        self.strays: dict[int, set[str]] = defaultdict(set)
        """By agent: files in its tree that are nobody's. They stay."""
        self._locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def strike(self, fault: Fault) -> str:
        """Do it; what was done. Whatever is away already, is away: that is said too."""
        try:
            return await self._strike(fault)
        except (httpx.HTTPError, psycopg.Error, psutil.Error, OSError) as error:
            return f"could not: {type(error).__name__}"

    async def clear(self) -> None:
        """No setting of the realtime server stays."""
        for _ in range(60):
            with suppress(httpx.HTTPError):
                if (await self._stack.http.delete("/realtime/v1/faults")).is_success:
                    return
            await asyncio.sleep(0.5)
        raise CannotRun("the stand-in's faults cannot be cleared")

    async def _strike(self, fault: Fault) -> str:
        where = {} if fault.wide else {"topic": f"project:{self._projects[fault.project]}"}
        whose = "all" if fault.wide else f"project {fault.project}"
        match fault.kind:
            case Kind.EVENTS_DROPPED:
                await self._post(drop=fault.count)
                return f"the next {fault.count}"
            case Kind.EVENTS_DOUBLED:
                await self._post(duplicate=fault.count)
                return f"the next {fault.count}"
            case Kind.EVENTS_REORDERED:
                await self._post(reorder=fault.count + 1)
                return f"the next {fault.count + 1}"
            case Kind.SOCKETS_CUT:
                await self._post(action="abort", **where)
                return whose
            case Kind.SOCKETS_CLOSED:
                code = CODES[fault.count % len(CODES)]
                await self._post(action="close", code=code, **where)
                return f"{whose}, {code}"
            case Kind.CHANNELS_CRASHED:
                await self._post(action="crash", **where)
                return whose
            case Kind.TOKENS_EXPIRED:
                await self._post(action="expire_tokens", **where)
                return whose
            case Kind.RATE_LIMITED:
                await self._post(action="rate_limit", **where)
                return whose
            case Kind.HUGE_FRAME:
                await self._post(action="oversize", size=fault.count * 1_000_000, **where)
                return f"{whose}, {fault.count} MB"
            case Kind.BLACKOUT:
                await self._post(blackout=fault.seconds)
                await asyncio.sleep(fault.seconds)
                return f"{fault.seconds:.1f} s"
            case Kind.HANDSHAKES_REFUSED:
                status, error = REFUSALS[fault.count % len(REFUSALS)]
                await self._post(refuse=fault.count, refuse_status=status, refuse_error=error)
                await self._post(action="abort", **where)
                return f"{fault.count} with {status}, {whose} cut"
            case Kind.JOINS_SLOW:
                return await self._while(fault, {"join_delay": 2.0}, {"join_delay": 0}, **where)
            case Kind.JOINS_MUTE:
                return await self._while(fault, {"mute_joins": True}, {"mute_joins": False}, **where)
            case Kind.HEARTBEATS_MUTE:
                await self._post(mute_heartbeats=True)
                await asyncio.sleep(fault.seconds * 5)
                await self._post(mute_heartbeats=False)
                return f"{fault.seconds * 5:.1f} s"
            case Kind.AGENT_KILLED:
                process = self._agent(fault.agent)
                process.kill()
                return f"agent {fault.agent}, process {process.pid}"
            case Kind.AGENT_SUSPENDED:
                process = self._agent(fault.agent)
                process.suspend()
                try:
                    await asyncio.sleep(fault.seconds * 2)
                finally:
                    with suppress(psutil.Error):
                        process.resume()
                return f"agent {fault.agent}, {fault.seconds * 2:.1f} s"
            case Kind.MACHINE_REPLACED:
                await self._stack.replace(self._stack.sessions[fault.agent])
                return f"agent {fault.agent}, generation {self._stack.sessions[fault.agent].generation}"
            case Kind.DEV_SERVER_KILLED:
                family = await asyncio.to_thread(self._agent(fault.agent).children, recursive=True)
                if not family:
                    return f"agent {fault.agent} had none"
                victim = self._dice.choice(family)
                victim.kill()
                return f"agent {fault.agent}, process {victim.pid}"
            case Kind.DRIFT:
                return await asyncio.to_thread(self._drift, fault.agent)
            case Kind.PROJECT_HOSTILE:
                return await self._hostile(fault)
            case Kind.DISK_FULL:
                return await self._without_room(fault, self._stack.disk.fill)
            case Kind.NO_INODES:
                return await self._without_room(fault, self._stack.disk.use_up_inodes)
            case Kind.CLOCK_JUMPED:
                return await self._jump(fault)
            case Kind.HISTORY_REPLACED:
                await self._stack.rows("select public.new_project_epoch(%s)", self._projects[fault.project])
                return f"project {fault.project}"
            case Kind.PROJECT_DELETED:
                return await self._stack.delete_one_more(fault.count)
            case Kind.CONNECTIONS_KILLED:
                rows = await self._stack.rows(f"select pg_terminate_backend(pid) from ({BACKENDS}) open")
                return f"{len(rows)} connections"
            case Kind.DATABASE_CRASHED:
                rows = await self._stack.rows(BACKENDS)
                if not rows:
                    return "nobody was connected"
                os.kill(rows[0]["pid"], signal.SIGKILL)
                return f"one of {len(rows)} backends got SIGKILL"
            case Kind.ORCHESTRATOR_RESTARTED:
                return await self._away(self._stack.orchestrator, self._stack.orchestrator.stop, fault)
            case Kind.ORCHESTRATOR_KILLED:
                return await self._away(self._stack.orchestrator, self._stack.orchestrator.kill, fault)
            case Kind.SUPABASE_KILLED:
                return await self._away(self._stack.supabase, self._stack.supabase.kill, fault)

    async def _post(self, **body: Any) -> None:
        (await self._stack.http.post("/realtime/v1/faults", json=body)).raise_for_status()

    async def _while(self, fault: Fault, on: dict[str, Any], off: dict[str, Any], **where: Any) -> str:
        """A setting for a while, and sockets cut in it, so that it is met."""
        await self._post(**on)
        await self._post(action="abort", **where)
        await asyncio.sleep(fault.seconds)
        await self._post(**off)
        return f"{fault.seconds:.1f} s"

    async def _away(self, program: Program, end: Callable[[], Awaitable[object]], fault: Fault) -> str:
        async with self._locks[program.name]:
            pid = program.pid
            await end()
            await asyncio.sleep(fault.seconds)
            await program.start()
        return f"process {pid}, {fault.seconds:.1f} s away"

    async def _hostile(self, fault: Fault) -> str:
        """Its files are saved anew at the next check, as after drift."""
        hostile = Hostile(self._stack.tree(fault.agent), random.Random(f"hostile {fault.at}"))
        try:
            done = await asyncio.to_thread(hostile.act, fault.seconds)
        finally:
            self.drifted[fault.agent] |= hostile.touched
        return f"agent {fault.agent}, {done} acts in {fault.seconds:.1f} s"

    async def _without_room(self, fault: Fault, use_up: Callable[[], str | None]) -> str:
        """The machines' disk has no space, or no inode, for a while."""
        async with self._locks["disk"]:
            if (why := await asyncio.to_thread(use_up)) is not None:
                return f"could not: {why}"
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                await asyncio.to_thread(self._stack.disk.clear)
        return f"{fault.seconds:.1f} s, all machines"

    async def _jump(self, fault: Fault) -> str:
        """The wall clock of one agent's machine, or of all, jumps by minutes and comes back (`soak.agent`)."""
        by = (fault.seconds + 5) * 60 * self._dice.choice((1, -1))
        whose = list(self._stack.sessions) if fault.wide else [fault.agent]
        async with self._locks["clock"]:
            for number in whose:
                self._stack.set_clock(number, by)
            try:
                await asyncio.sleep(fault.seconds * 4)
            finally:
                for number in whose:
                    self._stack.set_clock(number, 0)
        return (
            f"{'all' if fault.wide else f'agent {fault.agent}'}, {by:+.0f} s, for {fault.seconds * 4:.1f} s"
        )

    def _agent(self, number: int) -> psutil.Process:
        process = self._stack.process(number)
        if process is None:
            raise psutil.NoSuchProcess(0)
        return process

    def _drift(self, number: int) -> str:
        """Change, remove or add a file in an agent's tree, as something else in the container would."""
        tree = self._stack.tree(number)
        files = sorted(path for path in (tree / "src" / "features").rglob("*.js") if path.is_file())
        if not files:
            return f"agent {number} has no file to change"
        path = self._dice.choice(files)
        name = str(path.relative_to(tree))
        match self._dice.randrange(3):
            case 0:
                path.write_text("changed inside the container\n")
                what = "changed"
            case 1:
                path.unlink()
                what = "removed"
            case _:
                name = f"stray-{len(self.strays[number])}.log"
                (tree / name).write_text("not the project's\n")
                self.strays[number].add(name)
                return f"agent {number}: {name} added"
        self.drifted[number].add(name)
        return f"agent {number}: {name} {what}"
