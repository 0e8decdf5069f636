"""Runs the whole loop on one machine: `preview-orchestrator dev DIR`.

It runs the same control plane as `serve`, over the local stand-in for Supabase. What it started it stops, in the
opposite order, on Ctrl-C, on SIGTERM, on SIGHUP and on any failure.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict
from typing import Final
from uuid import UUID

import httpx
import psycopg
import uvicorn

from orchestrator_stub.devstack.editor import Editor, Sent
from orchestrator_stub.devstack.editor_page import EditorPage
from orchestrator_stub.devstack.project_client import UserAuth, user_token
from orchestrator_stub.devstack.smoke import ONCE_DEADLINE, measure_save, timing_table
from orchestrator_stub.devstack.state_directory import (
    HOST,
    Publication,
    SessionKey,
    StateDirectory,
    identities,
)
from orchestrator_stub.devstack.terminal import (
    CannotStart,
    DevInfo,
    DevOptions,
    Terminal,
    as_url,
    progress,
    screen,
    tail_of,
)  # fmt: skip
from orchestrator_stub.devstack.timeline import bars, start_of
from orchestrator_stub.door.decision import Address
from orchestrator_stub.http.application import application
from orchestrator_stub.http.operations import Measured
from orchestrator_stub.local_supabase.app import stand_in
from orchestrator_stub.local_supabase.auth import hash_password
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres, EmbeddedPostgresError
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
from orchestrator_stub.machines.driver import Machine, owner_of
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.platform.migrations import (
    MIGRATIONS,
    MigrationError,
    MigrationRefused,
    bootstrap,
    migrate,
)
from orchestrator_stub.platform.redaction import Redactor
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.process import Server, configure_logs, listen
from orchestrator_stub.relay.embedded import EmbeddedNats, NatsServerError
from orchestrator_stub.server.control_plane import ControlPlane, control_plane, door_of
from orchestrator_stub.write_back.pull import follow

DEV_PORT: Final = 5173

NODE_NEEDED: Final = (20, 19)
"""Vite 8's `engines`: ^20.19 || >=22.12."""

LONG: Final = 30 * 24 * 3600.0
"""Seconds a local session lives: nobody pays for it, and a laptop sleeps for days."""

RESTARTS: Final = 3
"""Failures in a row of the agent before the start is called off: somebody is waiting for it."""


async def run_dev(options: DevOptions) -> int:
    """Start it all, show where it is, keep it until told to stop. Gives the exit code.

    Raises `CannotStart`; nothing is left running then.
    """
    configure_logs("warning", "auto", Redactor())
    terminal = Terminal(options.as_json)
    this = asyncio.current_task()
    assert this is not None
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            terminal.step("stopping: the agent, its dev server, the database …")
            this.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    try:
        async with AsyncExitStack() as stack:
            await Stack(options, terminal, stack).run()
    except asyncio.CancelledError:
        if not stopping:
            raise
    terminal.step("stopped")
    return 0


class Stack:
    """The parts, started in order; what `stack` holds ends them in the opposite order."""

    def __init__(self, options: DevOptions, terminal: Terminal, stack: AsyncExitStack) -> None:
        self._options = options
        self._terminal = terminal
        self._stack = stack
        self._state = StateDirectory(options.state)
        self._pids: dict[str, int] = {}
        self._machine_id: str | None = None
        self._mark: str | None = None
        self._page = EditorPage() if options.editor else None

    async def run(self) -> None:
        self._options.check()
        directory = self._options.directory
        self._stack.enter_context(self._state.lock())
        self._state.withdraw()  # of one that was killed
        listener = self._listen()
        port = listener.getsockname()[1]
        node = await _node_version()
        self._terminal.step(f"starting on port {port} (Node {node}, state in {self._options.state})")

        keys = self._state.keyring()
        dsn = await self._database()
        driver = LocalMachines(
            self._state.path / "machines",
            environment=os.environ,
            host=HOST,
            restarts=RESTARTS,
            tied=True,
            on_start=self._agent_started,
            on_exit=self._agent_ended,
        )
        project_keys = ProjectKeys.of(keys)
        # Entered before the control plane, so ended after it: whatever it still started is found and stopped.
        self._stack.push_async_callback(self._retire_ours, driver)
        door_listener = self._door_listener()
        door_port = door_listener.getsockname()[1]
        nats_url = await self._nats()
        settings = self._state.settings(port, door_port, dsn, project_keys, ttl=LONG, nats_url=nats_url)
        service = await self._stack.enter_async_context(control_plane(settings, keys, driver))
        self._mark = service.installation.mark
        await self._stack.enter_async_context(self._serve(listener, service, dsn, project_keys))
        url = f"http://{HOST}:{port}"

        user_id, project_id = identities(directory)
        email, password = f"{user_id.hex[:12]}@local.invalid", secrets.token_urlsafe(12)
        await self._project(service, user_id, project_id, directory.resolve().name, email, password)
        editor, http = await self._editor(url, project_keys, keys, user_id, project_id)
        shown = self._options.directory
        self._say(await editor.begin(), f"{shown} imported", f"{shown} is as it was sent before")

        machine, session_id = await self._session(url, project_keys, project_id, driver)
        self._machine_id = machine.id
        self._stack.push_async_callback(driver.retire, machine.id)
        tasks = await self._stack.enter_async_context(_tasks())
        if self._page is not None:
            tasks.append(asyncio.create_task(self._page.build(self._terminal.step), name="editor page"))
        tasks.append(asyncio.create_task(service.controller.run(), name="sweeper"))
        tasks.append(asyncio.create_task(service.worker.run(), name="snapshot worker"))
        if service.relay is not None:
            tasks.append(asyncio.create_task(service.relay.run(), name="relay"))
        assert service.access is not None
        # Whoever reaches this machine may look, as with any dev server; pages of other sites may not.
        home = await service.access.label(project_id)
        address = Address(f"localhost:{door_port}", home=home, open=True)
        door = door_of(
            settings, service.pool, service.metrics.registry, address, controller=service.controller
        )
        tasks.append(asyncio.create_task(door.run(door_listener), name="door"))
        if self._options.write_back:
            back = follow(
                self._options.write_back, service.pool, project_id, shown, editor.baseline, self._state.path,
                self._terminal.step,
            )  # fmt: skip
            tasks.append(asyncio.create_task(back, name="write-back"))
        watching = asyncio.create_task(self._watch(editor), name="watch")
        tasks.append(watching)

        await self._until_served(machine, driver)
        await door.until_ready(home, session_id)
        info = DevInfo(
            orchestrator_url=url,
            anon_key=project_keys.anon_key,
            service_key=project_keys.service_key,
            database_url=as_url(dsn),
            project_id=str(project_id),
            session_id=str(session_id),
            project_dir=str(driver.project_dir(session_id)),
            preview_url=f"http://{HOST}:{door_port}",
            health_url=str(machine.health_url),
            agent_pid=self._pid,
            user_email=email,
            user_password=password,
            user_token=user_token(keys, user_id, time.time(), LONG),
            nats_url=nats_url,
        )
        published = self._stack.enter_context(Publication(self._state, info))
        if self._page is not None:
            self._page.publish(info.for_page(directory.resolve().name))
        self._terminal.show(
            screen(self._options, info, driver.log_path(machine.id), self._terminal.seconds), asdict(info)
        )
        if self._options.timeline:
            parts = await start_of(str(machine.health_url), self._terminal.seconds)
            self._terminal.show(bars(parts), {"start": parts})
        if self._options.once:
            timings = await measure_save(self._options, info, http, self._terminal.seconds)
            self._terminal.show(timing_table(timings), timings)
            return
        await self._keep(published, machine, driver, watching)

    # --- the parts

    def _listen(self) -> socket.socket:
        try:
            listener = listen(HOST, self._options.port)
        except OSError as error:
            raise CannotStart(
                f"port {self._options.port} cannot be had ({error.strerror}); "
                "give another --port, or --port 0 for a free one"
            ) from None
        self._stack.callback(listener.close)
        return listener

    def _door_listener(self) -> socket.socket:
        """Where browsers come: Vite's own port when it is free, for it is the one that people know."""
        try:
            listener = listen(HOST, DEV_PORT if self._options.port else 0)
        except OSError:
            listener = listen(HOST, 0)
        self._stack.callback(listener.close)
        return listener

    async def _database(self) -> str:
        given = self._options.database_url
        try:
            if given is None:
                server = EmbeddedPostgres(self._state.path / "postgres")
                dsn = await server.start()
                self._stack.push_async_callback(server.stop)
            else:
                dsn = given
            await bootstrap(dsn)
            applied = await migrate(dsn, MIGRATIONS)
        except MigrationRefused as error:
            if error.by_earlier_version and given is None:
                raise CannotStart(
                    f"{self._state.path} is of a version before the first release: delete it, and start anew"
                ) from None
            raise CannotStart(str(error)) from None
        except (EmbeddedPostgresError, MigrationError) as error:
            raise CannotStart(str(error)) from None
        except (psycopg.Error, OSError) as error:
            raise CannotStart(f"cannot use the database: {' '.join(str(error).split())}") from None
        kind = "the given database" if given else "PostgreSQL"
        self._terminal.step(f"{kind} is up" + (", its schema brought up to date" if applied else ""))
        return dsn

    async def _nats(self) -> str | None:
        """Start a NATS server, with keys of this start, when it is asked for; where it is."""
        if self._options.transport != "nats":
            return None
        server = EmbeddedNats(self._state.path / "nats")
        try:
            await server.start()
            self._stack.push_async_callback(server.stop)
            server.operator.write(self._state.nats_keys.parent)
        except (NatsServerError, OSError) as error:
            raise CannotStart(str(error)) from None
        self._terminal.step(f"NATS is up ({server.url})")
        return server.url

    @asynccontextmanager
    async def _serve(
        self, listener: socket.socket, service: ControlPlane, dsn: str, keys: ProjectKeys
    ) -> AsyncIterator[None]:
        """Control plane and stand-in on one socket, up when this yields."""
        local = stand_in(dsn, keys, self._state.path / "storage", faults=self._options.faults)
        page = self._page.routes() if self._page is not None else []
        app = application([*service.routes, *local.routes, *page], lifespan=local.lifespan)
        config = uvicorn.Config(
            Measured(app, service.metrics),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=2,
            **uvicorn_options(),
        )
        server = Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]), name="server")
        try:
            while not server.started:
                if task.done():
                    raise CannotStart(f"the server did not start: {task.exception()}")
                await asyncio.sleep(0.005)
            yield
        finally:
            server.should_exit = True
            await asyncio.wait([task], timeout=5)

    async def _project(
        self, service: ControlPlane, user_id: UUID, project_id: UUID, name: str, email: str, password: str
    ) -> None:
        """A user with a new password and a project of theirs, as a product's sign-up would make them."""
        hashed = await asyncio.to_thread(hash_password, password)
        async with service.pool.connection() as connection:
            await connection.execute(
                "insert into auth.users (id, email, encrypted_password) values (%s, %s, %s)"
                " on conflict (id) do update set encrypted_password = excluded.encrypted_password",
                (user_id, email, hashed),
            )
            await connection.execute(
                "insert into public.user_profiles (id, display_name) values (%s, 'you') on conflict do nothing",
                (user_id,),
            )
            await connection.execute(
                "insert into public.projects (id, owner_id, name) values (%s, %s, %s) on conflict do nothing",
                (project_id, user_id, name),
            )
            way = "both" if self._options.transport == "nats" else "realtime"
            await connection.execute("update preview.settings set transport = %s", (way,))

    async def _editor(
        self, url: str, keys: ProjectKeys, keyring: Keyring, user_id: UUID, project_id: UUID
    ) -> tuple[Editor, httpx.AsyncClient]:
        http = await self._stack.enter_async_context(
            httpx.AsyncClient(
                base_url=url,
                headers={"apikey": keys.anon_key},
                auth=UserAuth(keyring, user_id, time.time),
                timeout=60,
                trust_env=False,
            )
        )
        baseline = self._state.path / "editor.json"
        try:
            include = self._options.include
            return Editor(self._options.directory, project_id, http, baseline, include=include), http
        except OSError as error:
            what = f"cannot read {baseline}, which says what was sent before: {error.strerror}"
            raise CannotStart(f"{what}; mend that, or remove it to have everything sent again") from None

    async def _session(
        self, url: str, keys: ProjectKeys, project_id: UUID, driver: LocalMachines
    ) -> tuple[Machine, UUID]:
        """The session of the last start with a newer machine, or a new one."""
        wanted = self._state.next_session(project_id)
        headers = {"Authorization": f"Bearer {keys.service_key}"}
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
        machine = await driver.inspect(form["machine"]["id"])
        if machine is None:
            raise CannotStart(f"the agent's machine is gone; see the logs in {self._state.path / 'machines'}")
        return machine, UUID(form["session_id"])

    # --- while it runs

    async def _watch(self, editor: Editor) -> None:
        if not self._options.watch:
            return
        async for sent in editor.watch():
            self._say(sent, "saved")

    def _say(self, sent: Sent, what: str, nothing: str | None = None) -> None:
        if sent.updated or sent.deleted:
            parts = [f"{sent.updated} written"] * bool(sent.updated)
            parts += [f"{sent.deleted} deleted"] * bool(sent.deleted)
            self._terminal.step(f"{what}: {', '.join(parts)}")
        elif nothing is not None and not (sent.skipped or sent.said):
            self._terminal.step(nothing)
        for line in sent.skipped:
            self._terminal.step(f"left out {line}")
        for line in sent.said:
            self._terminal.step(line)

    async def _until_served(self, machine: Machine, driver: LocalMachines) -> None:
        """Wait until the preview is served; with `--once`, for `ONCE_DEADLINE` seconds. Raises `CannotStart`."""
        try:
            async with asyncio.timeout(ONCE_DEADLINE if self._options.once else None):
                await self._until_ready(machine, driver)
        except TimeoutError:
            log = driver.log_path(machine.id)
            raise CannotStart(
                f"the preview did not answer within {ONCE_DEADLINE:.0f} s. The log's end:\n{tail_of(log)}"
            ) from None

    async def _until_ready(self, machine: Machine, driver: LocalMachines) -> None:
        """Poll until `/readyz` answers 200, and print each state and problem that the agent reports on the way."""
        told: list[str] = []
        async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
            while True:
                with suppress(httpx.HTTPError):
                    if (await http.get(f"{machine.health_url}/readyz")).status_code == 200:
                        return
                    lines = progress((await http.get(f"{machine.health_url}/status")).json())
                    for line in lines:
                        if line not in told:
                            self._terminal.step(line)
                    if len(lines) > 1 >= len(told):
                        self._terminal.step(f"the agent's log is {driver.log_path(machine.id)}")
                    told = lines
                await self._still_there(machine, driver)
                await asyncio.sleep(0.05)

    async def _still_there(self, machine: Machine, driver: LocalMachines) -> None:
        now = await driver.inspect(machine.id)
        if now is None or now.state != "running":
            log = driver.log_path(machine.id)
            raise CannotStart(f"the agent ended. Its last words:\n{tail_of(log)}\nThe whole log: {log}")

    async def _keep(
        self, published: Publication, machine: Machine, driver: LocalMachines, watching: asyncio.Task[None]
    ) -> None:
        """For ever: keep dev.json true, and end when something that should not end does."""
        while True:
            if watching.done() and self._options.watch:
                raise CannotStart(f"the watch over {self._options.directory} ended: {watching.exception()}")
            await self._still_there(machine, driver)
            if published.agent_is(self._pid):
                self._terminal.step(f"the agent was started again (process {self._pid})")
            await asyncio.sleep(0.25)

    async def _retire_ours(self, driver: LocalMachines) -> None:
        """End this database's machines. Others' may stand beside them: `serve` has the same MACHINES_DIR by default."""
        for machine in await driver.list():
            owner = owner_of(machine.name)
            if owner is not None and self._mark is not None and owner.mark == self._mark:
                await driver.retire(machine.id)

    @property
    def _pid(self) -> int:
        """Our session's agent. Others may be started beside it, through the session API."""
        return self._pids.get(self._machine_id or "", 0)

    def _agent_started(self, machine: Machine, pid: int) -> None:
        self._pids[machine.id] = pid

    def _agent_ended(self, machine: Machine, code: int) -> None:
        if machine.id != self._machine_id:
            self._pids.pop(machine.id, None)
            return
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        self._terminal.step(f"the agent {how}")


@asynccontextmanager
async def _tasks() -> AsyncIterator[list[asyncio.Task[None]]]:
    """Tasks that end with the block."""
    tasks: list[asyncio.Task[None]] = []
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _node_version() -> str:
    """The version of the `node` on the PATH. Raises `CannotStart` when it is missing or too old."""
    needed = ".".join(map(str, NODE_NEEDED))
    if shutil.which("node") is None:
        raise CannotStart(f"there is no node on the PATH; install Node.js {needed} or newer")
    process = await asyncio.create_subprocess_exec(
        "node", "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    found = re.match(rb"v(\d+)\.(\d+)\.\d+", output)
    if found is None:
        raise CannotStart(f"`node --version` does not say a version; install Node.js {needed} or newer")
    version = found[0].decode().removeprefix("v")
    if (int(found[1]), int(found[2])) < NODE_NEEDED:
        raise CannotStart(f"Node {version} is too old for Vite; install Node.js {needed} or newer")
    return version
