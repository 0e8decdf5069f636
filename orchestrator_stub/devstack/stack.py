"""Runs the whole loop on one machine: `preview-orchestrator dev DIR`.

It runs the same control plane as `serve`, over the local stand-in for Supabase. What it started it stops, in the
opposite order, on Ctrl-C, on SIGTERM, on SIGHUP and on any failure.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
import psycopg
import uvicorn

from orchestrator_stub.devstack.agent import LONG, LocalAgent
from orchestrator_stub.devstack.editor import Editor, Sent
from orchestrator_stub.devstack.editor_page import EditorPage
from orchestrator_stub.devstack.project_client import UserAuth, user_token
from orchestrator_stub.devstack.state_directory import (
    HOST,
    Publication,
    StateDirectory,
    identities,
)
from orchestrator_stub.devstack.terminal import (
    CannotStart,
    DevInfo,
    DevOptions,
    Terminal,
    as_url,
    screen,
)  # fmt: skip
from orchestrator_stub.devstack.timings import bars, measure_save, start_of, timing_table
from orchestrator_stub.door.decision import Address
from orchestrator_stub.http.application import application
from orchestrator_stub.http.operations import Measured
from orchestrator_stub.local_supabase.app import stand_in
from orchestrator_stub.local_supabase.auth import hash_password
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres, EmbeddedPostgresError
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
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


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose project it is: a user who may sign in, with a password of this start."""

    user_id: UUID
    project_id: UUID
    email: str
    password: str

    @classmethod
    def of(cls, directory: Path) -> Owner:
        """The same user and project for one directory, each time."""
        user_id, project_id = identities(directory)
        return cls(user_id, project_id, f"{user_id.hex[:12]}@local.invalid", secrets.token_urlsafe(12))


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
        self._agent = LocalAgent(options, terminal, self._state)
        self._owner = Owner.of(options.directory)
        self._page = EditorPage() if options.editor else None

    async def run(self) -> None:
        """Start the parts, show where they are, and keep them until cancelled. Raises `CannotStart`."""
        self._options.check()
        self._stack.enter_context(self._state.lock())
        self._state.withdraw()  # of one that was killed
        listener = self._listen()
        port = listener.getsockname()[1]
        node = await _node_version()
        self._terminal.step(f"starting on port {port} (Node {node}, state in {self._options.state})")

        agent, owner, url = self._agent, self._owner, f"http://{HOST}:{port}"
        keys = self._state.keyring()
        project_keys = ProjectKeys.of(keys)
        dsn = await self._database()
        # Entered before the control plane, so ended after it: whatever it still started is found and stopped.
        self._stack.push_async_callback(agent.retire_all)
        door_listener = self._listen_for_door()
        door_port = door_listener.getsockname()[1]
        nats_url = await self._nats()
        settings = self._state.settings(port, door_port, dsn, project_keys, ttl=LONG, nats_url=nats_url)
        service = await self._stack.enter_async_context(control_plane(settings, keys, agent.driver))
        agent.mark = service.installation.mark
        await self._stack.enter_async_context(self._serve(listener, service, dsn, project_keys))

        await self._project(service)
        editor, http = await self._editor(url, project_keys, keys)
        shown = self._options.directory
        self._say(await editor.begin(), f"{shown} imported", f"{shown} is as it was sent before")
        await agent.begin(url, project_keys.service_key, owner.project_id)
        self._stack.push_async_callback(agent.retire)

        tasks = await self._stack.enter_async_context(_tasks())
        self._in_background(tasks, service, editor)
        # Whoever reaches this machine may look, as with any dev server; pages of other sites may not.
        assert service.access is not None
        home = await service.access.label(owner.project_id)
        address = Address(f"localhost:{door_port}", home=home, open=True)
        door = door_of(
            settings, service.pool, service.metrics.registry, address, controller=service.controller
        )
        tasks.append(asyncio.create_task(door.run(door_listener), name="door"))
        watching = asyncio.create_task(self._watch(editor), name="watch")
        tasks.append(watching)

        info = DevInfo(
            orchestrator_url=url, anon_key=project_keys.anon_key, service_key=project_keys.service_key,
            database_url=as_url(dsn), project_id=str(owner.project_id), session_id=str(agent.session_id),
            project_dir=str(agent.project_dir), preview_url=f"http://{HOST}:{door_port}",
            health_url=str(agent.machine.health_url), agent_pid=agent.pid, user_email=owner.email,
            user_password=owner.password, user_token=user_token(keys, owner.user_id, time.time(), LONG),
            nats_url=nats_url,
        )  # fmt: skip
        if self._page is not None:  # also of a project that does not start: there it is corrected
            self._page.publish(info.for_page(self._options.directory.resolve().name))
        await agent.until_served()
        await door.until_ready(home, agent.session_id)
        info = replace(info, agent_pid=agent.pid)
        published = self._stack.enter_context(Publication(self._state, info))
        await self._show(info)
        if self._options.once:
            timings = await measure_save(self._options, info, http, self._terminal.seconds)
            self._terminal.show(timing_table(timings), timings)
        else:
            await self._keep(published, watching)

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

    def _listen_for_door(self) -> socket.socket:
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

    async def _project(self, service: ControlPlane) -> None:
        """The owner with a new password and their project, as a product's sign-up would make them."""
        owner, name = self._owner, self._options.directory.resolve().name
        hashed = await asyncio.to_thread(hash_password, owner.password)
        async with service.pool.connection() as connection:
            await connection.execute(
                "insert into auth.users (id, email, encrypted_password) values (%s, %s, %s)"
                " on conflict (id) do update set encrypted_password = excluded.encrypted_password",
                (owner.user_id, owner.email, hashed),
            )
            await connection.execute(
                "insert into public.user_profiles (id, display_name) values (%s, 'you') on conflict do nothing",
                (owner.user_id,),
            )
            await connection.execute(
                "insert into public.projects (id, owner_id, name) values (%s, %s, %s) on conflict do nothing",
                (owner.project_id, owner.user_id, name),
            )
            way = "both" if self._options.transport == "nats" else "realtime"
            await connection.execute("update preview.settings set transport = %s", (way,))

    async def _editor(
        self, url: str, keys: ProjectKeys, keyring: Keyring
    ) -> tuple[Editor, httpx.AsyncClient]:
        http = await self._stack.enter_async_context(
            httpx.AsyncClient(
                base_url=url,
                headers={"apikey": keys.anon_key},
                auth=UserAuth(keyring, self._owner.user_id, time.time),
                timeout=60,
                trust_env=False,
            )
        )
        baseline = self._state.path / "editor.json"
        try:
            editor = Editor(
                self._options.directory, self._owner.project_id, http, baseline,
                include=self._options.include,
            )  # fmt: skip
        except OSError as error:
            what = f"cannot read {baseline}, which says what was sent before: {error.strerror}"
            raise CannotStart(f"{what}; mend that, or remove it to have everything sent again") from None
        return editor, http

    def _in_background(self, tasks: list[asyncio.Task[None]], service: ControlPlane, editor: Editor) -> None:
        """Begin what goes on beside the agent: the page's build, the control plane's own, what comes back."""
        parts = {"sweeper": service.controller.run(), "snapshot worker": service.worker.run()}
        if self._page is not None:
            parts["editor page"] = self._page.build(self._terminal.step)
        if service.relay is not None:
            parts["relay"] = service.relay.run()
        if self._options.write_back:
            parts["write-back"] = follow(
                self._options.write_back, service.pool, self._owner.project_id, self._options.directory,
                editor.baseline, self._state.path, self._terminal.step,
            )  # fmt: skip
        tasks += [asyncio.create_task(part, name=name) for name, part in parts.items()]

    async def _show(self, info: DevInfo) -> None:
        """Where everything is, and with `--timeline` what each part of the start took."""
        self._terminal.show(
            screen(self._options, info, self._agent.log, self._terminal.seconds), asdict(info)
        )
        if self._options.timeline:
            parts = await start_of(info.health_url, self._terminal.seconds)
            self._terminal.show(bars(parts), {"start": parts})

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

    async def _keep(self, published: Publication, watching: asyncio.Task[None]) -> None:
        """For ever: keep dev.json true, and end when something that should not end does."""
        while True:
            if watching.done() and self._options.watch:
                raise CannotStart(f"the watch over {self._options.directory} ended: {watching.exception()}")
            await self._agent.still_there()
            if published.agent_is(self._agent.pid):
                self._terminal.step(f"the agent was started again (process {self._agent.pid})")
            await asyncio.sleep(0.25)


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
