"""The `container` driver: a machine is a container of the image of the Dockerfile, run by podman or docker.

The container's name is the machine's, which the engine keeps unique: making it twice is adopting it. The engine keeps
its ports, its state and its logs; nothing is kept here.
"""

from __future__ import annotations

import asyncio
import builtins
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from orchestrator_stub.machines.driver import (
    Machine,
    MachineRefused,
    MachineSpec,
    MachineState,
    MachineUnavailable,
    owner_of,
)

DEV_PORT: Final = 5173
HEALTH_PORT: Final = 9464
"""The agent's defaults, published on free ports of the host."""

LABEL: Final = "preview-sync.session"
INSTALLATION: Final = "preview-sync.installation"
"""For a person who filters by it; the control plane goes by the name."""

STOP_SECONDS: Final = 5
"""Above the agent's own STOP_GRACE of 4 s."""

COMMAND_SECONDS: Final = 60.0
"""For one call of the engine, an image pull left out: pull before, or creation is refused as too slow."""

MEMORY: Final = "1g"
"""Vite takes 140-250 MB, npm install three times that."""

PIDS: Final = 512
"""Processes of one container: a fork bomb ends here."""

STATES: Final = {
    "created": MachineState.STOPPED,  # what an engine leaves that could not start it
    "configured": MachineState.STOPPED,
    "initialized": MachineState.STOPPED,
    "restarting": MachineState.STARTING,
    "running": MachineState.RUNNING,
    "stopping": MachineState.RUNNING,
    "paused": MachineState.SUSPENDED,
    "exited": MachineState.STOPPED,
    "stopped": MachineState.STOPPED,
    "dead": MachineState.STOPPED,
    "removing": MachineState.GONE,
}

TAKEN: Final = ("already in use", "already exists", "is in use")
GONE: Final = ("no such container", "no such object", "no container with name", "not found")
REFUSED: Final = ("no such image", "not known", "unauthorized", "manifest unknown", "invalid reference")


class Failed(Exception):
    """The engine's command ended with an error; the message is its last line that is no hint."""


class ContainerMachines:
    """Runs machines as containers. `cli` is `podman` or `docker`; `options` go before the image's name."""

    kind = "container"

    def __init__(
        self,
        image: str,
        *,
        cli: str | None = None,
        options: Sequence[str] = (),
        command: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        found = cli or next((name for name in ("podman", "docker") if shutil.which(name)), None)
        if found is None:
            raise MachineRefused("there is neither podman nor docker on the PATH")
        self._cli = found
        self._image = image
        self._options = tuple(options)
        self._command = tuple(command)
        self._environment = dict(environment if environment is not None else os.environ)
        self._host = host

    async def create(self, spec: MachineSpec) -> Machine:
        try:
            await self._run(*self._creation(spec), environment=spec.env)
        except Failed as error:
            if not _says(error, TAKEN):
                refused = MachineRefused if _says(error, REFUSED) else MachineUnavailable
                raise refused(f"cannot make {spec.name}: {error}") from None
        machine = await self.inspect(spec.name)
        if machine is None:
            raise MachineUnavailable(f"{spec.name} was made and is gone already")
        if machine.state is MachineState.SUSPENDED:
            await self.resume(spec.name)
        elif machine.state is MachineState.STOPPED:
            # Adopted, or it ended at once; a second start that fails as well is for the session's deadline to judge.
            await self._change("start", spec.name)
            machine = await self.inspect(spec.name) or machine
        return machine

    async def inspect(self, machine_id: str) -> Machine | None:
        try:
            output = await self._run("container", "inspect", machine_id)
        except Failed as error:
            if _says(error, GONE):
                return None
            raise MachineUnavailable(f"cannot look at {machine_id}: {error}") from None
        return self._machine(json.loads(output)[0])

    async def find(self, session_id: UUID) -> builtins.list[Machine]:
        return await self._listing(f"label={LABEL}={session_id}")

    async def list(self) -> builtins.list[Machine]:
        return await self._listing(f"label={LABEL}")

    async def suspend(self, machine_id: str) -> None:
        machine = await self.inspect(machine_id)
        if machine is not None and machine.state is MachineState.RUNNING:
            await self._change("pause", machine_id)

    async def resume(self, machine_id: str) -> bool:
        machine = await self.inspect(machine_id)
        if machine is not None and machine.state is MachineState.SUSPENDED:
            await self._change("unpause", machine_id)
            machine = await self.inspect(machine_id)
        return machine is not None and machine.state is MachineState.RUNNING

    async def retire(self, machine_id: str) -> None:
        await self.destroy(machine_id)

    async def destroy(self, machine_id: str) -> None:
        machine = await self.inspect(machine_id)
        if machine is None:
            return
        if machine.state is MachineState.SUSPENDED:
            await self._change("unpause", machine_id)  # an engine does not stop what is paused
        # The long name is `--time` or `--timeout`, by engine and release.
        await self._change("stop", "-t", str(STOP_SECONDS), machine_id)
        await self._change("rm", "--force", "--volumes", machine_id)

    async def close(self) -> None:
        """Nothing is held."""

    def _creation(self, spec: MachineSpec) -> builtins.list[str]:
        # The values go through the environment of the command, not its arguments: `ps` shows those to everybody.
        env = [part for name in spec.env for part in ("--env", name)]
        publish = [
            part for port in (DEV_PORT, HEALTH_PORT) for part in ("--publish", f"{self._host}::{port}")
        ]
        return [
            "run", "--detach", "--name", spec.name,
            "--label", f"{LABEL}={spec.session_id}", "--label", f"{INSTALLATION}={spec.installation}",
            "--restart", "on-failure:10", "--stop-timeout", str(STOP_SECONDS), "--pull", "never",
            "--memory", MEMORY, "--pids-limit", str(PIDS), "--security-opt", "no-new-privileges",
            *publish, *env, *self._options, spec.image or self._image, *self._command,
        ]  # fmt: skip

    async def _listing(self, filter_: str) -> builtins.list[Machine]:
        try:
            output = await self._run("ps", "--all", "--filter", filter_, "--format", "{{.Names}}")
        except Failed as error:
            raise MachineUnavailable(f"cannot list containers: {error}") from None
        names = [name for name in output.split() if owner_of(name) is not None]
        return [machine for name in names if (machine := await self.inspect(name)) is not None]

    async def _change(self, *arguments: str) -> None:
        try:
            await self._run(*arguments)
        except Failed as error:
            if not _says(error, GONE):
                raise MachineUnavailable(f"cannot {arguments[0]} {arguments[-1]}: {error}") from None

    async def _run(self, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
        """One call of the engine; what it printed. Raises `Failed`, `MachineUnavailable`."""
        try:
            process = await asyncio.create_subprocess_exec(
                self._cli,
                *arguments,
                env={**self._environment, **(environment or {})},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise MachineRefused(f"cannot run {self._cli}: {error.strerror}") from None
        try:
            async with asyncio.timeout(COMMAND_SECONDS):
                output, errors = await process.communicate()
        except TimeoutError:
            raise MachineUnavailable(
                f"{self._cli} {arguments[0]} took over {COMMAND_SECONDS:.0f} s"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise Failed(_reason(errors.decode(errors="replace")) or f"exit code {process.returncode}")
        return output.decode(errors="replace")

    def _machine(self, found: dict[str, Any]) -> Machine:
        name = str(found["Name"]).removeprefix("/")
        ports = (found.get("NetworkSettings") or {}).get("Ports") or {}
        return Machine(
            driver=self.kind,
            id=name,
            name=name,
            state=STATES.get(str(found["State"]["Status"]), MachineState.STARTING),
            created_at=_moment(found.get("Created")),
            preview_url=self._url(ports, DEV_PORT),
            health_url=self._url(ports, HEALTH_PORT),
        )

    def _url(self, ports: Mapping[str, Any], port: int) -> str | None:
        bound = ports.get(f"{port}/tcp")
        return f"http://{self._host}:{bound[0]['HostPort']}" if bound else None


def _reason(errors: str) -> str:
    """What an engine said, without docker's hint at the end: "Run 'docker run --help' for more information"."""
    lines = [line.strip() for line in errors.splitlines() if line.strip() and "--help'" not in line]
    return lines[-1][:300] if lines else ""


def _says(error: Failed, words: Sequence[str]) -> bool:
    return any(word in str(error).lower() for word in words)


def _moment(text: object) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0
