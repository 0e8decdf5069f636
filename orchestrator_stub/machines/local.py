"""The `local` driver: a machine is a process, `preview-agent run`, with a directory of its own.

    ROOT/{session}                  a link to ROOT/of-projects/{project}.{number}, the first that no session has
    ROOT/{session}/machine.json     which process this is: name, pid, its start time, its ports
    ROOT/{session}/project          PROJECT_DIR
    ROOT/{session}/state            STATE_DIR: the ledger, which the session's next machine goes on from
    ROOT/{session}/.preview-sync    staging
    ROOT/{session}/agent.log        what the agent and the dev server said

The directory is the session's, like a volume on Fly: one machine of the session has it at a time, so making a
newer generation stops the older. Its path is what the project's last session had, as in a container: Vite bundles
dependencies anew where a project is in another directory. Like Fly with `restart: on-failure`, an agent that ends with
an error is started again with the environment it was born with, at most ten times. A process is known by pid *and*
start time, so a pid that was given to somebody else is never signalled; and because all is on disk, another
orchestrator, or this one after a crash, finds and ends the machines of the first.
"""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Final
from uuid import UUID

import structlog

from orchestrator_stub.machines.driver import (
    Machine,
    MachineRefused,
    MachineSpec,
    MachineState,
    mark_of,
    owner_of,
)
from orchestrator_stub.machines.processes import Record, alive, birth, freeze, frozen, kill_strays, stop, thaw

log = structlog.get_logger("machines.local")

INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME")
"""All that an agent sees of our own environment: where programs are, and how text is written."""

ALLOCATOR: Final = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
"""How much free memory glibc keeps for an agent's next event: what `entrypoint.sh` sets in the image, and why."""

RESTARTS: Final = 10
"""As Fly: `restart.policy on-failure` gives up after ten."""

HEALTHY: Final = 30.0
"""Seconds of life after which earlier failures are forgotten."""

RESTART_DELAY: Final = 0.5
"""Seconds, doubled at each restart up to 8 s."""

PR_SET_PDEATHSIG: Final = 1

PLACES: Final = "of-projects"
"""Where the sessions' directories are, each by its project."""
SLOTS: Final = 1_000
"""Directories of one project; a session for which none is left has one of its own."""

PORT_TRIES: Final = 1_000
"""Each is a port at random out of some 14,000 on Linux: all of them another machine's means that none is left."""

NOT_STARTED: Final = 0
"""The pid of a record whose process is about to be made: nobody's."""

FINAL_EXITS: Final = frozenset({0, 64})
"""Asked to stop, and bad settings: starting again with the same environment cannot help."""


class LocalMachines:
    """Runs machines as processes below `root`. `host` is what they listen on.

    `command` is the agent's; `dev_port` the port preferred for the preview, taken when it is free;
    `environment` what the inherited variables are read from. `on_start` is told each process that starts, with its
    pid; `on_exit` each that ended by itself, with its exit code (minus the signal's number). `tied`: the machines
    are asked to stop when this process disappears (Linux), however it does.
    """

    kind = "local"

    def __init__(
        self,
        root: Path,
        *,
        environment: Mapping[str, str],
        command: tuple[str, ...] = (sys.executable, "-P", "-m", "agent", "run"),
        host: str = "127.0.0.1",
        dev_port: int | None = None,
        restarts: int = RESTARTS,
        tied: bool = False,
        on_start: Callable[[Machine, int], None] | None = None,
        on_exit: Callable[[Machine, int], None] | None = None,
    ) -> None:
        self._root = root.absolute()
        self._environment = {name: environment[name] for name in INHERITED if name in environment}
        self._command = command
        self._host = host
        self._dev_port = dev_port
        self._restarts = restarts
        self._tied = tied
        self._on_start = on_start
        self._on_exit = on_exit
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[UUID, asyncio.Lock] = {}
        self._given: dict[UUID, frozenset[int]] = {}

    async def create(self, spec: MachineSpec) -> Machine:
        async with self._lock(spec.session_id):
            directory = self._directory(spec.session_id)
            record = _read(directory)
            if record is not None and _of_another(record, spec):
                raise MachineRefused(
                    f"{directory} belongs to {record.name}, a machine of another installation"
                )
            if record is not None and record.name == spec.name and alive(record):
                await asyncio.to_thread(thaw, record)
                return self._machine(record)
            if record is not None:
                await self._end(record, directory)
            try:
                directory = self._make(spec)
                (directory / "project").mkdir(parents=True, exist_ok=True)
                (directory / "state").mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise MachineRefused(f"cannot make the machine's directory {directory}: {error}") from None
            image = _image(spec)
            dev_port, health_port = self._give_ports(spec.session_id, record)
            own = self._own_settings(directory, dev_port, health_port)
            env = {**self._environment, **ALLOCATOR, **image, **spec.env, **own}
            process, record = await self._start(directory, spec.name, env, dev_port, health_port)
            self._keepers[spec.name] = asyncio.create_task(
                self._keep(process, record, directory, env), name=f"keep {spec.name}"
            )
            return self._machine(record)

    async def inspect(self, machine_id: str) -> Machine | None:
        owner = owner_of(machine_id)
        record = _read(self._directory(owner[0])) if owner else None
        return self._machine(record) if record is not None and record.name == machine_id else None

    async def find(self, session_id: UUID) -> builtins.list[Machine]:
        record = _read(self._directory(session_id))
        return [self._machine(record)] if record is not None else []

    async def list(self) -> builtins.list[Machine]:
        return [self._machine(record) for record in self._records()]

    async def destroy(self, machine_id: str) -> None:
        """End the machine and remove its directory."""
        await self.retire(machine_id)
        owner = owner_of(machine_id)
        if owner is None:
            return
        async with self._lock(owner[0]):
            directory = self._directory(owner[0])
            record = _read(directory)
            if record is not None and record.name == machine_id:
                await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
                self._link(owner[0]).unlink(missing_ok=True)
                with suppress(OSError):  # others have theirs there
                    (self._root / PLACES).rmdir()
            if record is None or record.name == machine_id:
                self._given.pop(owner[0], None)

    async def suspend(self, machine_id: str) -> None:
        """Freeze the agent and all that it started."""
        owner = owner_of(machine_id)
        if owner is None:
            return
        async with self._lock(owner[0]):
            record = _read(self._directory(owner[0]))
            if record is not None and record.name == machine_id:
                await asyncio.to_thread(freeze, record)

    async def resume(self, machine_id: str) -> bool:
        owner = owner_of(machine_id)
        if owner is None:
            return False
        async with self._lock(owner[0]):
            record = _read(self._directory(owner[0]))
            known = record is not None and record.name == machine_id
            return record is not None and known and await asyncio.to_thread(thaw, record)

    async def retire(self, machine_id: str) -> None:
        """End the machine's processes but keep its directory, for the session's next machine to go on from."""
        owner = owner_of(machine_id)
        if owner is None:
            return
        async with self._lock(owner[0]):
            directory = self._directory(owner[0])
            record = _read(directory)
            if record is not None and record.name == machine_id:
                await self._end(record, directory)

    async def close(self) -> None:
        """Stop keeping the machines; their processes live on."""
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        self._keepers.clear()

    def log_path(self, machine_id: str) -> Path | None:
        """Where the machine's output goes."""
        owner = owner_of(machine_id)
        return self._directory(owner[0]) / "agent.log" if owner else None

    def project_dir(self, session_id: UUID) -> Path:
        """Where the session's machine keeps the project's files."""
        return self._directory(session_id) / "project"

    def _records(self) -> builtins.list[Record]:
        try:
            directories = sorted(self._root.iterdir())
        except FileNotFoundError:
            return []
        return [record for directory in directories if (record := _read(directory)) is not None]

    def _directory(self, session_id: UUID) -> Path:
        """Where the session's directory is: agents take no path that has a link in it."""
        link = self._link(session_id)
        return link.resolve() if link.is_symlink() else link

    def _link(self, session_id: UUID) -> Path:
        return self._root / str(session_id)

    def _make(self, spec: MachineSpec) -> Path:
        """Make the session's directory, if it has none: the project's first that is nobody's. Raises `OSError`."""
        link = self._link(spec.session_id)
        for number in range(SLOTS):
            if os.path.lexists(link):
                break
            place = self._root / PLACES / f"{spec.project_id}.{number}"
            try:
                place.mkdir(parents=True)
            except FileExistsError:
                continue  # another session's, or what one left that ended in between
            link.symlink_to(place.relative_to(self._root))
        return self._directory(spec.session_id)

    def _lock(self, session_id: UUID) -> asyncio.Lock:
        return self._locks.setdefault(session_id, asyncio.Lock())

    def _give_ports(self, session_id: UUID, record: Record | None) -> tuple[int, int]:
        """Ports for the preview and for health: those that the session had, if they are free.

        Nobody listens on a port between here and the agent's start, or while a dev server is down: those of the other
        machines are left alone whether they are in use or not.
        """
        others = {port for session, ports in self._given.items() if session != session_id for port in ports}
        for each in self._records():
            if each.name != (record and record.name) and alive(each):
                others.update((each.dev_port, each.health_port))
        dev_port = free_port(self._host, record.dev_port if record else self._dev_port, others)
        health_port = free_port(self._host, record.health_port if record else None, {*others, dev_port})
        self._given[session_id] = frozenset((dev_port, health_port))
        return dev_port, health_port

    def _own_settings(self, directory: Path, dev_port: int, health_port: int) -> dict[str, str]:
        return {
            "PROJECT_DIR": str(directory / "project"),
            "STATE_DIR": str(directory / "state"),
            "STAGING_DIR": str(directory / ".preview-sync"),
            "DEV_HOST": self._host,
            "DEV_PORT": str(dev_port),
            "HEALTH_HOST": self._host,
            "HEALTH_PORT": str(health_port),
            "LOG_FORMAT": "json",
        }

    async def _start(
        self, directory: Path, name: str, env: Mapping[str, str], dev_port: int, health_port: int
    ) -> tuple[asyncio.subprocess.Process, Record]:
        # Before the process: one whose orchestrator is killed in between has a record, and is found by its directory.
        _write(directory, Record(name, NOT_STARTED, 0.0, time.time(), dev_port, health_port))
        output = os.open(
            directory / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=directory,
                env=dict(env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_parent() if self._tied else None,
            )
        except OSError as error:
            raise MachineRefused(f"cannot start {self._command[0]}: {error}") from None
        finally:
            os.close(output)
        record = Record(name, process.pid, birth(process.pid), time.time(), dev_port, health_port)
        _write(directory, record)
        log.info("machine.started", machine=name, pid=process.pid)
        if self._on_start is not None:
            self._on_start(self._machine(record), process.pid)
        return process, record

    async def _keep(
        self, process: asyncio.subprocess.Process, record: Record, directory: Path, env: Mapping[str, str]
    ) -> None:
        """Start the agent again when it ends with an error."""
        failures = 0
        while True:
            code = await process.wait()
            log.info("machine.exited", machine=record.name, exit_code=code)
            if self._on_exit is not None:
                self._on_exit(self._machine(record), code)
            await asyncio.to_thread(kill_strays, directory)
            failures = 1 if time.time() - record.started > HEALTHY else failures + 1
            if code in FINAL_EXITS or failures > self._restarts:
                return
            await asyncio.sleep(min(RESTART_DELAY * 2 ** (failures - 1), 8.0))
            process, record = await self._start(
                directory, record.name, env, record.dev_port, record.health_port
            )

    async def _end(self, record: Record, directory: Path) -> None:
        """SIGTERM to the agent, SIGKILL to whatever is left of the machine after the grace."""
        keeper = self._keepers.pop(record.name, None)
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        record = _read(directory) or record
        await asyncio.to_thread(stop, record)
        await asyncio.to_thread(kill_strays, directory)

    def _machine(self, record: Record) -> Machine:
        keeper = self._keepers.get(record.name)
        running = alive(record) or (keeper is not None and not keeper.done())
        state = MachineState.RUNNING if running else MachineState.STOPPED
        if frozen(record):
            state = MachineState.SUSPENDED
        return Machine(
            driver=self.kind,
            id=record.name,
            name=record.name,
            state=state,
            created_at=record.created_at,
            preview_url=f"http://{self._host}:{record.dev_port}",
            health_url=f"http://{self._host}:{record.health_port}",
        )


def _end_with_parent() -> Callable[[], None] | None:
    """SIGTERM to the agent when the thread that started it is gone. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def arrange() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    return arrange


def free_port(host: str, preferred: int | None = None, others: Container[int] = ()) -> int:
    """`preferred` when nothing listens there, else a port that was free a moment ago; none of `others`.

    RACE: another program may take the port before the agent does. A dev server then fails its start and is started
    again; an agent ends with 64 and a line that names HEALTH_PORT.
    """
    for port in chain((preferred,) if preferred else (), repeat(0, PORT_TRIES)):
        if port in others:
            continue
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                continue
            found = int(probe.getsockname()[1])
            if found not in others:
                return found
    raise MachineRefused(f"no free port on {host}")


def _read(directory: Path) -> Record | None:
    try:
        return Record(**json.loads((directory / "machine.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _of_another(record: Record, spec: MachineSpec) -> bool:
    """Whether the session's directory is another installation's: both know the session when one database is a copy."""
    owner = owner_of(record.name)
    return owner is not None and owner.mark not in (None, mark_of(spec.installation))


def _image(spec: MachineSpec) -> dict[str, str]:
    """What makes the agent's interpreter run another agent: here an image is a directory with the package `agent`."""
    if spec.image is None:
        return {}
    if not (Path(spec.image) / "agent" / "__init__.py").is_file():
        raise MachineRefused(f"cannot make {spec.name}: no package `agent` in {spec.image}")
    return {"PYTHONPATH": spec.image}


def _write(directory: Path, record: Record) -> None:
    draft = directory / "machine.json.new"
    draft.write_text(json.dumps(asdict(record)))
    draft.rename(directory / "machine.json")
