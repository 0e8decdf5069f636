"""`preview-agent status` as a person and as a program meet it: real processes, a real terminal (a pty)."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from agent.cli.status import Style, render, sparkline
from agent.core.model import REMEDIES

NOW = 1_000_000.0


def report(**other: Any) -> dict[str, Any]:
    """What `/status` says of an agent at rest; `other` overrides."""
    return {
        "state": "serving", "ready": True, "agent_version": "1.2.3", "project_id": "p" * 36, "session_id": "s" * 36,
        "uptime_seconds": 90, "revision": 7, "head_revision": 7, "files": 3, "catch_up": [],
        "recent_lags_seconds": [0.004, 0.016, 0.008], "last_lag_seconds": 0.008, "hydrate": {"mode": "resume"},
        "link": {
            "state": "live", "why": "caught up", "since": NOW - 60, "last_frame_at": NOW - 3,
            "last_event_at": None, "last_catch_up_at": NOW - 60,
        },
        "dev_server": {"state": "ready", "reason": None, "url": "http://127.0.0.1:5173", "restarts": 0},
        "problems": [],
        **other,
    }  # fmt: skip


def problem(kind: str, path: str | None = None, detail: str = "so it is") -> dict[str, Any]:
    return {"kind": kind, "rule": None, "file_path": path, "detail": detail}


def test_the_screen_at_rest() -> None:
    assert render(report(), now=NOW) == [
        "serving preview-agent 1.2.3, up 90 s, resume",
        "  project    " + "p" * 36,
        "  session    " + "s" * 36,
        "  tree       revision 7 (at the head), 3 files",
        "  lag        ▃█▅   last 8 ms, worst 16 ms",
        "  link       live for 60 s; last frame 3 s ago, event never, catch-up 60 s ago",
        "  dev server ready at http://127.0.0.1:5173, restarted never",
    ]


def test_in_shadow_mode_the_comparison_stands_where_the_dev_server_does() -> None:
    shadow = {
        "live_dir": "/srv/app", "looks": 5, "looked_at": NOW - 1, "files": 9, "equal_since": NOW - 90,
        "unsettled": 0, "differences": {"differs": 0, "missing": 0, "extra": 0, "unreadable": 0}, "paths": [],
    }  # fmt: skip

    def row(**other: Any) -> str:
        return render(report(shadow={**shadow, **other}), now=NOW)[-1]

    assert row(looks=0) == "  shadow     of /srv/app: not compared yet"
    assert row() == "  shadow     of /srv/app: equal for 90 s; 9 files, looked 1 s ago"
    found = row(equal_since=None, unsettled=2, differences={"differs": 1, "missing": 2, "extra": 0})
    assert found == "  shadow     of /srv/app: 1 differs, 2 missing, 2 in flight; 9 files, looked 1 s ago"


def test_what_tools_made_and_the_project_has_not_taken_is_shown_with_its_reason() -> None:
    given: dict[str, Any] = {
        "rules": 2, "states": {"offered": 1, "refused": 1}, "offers_waiting": 1, "outcomes": {},
        "halted": None, "failure": "HTTP 503", "left_out": 0, "kept_refused": 0, "unwatched_directories": 0,
        "paths": [
            {"file_path": "lock", "state": "offered", "rule": None},
            {"file_path": "gen/a", "state": "refused", "rule": "text"},
        ],
    }  # fmt: skip
    assert render(report(write_back=given), now=NOW)[-3:] == [
        "  write-back 1 offered, 1 refused; 1 to be answered (HTTP 503)",
        "             lock: offered",
        "             gen/a: refused (text)",
    ]
    given |= {"states": {}, "offers_waiting": 0, "failure": None, "paths": []}
    assert render(report(write_back=given), now=NOW)[-1] == "  write-back nothing waits; 0 to be answered"


def test_what_is_wrong_says_what_to_do_once_for_each_kind() -> None:
    refused = [problem("path_refused", f"a{n}\\b", f"cannot use path 'a{n}\\b': backslash") for n in range(9)]
    last = "GET /\nSyntaxError: boom\n    at parse (x.js)\n    at main (y.js)"
    link = {**report()["link"], "state": "backoff", "why": "closed 1001"}
    text = "\n".join(
        render(
            report(
                state="degraded", ready=False, head_revision=9, catch_up=["gap"], link=link, recent_lags_seconds=[],
                problems=[*refused, problem("dev_server_failed", None, last), problem("of_the_future")],
            ),
            now=NOW,
        )
    )  # fmt: skip
    assert text.startswith("degraded (not ready)   preview-agent")
    assert "revision 7 (2 behind the head, 9)" in text
    assert "lag        –   no event yet" in text
    assert "link       backoff (closed 1001) for 60 s" in text
    assert "catch-up   wanted: gap" in text
    assert "path_refused, 9 times" in text
    assert "… and 6 more in --json" in text
    assert text.count(REMEDIES["path_refused"]) == 1
    assert "SyntaxError: boom\n" in text, "of a log's tail the reason"
    assert f"→ {REMEDIES['dev_server_failed']}" in text
    assert "of_the_future\n             so it is" in text
    assert len(text.splitlines()) <= 24


def test_a_project_writes_nothing_to_the_operators_terminal() -> None:
    nasty = "\x1b[2J\x1b]0;owned\x07\x1b[31merror\x9b2J\r: x\x08y"
    text = "\n".join(render(report(problems=[problem("drift", "a\x1b[1Ab", nasty)]), now=NOW))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "error" in text


@pytest.mark.parametrize("columns", [20, 34, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_left_out(columns: int) -> None:
    lags = [n / 1000 for n in range(40)]
    told = report(recent_lags_seconds=lags, problems=[problem("drift", "src/a.ts")])
    plain, painted = (render(told, now=NOW, style=Style(columns, colour)) for colour in (False, True))
    assert [line for line in plain[1:] if len(line) > columns] == []
    assert "".join(REMEDIES["drift"].split()) in "".join("".join(plain).split())
    assert [re.sub(r"\x1b\[\d*m", "", line) for line in painted] == plain
    assert "\x1b[32mserving\x1b[0m" in painted[0]


def test_a_sparkline_ends_at_its_largest() -> None:
    assert sparkline([0.0, 1.0, 8.0]) == "▁▂█"
    assert sparkline([0.0]) == "▁"


# --- the command


class Agent(HTTPServer):
    """Answers `/status` with `said`."""

    said: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def an_agent(said: Any) -> Iterator[Agent]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(server.said).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = Agent(("127.0.0.1", 0), Answer)
    server.said = said
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "agent", "status", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=30)


def test_the_exit_code_is_readiness_and_json_is_whole() -> None:
    with an_agent(report()) as agent:
        done = run("--url", agent.url)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("serving preview-agent 1.2.3")
        assert "\x1b" not in done.stdout
        agent.said = report(ready=False, state="starting")
        done = run("--url", agent.url, "--json")
        assert done.returncode == 1
        assert json.loads(done.stdout) == agent.said
        agent.said = ["something", "else"]
        done = run("--url", agent.url)
        assert (done.returncode, done.stdout) == (69, "")
        assert "what answers there is something else" in done.stderr
    done = run("--url", agent.url)
    assert done.returncode == 69
    assert "is it running, and is this its HEALTH_PORT?" in done.stderr


def test_watching_into_a_pipe_is_plain_text_as_it_comes() -> None:
    with (
        an_agent(report()) as agent,
        subprocess.Popen(command("--url", agent.url, "--watch"), stdout=subprocess.PIPE) as watching,
    ):
        assert watching.stdout is not None
        first = [watching.stdout.readline().decode() for _ in range(8)]
        agent.said = report(ready=False, state="degraded")
        second = [watching.stdout.readline().decode() for _ in range(8)]
        watching.send_signal(signal.SIGINT)
        rest = watching.stdout.read()
        assert watching.wait(20) == 1, "as ready as at the last look"
    assert first[0].startswith("serving ")
    assert first[-1] == "\n"
    assert second[0].startswith("degraded (not ready)")
    assert b"\x1b" not in "".join([*first, *second]).encode() + rest


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    with an_agent(report()) as agent:
        watching = subprocess.Popen(
            command("--url", agent.url, "--watch", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert watching.stdout is not None
        assert watching.stderr is not None
        assert json.loads(watching.stdout.readline()) == report()
        watching.stdout.close()
        assert watching.wait(20) == 141
        assert watching.stderr.read() == b""
        watching.stderr.close()


@contextmanager
def a_terminal(arguments: list[str], columns: int, rows: int, **environ: str) -> Iterator[tuple[int, int]]:
    """The command on a terminal of its own: its process id, and the terminal's other end."""
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.execve(sys.executable, command(*arguments), {**os.environ, "TERM": "xterm-256color", **environ})
    try:
        yield pid, terminal
    finally:
        os.close(terminal)


def read_until(terminal: int, wanted: str, seen: str = "") -> str:
    deadline = time.monotonic() + 30
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        try:
            seen += os.read(terminal, 65536).decode()
        except OSError as error:
            if error.errno == errno.EIO:  # the other side is gone
                break
            raise
    assert wanted in seen, seen
    return seen


def test_watching_on_a_terminal_draws_over_itself_and_ends_cleanly() -> None:
    with (
        an_agent(report()) as agent,
        a_terminal(["--url", agent.url, "--watch"], 60, 24) as (pid, terminal),
    ):
        seen = read_until(terminal, "\x1b[J")
        assert "\x1b[32mserving\x1b[0m" in seen
        height = seen.count("\n")
        agent.said = report(ready=False, state="halted")
        seen = read_until(terminal, "\x1b[31mhalted")
        seen = read_until(terminal, "\x1b[J", seen)
        assert f"\x1b[{height}A" in seen, "back up over what stood there"
        assert "\x1b[2J" not in seen, "what was on the terminal before stays"
        os.write(terminal, b"\x03")
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 1
        seen = read_until(terminal, "\r\n")
        assert "Traceback" not in seen


def test_a_low_terminal_gets_no_more_than_it_has_and_no_colour_when_told() -> None:
    problems = [problem("drift", f"src/{n}.ts") for n in range(3)]
    with (
        an_agent(report(problems=problems)) as agent,
        a_terminal(["--url", agent.url, "--watch"], 40, 6, NO_COLOR="1") as (pid, terminal),
    ):
        seen = read_until(terminal, "more lines\r\n")
        os.write(terminal, b"\x03")
        os.waitpid(pid, 0)
        screen = seen[: seen.index("more lines")]
        assert screen.count("\n") < 6
        assert not re.search(r"\x1b\[\d+m", seen)
