"""Runs the session's agent as a process of this machine: asked for through the session API, awaited, watched, ended."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx

from orchestrator_stub.devstack.state_directory import HOST, SessionKey, StateDirectory
from orchestrator_stub.devstack.terminal import CannotStart, DevOptions, Terminal, progress, tail_of
from orchestrator_stub.devstack.timings import ONCE_DEADLINE
from orchestrator_stub.machines.driver import Machine, owner_of
from orchestrator_stub.machines.local import LocalMachines

LONG: Final = 30 * 24 * 3600.0
"""Seconds a local session lives: nobody pays for it, and a laptop sleeps for days."""

RESTARTS: Final = 3
"""Failures in a row of the agent before the start is called off: somebody is waiting for it."""


class LocalAgent:
    """The agent of `dev`'s own session. Others may be started beside it, through the session API.

    Attributes:
        driver: makes the machines of the control plane.
        mark: the database's, by which its machines are known; set once the control plane is there.
        session_id: set by `begin`, as are `machine` and what is read from it.
    """

    def __init__(self, options: DevOptions, terminal: Terminal, state: StateDirectory) -> None:
        self.driver = LocalMachines(
            state.path / "machines",
            environment=os.environ,
            host=HOST,
            restarts=RESTARTS,
            tied=True,
            on_start=self._started,
            on_exit=self._ended,
        )
        self.mark: str | None = None
        self.session_id: UUID
        self.machine: Machine
        self._machine_id = ""
        self._options = options
        self._terminal = terminal
        self._state = state
        self._pids: dict[str, int] = {}

    @property
    def pid(self) -> int:
        """Its process; 0 between two."""
        return self._pids.get(self._machine_id, 0)

    @property
    def log(self) -> Path | None:
        """Where its output goes."""
        return self.driver.log_path(self.machine.id)

    @property
    def project_dir(self) -> Path:
        """Where it keeps the project's files."""
        return self.driver.project_dir(self.session_id)

    async def begin(self, url: str, service_key: str, project_id: UUID) -> None:
        """Take up the session of the last start with a newer machine, or a new one. Raises `CannotStart`."""
        wanted = self._state.next_session(project_id)
        headers = {"Authorization": f"Bearer {service_key}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False) as http:
            while True:
                # Written first: a key whose session nobody remembers would be a machine nobody ends.
                self._state.keep_session(project_id, wanted)
                answer = await http.post(
                    "/v1/sessions",
                    json={
                        "project_id": str(project_id),
                        "generation": wanted.generation,
                        "ttl_seconds": LONG,
                    },
                    headers={"Idempotency-Key": wanted.key},
                )
                form = answer.json()
                if not (answer.is_success and form["state"] in ("draining", "gone")):
                    break
                wanted = SessionKey.fresh()
        if not answer.is_success or form.get("machine") is None:
            reason = form.get("detail") or form.get("problem") or f"it is {form.get('state')}"
            raise CannotStart(f"the session did not start: {reason}")
        machine = await self.driver.inspect(form["machine"]["id"])
        if machine is None:
            raise CannotStart(f"the agent's machine is gone; see the logs in {self._state.path / 'machines'}")
        self.machine, self._machine_id, self.session_id = machine, machine.id, UUID(form["session_id"])

    async def until_served(self) -> None:
        """Wait until the preview is served; with `--once`, for `ONCE_DEADLINE` seconds. Raises `CannotStart`."""
        try:
            async with asyncio.timeout(ONCE_DEADLINE if self._options.once else None):
                await self._until_ready()
        except TimeoutError:
            raise CannotStart(
                f"the preview did not answer within {ONCE_DEADLINE:.0f} s. The log's end:\n{tail_of(self.log)}"
            ) from None

    async def _until_ready(self) -> None:
        """Poll until `/readyz` answers 200, and print each state and problem that the agent reports on the way."""
        told: list[str] = []
        async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
            while True:
                with suppress(httpx.HTTPError):
                    if (await http.get(f"{self.machine.health_url}/readyz")).status_code == 200:
                        return
                    lines = progress((await http.get(f"{self.machine.health_url}/status")).json())
                    for line in lines:
                        if line not in told:
                            self._terminal.step(line)
                    if len(lines) > 1 >= len(told):
                        self._terminal.step(f"the agent's log is {self.log}")
                    told = lines
                await self.still_there()
                await asyncio.sleep(0.05)

    async def still_there(self) -> None:
        """Raises `CannotStart` when its machine has ended."""
        now = await self.driver.inspect(self.machine.id)
        if now is None or now.state != "running":
            raise CannotStart(
                f"the agent ended. Its last words:\n{tail_of(self.log)}\nThe whole log: {self.log}"
            )

    async def retire(self) -> None:
        """End its machine; the directory stays for the next."""
        await self.driver.retire(self.machine.id)

    async def retire_all(self) -> None:
        """End this database's machines. Others' may stand beside them: `serve` has the same MACHINES_DIR by default."""
        for machine in await self.driver.list():
            owner = owner_of(machine.name)
            if owner is not None and self.mark is not None and owner.mark == self.mark:
                await self.driver.retire(machine.id)

    def _started(self, machine: Machine, pid: int) -> None:
        self._pids[machine.id] = pid

    def _ended(self, machine: Machine, code: int) -> None:
        if machine.id != self._machine_id:
            self._pids.pop(machine.id, None)
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._terminal.step(f"the agent {how}")
