"""What the person at the terminal of `dev` says and sees: options, progress, the screen, the one line of a failure."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, urlencode

from psycopg.conninfo import conninfo_to_dict

from orchestrator_stub.platform.ignore_rules import NEVER


class CannotStart(Exception):
    """Why the stack does not start, and what to do, in one line."""


@dataclass(frozen=True, slots=True)
class DevOptions:
    """The command line of `dev`."""

    directory: Path
    state: Path
    port: int = 54321
    as_json: bool = False
    once: bool = False
    watch: bool = True
    database_url: str | None = None
    include: tuple[str, ...] = ()
    """Patterns, as git writes them, of what is sent although the ignore rules leave it out."""
    write_back: tuple[str, ...] = ()
    """Presets: what tools in the container make of them goes into the project, and into the directory."""
    editor: bool = True
    """Serve the editor page, and build it where it is not."""
    timeline: bool = False
    """Print how long each part of the start took."""
    faults: bool = False
    """Serve `/realtime/v1/faults`, by which the realtime server misbehaves on request."""
    transport: str = "realtime"
    """By which way the agent hears events; with `nats` they go both ways, for the page hears Realtime."""

    def check(self) -> None:
        """See whether there is a project, and that the state is none of its files: they are imported and served.

        Raises `CannotStart`, with nothing made yet.
        """
        wanted = "give the directory of a project"
        if not self.directory.is_dir():
            raise CannotStart(f"{self.directory} is no directory; {wanted}")
        places = (f"{deep}{name}" for deep in ("", "*/", "*/*/") for name in ("package.json", "index.html"))
        if not any(each.is_file() for place in places for each in self.directory.glob(place)):
            none = "has no package.json and no index.html, at the top or in its directories"
            raise CannotStart(f"{self.directory} {none}; {wanted}")
        try:
            directory, state = self.directory.resolve(), self.state.resolve()
        except (OSError, RuntimeError) as error:  # a loop of links
            raise CannotStart(f"cannot use the state directory {self.state}: {error}") from None
        inside = _below(state, directory)
        apart = "give --state a directory apart from it"
        if inside == "." or _below(directory, state) is not None:
            raise CannotStart(f"the state directory {self.state} holds the project {self.directory}; {apart}")
        if inside is not None and NEVER.isdisjoint(inside.split("/")):
            raise CannotStart(
                f"the state directory {self.state} is among the files of {self.directory}, which would have its keys "
                f"imported and served; {apart}, or {self.directory / '.preview-sync'}, and move away what is there"
            )


@dataclass(frozen=True, slots=True)
class DevInfo:
    """`STATE/dev.json` (protocol: local stack)."""

    orchestrator_url: str
    anon_key: str
    service_key: str
    database_url: str
    project_id: str
    session_id: str
    project_dir: str
    preview_url: str
    health_url: str
    agent_pid: int
    user_email: str
    user_password: str
    """The local user's, anew at each start: `signInWithPassword` takes them."""
    user_token: str
    """The same user's access token, for a program that does not sign in. Good for 30 days, as the session is."""
    nats_url: str | None = None
    """Where the agent hears events over NATS; None: it hears Realtime."""

    def for_page(self, project_name: str) -> dict[str, str]:
        """What the editor page is told: where everything is, and who signs in."""
        return {
            "anon_key": self.anon_key,
            "email": self.user_email,
            "password": self.user_password,
            "project_id": self.project_id,
            "project_name": project_name,
            "session_id": self.session_id,
            "preview_url": self.preview_url,
        }


def _below(path: Path, directory: Path) -> str | None:
    """Where `path` is below `directory`, "." for itself; None: elsewhere. It need not exist yet.

    Told by what the directories are, not by their names: names differ in case, and by mounts, where directories do not.
    """
    for ancestor in (path, *path.parents):
        with suppress(OSError):
            if ancestor.samefile(directory):
                return path.relative_to(ancestor).as_posix()
    return None


class Terminal:
    """What the person at the terminal sees: progress as it comes, with the seconds since the start.

    With `as_json`, standard output carries JSON lines only, and progress goes to standard error.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def step(self, text: str) -> None:
        """One line of progress."""
        stream = sys.stderr if self._as_json else sys.stdout
        with suppress(BrokenPipeError):
            stream.write(f"{self.seconds:6.1f} s  {text}\n")
            stream.flush()

    def show(self, text: str, form: Mapping[str, object]) -> None:
        """A result: the screen for a person, its JSON form for a program."""
        with suppress(BrokenPipeError):
            sys.stdout.write(json.dumps(form) + "\n" if self._as_json else text)
            sys.stdout.flush()


def screen(options: DevOptions, info: DevInfo, log: Path | None, seconds: float) -> str:
    """Where everything is, once the preview is served. `seconds`: since the start."""
    rows = {
        "Preview": info.preview_url,
        **({"Editor": f"{info.orchestrator_url}/"} if options.editor else {}),
        "Editing": str(options.directory.resolve()),
        "Supabase URL": f"{info.orchestrator_url}   (RPC, Storage, Realtime, /v1/sessions)",
        "Sign in as": f"{info.user_email}   {info.user_password}",
        "Database": info.database_url,
        "Agent": f"{info.health_url}/status",
        "Agent's log": str(log),
        "All of it": str(options.state / "dev.json"),
    }
    lines = "".join(f"    {name:<14}{value}\n" for name, value in rows.items())
    verb = "Save a file" if options.watch else "Write through the RPC"
    return (
        f"\n  The preview is served, {seconds:.1f} s after the start.\n\n{lines}\n"
        f"  {verb} and look at the preview. Ctrl-C stops everything and keeps the data.\n\n"
    )


def tail_of(log: Path | None, lines: int = 8) -> str:
    """The last lines of a log; empty where there is none."""
    if log is None:
        return ""
    with suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return ""


def progress(report: object) -> list[str]:
    """Say what an agent's `/status` says of its state and of each problem, one line each; nothing of a bad report."""
    if not isinstance(report, dict):
        return []
    lines = [f"the agent is {report['state']}"] if report.get("state") else []
    for problem in report.get("problems") or []:
        # Of an install's log the last line has the reason; of a sentence there is one.
        detail = str(problem.get("detail") or "").strip().splitlines() or [""]
        lines.append(": ".join(filter(None, (problem["kind"], problem.get("file_path"), detail[-1].strip()))))
    return lines


def as_url(dsn: str) -> str:
    """A connection string as a URL, which every client reads."""
    if "://" in dsn:
        return dsn
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    database = parts.pop("dbname", "postgres")
    return f"postgresql:///{quote(database)}?{urlencode(parts)}"
