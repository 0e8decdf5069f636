"""`preview-agent check`: diagnoses a machine, one line for each finding.

Changes nothing that stays: no install, no join, no write but a probe file that is removed at once. The questions run
side by side and each has a deadline, so that a machine without a network is diagnosed in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import ssl
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import websockets

from agent import __version__, net
from agent.config import NATS_SCHEMES, Settings, read_environment
from agent.core.errors import MalformedMessage, RootUnusable, SettingsError
from agent.devserver import process
from agent.devserver.process import printable
from agent.devserver.sandbox import environment, project_rights
from agent.fs.inspect import DirectoryView
from agent.fs.places import weaknesses
from agent.link.loop import ConnectionEnd
from agent.link.realtime import endpoint
from agent.link.types import LinkSettings, Timing
from agent.net import exchange
from agent.project import reading
from agent.project.choice import NothingToServe, ProjectUnreadable
from agent.project.reading import Dependencies, Project
from agent.telemetry.logging import redactor_for
from agent.tokens import read_token

PATIENCE = 10.0
"""Seconds for one question. A TLS handshake through a slow proxy takes two."""
LEAST_SPACE = 512 * 2**20
"""Bytes. A snapshot of the largest kind and one install fit in twice that; below it, expect `disk_full`."""
LEAST_INODES = 20_000
"""The example has 600 entries in node_modules, larger projects a hundred times that, and twice during a swap."""
CAPABILITIES = {"CHOWN": 0, "DAC_OVERRIDE": 1, "KILL": 5, "SETGID": 6, "SETUID": 7}
"""What root needs to run the project as another user: `linux/capability.h`. Every engine gives them by default."""
LEAST_NODE = (20, 19)
"""Vite 8's own requirement."""
NATS_PORT = 4222
"""Of a REALTIME_URL that names none."""
NATS_DEADLINES = LinkSettings(timing=Timing(join_within=3.0), open_within=4.0)
"""Shorter than the link's, so that a question ends within `PATIENCE` and says what was not answered."""


class Grade(StrEnum):
    """How bad it is. Only `FAIL` changes the exit code."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `exit_code` is what `run` would end with for it; 1 when it would go on and try again."""

    grade: Grade
    subject: str
    detail: str
    exit_code: int = 0

    def __str__(self) -> str:
        return f"{self.grade:<4}  {self.subject:<13} {self.detail}"


def ok(subject: str, detail: str) -> Finding:
    return Finding(Grade.OK, subject, detail)


def warn(subject: str, detail: str) -> Finding:
    return Finding(Grade.WARN, subject, detail)


def fail(subject: str, detail: str, exit_code: int = 1) -> Finding:
    return Finding(Grade.FAIL, subject, detail, exit_code)


async def check(environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Ask every question and `say` one line for each finding; return 0, or the exit code of the first that failed."""
    try:
        settings = read_environment(environ)
    except SettingsError as error:
        for problem in error.problems:
            say(str(fail("settings", problem, error.exit_code)))
        return error.exit_code
    redactor = redactor_for(settings)
    url = settings.realtime_url or ""
    events = _nats if url.partition(":")[0] in NATS_SCHEMES else _realtime
    questions: list[Callable[[Settings], Awaitable[list[Finding]]]] = [
        _directories, _space, *([_live] if settings.shadow else [_user]), _ports,
        *([] if settings.shadow else [_node, _preview]), _token, _snapshot, events, _session_api,
    ]  # fmt: skip
    findings = [ok("settings", f"complete; preview-agent {__version__}")]
    for answers in await asyncio.gather(*(_asked(question, settings) for question in questions)):
        findings += answers
    for finding in findings:
        say(redactor.text(str(finding)))
    return next((f.exit_code for f in findings if f.grade is Grade.FAIL), 0)


async def _asked(
    question: Callable[[Settings], Awaitable[list[Finding]]], settings: Settings
) -> list[Finding]:
    subject = question.__name__.strip("_").replace("_", " ")
    try:
        async with asyncio.timeout(PATIENCE):
            return await question(settings)
    except TimeoutError:
        return [fail(subject, f"no answer within {PATIENCE:g} s", 69)]


# --- this machine


async def _directories(settings: Settings) -> list[Finding]:
    found = []
    tree = "SHADOW_DIR" if settings.shadow else "PROJECT_DIR"
    ours = {tree: settings.tree_dir, "STAGING_DIR": settings.staging, "STATE_DIR": settings.state_dir}
    if not settings.shadow:
        ours["MODULES_DIR"] = settings.modules
    for name, path in ours.items():
        try:
            existing = _writable(path)
        except OSError as error:
            asked = f"uid {os.geteuid()} cannot write in {_existing(path)} ({error.strerror}); "
            remedy = f"make it writable, or set {name} to another place"
            found.append(fail(name, asked + remedy, RootUnusable.exit_code))
            continue
        made = "writable" if existing == path else f"will be made in {existing}"
        found.append(ok(name, f"{path}: {made}"))
    with contextlib.suppress(OSError):
        device = _existing(settings.tree_dir).stat().st_dev
        if _existing(settings.staging).stat().st_dev != device:
            detail = f"{settings.staging} is on another file system than {tree}: nothing could be renamed in"
            found.append(fail("STAGING_DIR", detail, RootUnusable.exit_code))
        if not settings.shadow and _existing(settings.modules).stat().st_dev != device:
            found.append(warn("MODULES_DIR", "on another file system than PROJECT_DIR: installs are copied"))
    return found


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _writable(path: Path) -> Path:
    """The nearest existing directory at or above `path`. Raises OSError when nothing can be made in it."""
    existing = _existing(path)
    with tempfile.TemporaryFile(dir=existing):
        return existing


async def _live(settings: Settings) -> list[Finding]:
    """The directory of the other flow, which is only read."""
    live = settings.project_dir
    if not live.exists():
        return [warn("PROJECT_DIR", f"{live} is not there yet; every file will be missing in it")]
    try:
        files = await asyncio.to_thread(DirectoryView(live).scan)
    except OSError as error:
        return [fail("PROJECT_DIR", f"{live} cannot be read: {error.strerror}")]
    return [ok("PROJECT_DIR", f"{live} is compared and never touched: {len(files)} files")]


async def _space(settings: Settings) -> list[Finding]:
    found = []
    for name, path in (("disk", settings.tree_dir), ("disk", settings.state_dir)):
        existing = _existing(path)
        here = os.statvfs(existing)
        free, inodes = here.f_bavail * here.f_frsize, here.f_favail
        short = free < LEAST_SPACE or (here.f_files and inodes < LEAST_INODES)
        counted = f", {inodes:,} inodes" if here.f_files else ""
        found.append((warn if short else ok)(name, f"{existing}: {free / 2**30:.1f} GiB{counted} free"))
    return found[:1] if found[0].detail == found[1].detail else found


async def _user(settings: Settings) -> list[Finding]:
    try:
        allowed, sentence = project_rights(settings)
    except SettingsError as error:
        return [fail("DEV_USER", problem, error.exit_code) for problem in error.problems]
    if allowed.user is None:
        return [warn("isolation", f"{sentence}; start the agent as root, with DEV_USER")]
    user = allowed.user
    found = [ok("isolation", sentence)]
    for weak in weaknesses(settings, user.name, user.uid, user.gid):
        found.append(fail("isolation", weak, RootUnusable.exit_code))
    if lacking := [name for name, bit in CAPABILITIES.items() if not _capabilities() >> bit & 1]:
        found.append(
            fail("isolation", f"root without {', '.join(lacking)}: give the container these capabilities")
        )
    with contextlib.suppress(FileNotFoundError):
        owner = settings.project_dir.stat().st_uid
        if owner not in (0, user.uid):
            name, place = user.name, settings.project_dir
            detail = f"belongs to uid {owner}, and {name} cannot install there: chown {name} {place}"
            found.append(fail("PROJECT_DIR", detail))
    return found


def _capabilities() -> int:
    """Return the capabilities in effect as bits; all of them where the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return int(line.split()[1], 16)
    return -1


async def _ports(settings: Settings) -> list[Finding]:
    found = []
    listening = [("HEALTH_PORT", settings.health_host, settings.health_port)]
    if not settings.shadow:
        listening.insert(0, ("DEV_PORT", settings.dev_host, settings.dev_port))
    for name, address, port in listening:
        here = net.listening_host(address)
        free = net.port_is_free(here, port)
        shown = f"[{here}]:{port}" if ":" in here else f"{here}:{port}"
        found.append(
            ok(name, f"{shown} is free")
            if free
            else warn(name, f"{shown} is in use: by an agent that runs? Else end what has it, or set {name}")
        )
    return found


async def _node(settings: Settings) -> list[Finding]:
    """Run Node as the project's programs are run: what root can start, DEV_USER may not."""
    needed = f"Node {LEAST_NODE[0]}.{LEAST_NODE[1]} or later"
    if shutil.which("node") is None:
        return [fail("node", f"not found on PATH; the image needs {needed}, with npm")]
    with contextlib.suppress(SettingsError):
        allowed, _ = project_rights(settings)
        env = environment(os.environ, user=allowed.user, more={})
        done = await process.run(
            ("node", "--version"), cwd=Path("/"), env=env, rights=allowed, timeout=PATIENCE / 2
        )
        said = done.tail[-1] if done.tail else f"exit {done.code}"
        who = allowed.user.name if allowed.user else "the agent"
        if not done.ok:
            return [fail("node", f"cannot be run by {who}: {said}")]
        found = (
            []
            if shutil.which("npm")
            else [warn("npm", "not found on PATH; nothing can be installed without it")]
        )
        version = re.fullmatch(r"v(\d+)\.(\d+)\..*", said)
        if version is None:
            return [warn("node", f"says {said!r}; Vite needs {needed}"), *found]
        if tuple(map(int, version.groups())) < LEAST_NODE:
            return [warn("node", f"{said}, run by {who}; Vite needs {needed}"), *found]
        return [ok("node", f"{said} ({shutil.which('node')}), run by {who}"), *found]
    return []


async def _preview(settings: Settings) -> list[Finding]:
    """Say what a start would preview, by which command, with which package manager, and what is missing for it."""
    directory = settings.project_dir
    found: Project | None = None
    try:
        find = partial(reading.find, root=settings.dev_root, scripts=settings.install_scripts)
        found = await asyncio.to_thread(find, directory)
    except (ProjectUnreadable, NothingToServe) as error:
        if not directory.exists():
            return [ok("preview", "nothing there yet")]
        if isinstance(error, ProjectUnreadable) or not settings.dev_command:
            return [warn("preview", str(error))]
    command = settings.dev_command
    if found is None:
        program = (command or ("",))[0]
        if shutil.which(directory / program if "/" in program else program):
            return [ok("command", " ".join(command or ()))]
        return [warn("command", f"there is no program {program!r} here; use an image that has it")]
    server = found.report()["server"] or "a server that listens on $PORT"
    findings = [ok("preview", f"{found.chosen.place or '.'}: {server}; {found.chosen.why}")]
    if found.dependencies.exist:
        findings.append(_dependencies(settings, found.dependencies))
    with contextlib.suppress(SettingsError):
        rights, _ = project_rights(settings)
        version = await process.node_version(environment(os.environ, user=rights.user, more={}), rights)
        if missing := reading.node_missing(found, version):
            findings.append(warn("engine", missing))
    script = found.chosen.script
    if script and not command:
        return [*findings, ok("command", f"npm run {script}: {found.chosen.scripts[script]}")]
    command = command or found.command(modules=settings.modules, path=os.environ.get("PATH", os.defpath))
    return [*findings, ok("command", " ".join(command).removeprefix("sh -c "))]


def _dependencies(settings: Settings, wanted: Dependencies) -> Finding:
    current = reading.installed_key(wanted.modules) == wanted.key
    state = "node_modules is current" if current else "node_modules will be installed"
    manager = f"{wanted.manager.package}, {wanted.manager.lock or 'no lock file'}; {state}"
    if settings.install_command or wanted.manager.is_installed(os.environ.get("PATH")):
        return ok("dependencies", manager)
    if shutil.which("npm"):
        return ok("dependencies", f"{manager}; this release is not installed here: npm fetches it")
    return warn("dependencies", f"{manager}; it is not installed here, nor is npm to fetch it")


# --- what it has to reach


async def _token(settings: Settings) -> list[Finding]:
    file = settings.realtime_token_file
    try:
        text = (
            settings.realtime_token.get_secret_value()
            if settings.realtime_token
            else file and file.read_text()
        )
        token = read_token((text or "").strip())
    except OSError as error:
        return [fail("token", f"REALTIME_TOKEN_FILE: {file}: {error.strerror}", 64)]
    except (MalformedMessage, UnicodeDecodeError) as error:
        return [fail("token", str(error), 64)]
    if token.expires_at is None:
        return [warn("token", f"role {token.role}, without an expiry")]
    left = token.expires_at - time.time()
    if left <= 0:
        way_back = (
            "SESSION_API_URL can give a new one"
            if settings.session_api_url
            else "without SESSION_API_URL only a new session has a new one"
        )
        return [
            (warn if settings.session_api_url else fail)("token", f"expired {-left:.0f} s ago; {way_back}")
        ]
    return [ok("token", f"role {token.role}, valid for {left:.0f} s")]


async def _snapshot(settings: Settings) -> list[Finding]:
    if settings.snapshot_url is None:
        return [warn("snapshot", "SNAPSHOT_URL is not set: only a ledger can be resumed")]

    def judge(place: str, answer: httpx.Response) -> Finding:
        headers, status = answer.headers, answer.status_code
        size = headers.get("content-range", "").rpartition("/")[2] or headers.get("content-length")
        if status in (200, 206):
            return ok("snapshot", f"{place} serves {size or 'an unknown number of'} bytes")
        grade = warn if settings.session_api_url else fail
        return grade("snapshot", f"{place} answers {status}: {_refused(status, settings)}")

    url, first_byte = settings.snapshot_url.get_secret_value(), {"Range": "bytes=0-0"}
    return [await _requested("snapshot", "SNAPSHOT_URL", url, judge, headers=first_byte, exit_code=69)]


async def _requested(
    subject: str,
    setting: str,
    url: str,
    judge: Callable[[str, httpx.Response], Finding],
    *,
    headers: Mapping[str, str] | None = None,
    exit_code: int = 1,
) -> Finding:
    """Request `url`, the value of `setting`, and let `judge` say what the answer means."""
    place = urlsplit(url).netloc
    try:
        async with (
            httpx.AsyncClient(trust_env=False) as http,
            exchange(http, "GET", url, headers=headers, timeout=PATIENCE) as answer,
        ):
            return judge(place, answer)
    except MalformedMessage as error:
        return fail(subject, f"{setting}: {error.reason}", exit_code)
    except (httpx.HTTPError, OSError) as error:
        return fail(subject, _unreachable(place, error, setting), exit_code)


async def _realtime(settings: Settings) -> list[Finding]:
    assert settings.realtime_url is not None, "read_environment requires it"
    key = settings.realtime_api_key.get_secret_value() if settings.realtime_api_key else None
    place = urlsplit(settings.realtime_url).netloc
    try:
        async with websockets.connect(endpoint(settings.realtime_url, key), proxy=None, close_timeout=0.5):
            return [ok("realtime", f"{place} accepts the socket")]
    except websockets.InvalidStatus as error:
        status = error.response.status_code
        body = printable(bytes(error.response.body or b"")[:200].replace(b"\n", b" ")).strip()
        remedy = "check REALTIME_API_KEY" if status in (401, 403) else "check REALTIME_URL (…/realtime/v1)"
        return [fail("realtime", f"{place} answers {status}{f' ({body})' if body else ''}; {remedy}")]
    except (OSError, websockets.WebSocketException) as error:
        return [fail("realtime", _unreachable(place, error, "REALTIME_URL"))]


async def _nats(settings: Settings) -> list[Finding]:
    """Connect with NATS_JWT and subscribe to the project, as the link would."""
    from agent.link.nats import try_connection  # its library is an extra

    assert settings.realtime_url is not None, "read_environment requires it"
    assert settings.nats_jwt is not None, "read_environment requires it"
    parts = urlsplit(settings.realtime_url)
    place = f"{parts.hostname}:{parts.port or NATS_PORT}"
    try:
        token = read_token(settings.nats_jwt.get_secret_value())
        greeting = await _greeting(str(parts.hostname), parts.port or NATS_PORT)
    except MalformedMessage as error:
        return [fail("nats", f"NATS_JWT: {error.reason}", 64)]
    except OSError as error:
        return [fail("nats", _unreachable(place, error, "REALTIME_URL"))]
    if not greeting.startswith(b"INFO "):
        said = printable(greeting[:60]).strip()
        return [fail("nats", f"{place}: no NATS server answers there, but {said!r}; check REALTIME_URL")]
    left = None if token.expires_at is None else token.expires_at - time.time()
    token = replace(token, nats_jwt=token.value)
    end = await try_connection(settings.realtime_url, str(settings.project_id), token, NATS_DEADLINES)
    if end is None:
        valid = "" if left is None else f", valid for {left:.0f} s"
        return [ok("nats", f"{place} takes NATS_JWT{valid}, and the subscription to the project")]
    if left is not None and left <= 0:
        renewal = "; SESSION_API_URL can give a new one" if settings.session_api_url else ""
        return [fail("nats", f"{place}: NATS_JWT expired {-left:.0f} s ago{renewal}")]
    return [fail("nats", f"{place}: {_nats_remedy(end)}")]


async def _greeting(host: str, port: int) -> bytes:
    """Return what a server says first; nothing, when it says nothing for two seconds. Raises OSError."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(2):
            return await reader.read(512)
    except TimeoutError:
        return b""
    finally:
        writer.transport.abort()


def _nats_remedy(end: ConnectionEnd) -> str:
    """Say what a failed connection to NATS means, and what to do."""
    if "permissions violation" in end.reason:
        return "NATS_JWT may not hear this project; is it of another session, or PROJECT_ID wrong?"
    remedy = {
        "refused": "NATS_JWT is refused; the server must include the accounts.conf of the orchestrator's nats-keys",
        "rate_limited": "the server has as many connections as it takes; raise its max_connections",
        "join_timeout": "the server took NATS_JWT, and did not answer the subscription",
    }.get(end.cause)
    if remedy is not None:
        return remedy
    if "TLS" in end.reason:
        return "the server speaks no TLS, and is not shown NATS_JWT; give it a certificate, or check REALTIME_URL"
    if "SSL" in end.reason:
        return "its certificate is not trusted; check it, or SSL_CERT_FILE for an authority of your own"
    return f"{end.reason}; does it run, and may this machine reach it?"


async def _session_api(settings: Settings) -> list[Finding]:
    if settings.session_api_url is None:
        return [warn("session api", "SESSION_API_URL is not set: no catch-up, no token renewal")]

    def judge(place: str, answer: httpx.Response) -> Finding:
        grade = warn if answer.status_code >= 500 else ok
        return grade("session api", f"{place} answers (HTTP {answer.status_code} at its base)")

    return [await _requested("session api", "SESSION_API_URL", settings.session_api_url, judge)]


def _refused(status: int, settings: Settings) -> str:
    """Say what a storage's refusal means, and what to do."""
    if status in (400, 401, 403, 404):
        new = "the session API gives another" if settings.session_api_url else "start a new session"
        return f"the signed URL has expired, or its object is gone; {new}"
    return "it may pass; `run` tries again"


def _unreachable(place: str, error: Exception, setting: str) -> str:
    """Say why `place` was not reached, and where to look."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (socket.gaierror, ssl.SSLError)):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, socket.gaierror):
        return f"{place}: the name has no address; check {setting} and this machine's DNS"
    if isinstance(cause, ssl.SSLError):
        return f"{place}: {cause.reason or cause}; check its certificate, or SSL_CERT_FILE behind a proxy of your own"
    said = str(error).partition("\n")[0] or type(error).__name__
    return f"{place}: {said}; does it run, may this machine reach it, is {setting} right?"
