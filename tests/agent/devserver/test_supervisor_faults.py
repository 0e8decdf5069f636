"""Dev servers that bind late, never, die, hang or answer wrongly: real processes, real sockets, short deadlines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from agent import net
from agent.config import Settings
from agent.core.errors import DevServerFailed
from agent.core.model import RelPath
from agent.devserver import forward
from agent.devserver.listeners import Listener
from agent.devserver.output import LOGGED_LINES
from agent.devserver.state import Phase, RestartPolicy
from agent.devserver.supervisor import Supervisor
from agent.telemetry.metrics import Metrics
from tests.agent.processes import running, until
from tests.ports import free_port

SERVER = Path(__file__).with_name("dev_server.py")
QUICK = RestartPolicy(start_timeout=5.0, backoff_first=0.02, backoff_most=0.1, debounce=0.05)


@contextlib.asynccontextmanager
async def supervised(
    tmp_path: Path,
    *command: str,
    policy: RestartPolicy = QUICK,
    essential: bool = False,
    host: str = "127.0.0.1",
    probe_seconds: float = 0.3,
) -> AsyncIterator[Supervisor]:
    project = tmp_path / "project"
    project.mkdir(exist_ok=True)
    settings = Settings(
        project_id=UUID(int=1), session_id=UUID(int=1), project_dir=project, dev_host=host,
        dev_port=free_port(), dev_probe_seconds=probe_seconds, dev_essential=essential, dev_stop_seconds=0.3,
        dev_command=command or None,
    )  # fmt: skip
    supervisor = Supervisor(settings, policy=policy, metrics=Metrics(), chance=lambda: 0.5)
    task = asyncio.create_task(supervisor.run(), name="supervisor")
    supervisor.project_ready()
    try:
        yield supervisor
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ExceptionGroup):
            await task
        assert running(str(SERVER)) == []


def server(mode: str) -> Sequence[str]:
    return sys.executable, str(SERVER), mode


def reached(supervisor: Supervisor, state: Phase, restarts: int = 0) -> bool:
    return supervisor.state is state and supervisor.restarts >= restarts


async def test_one_that_binds_late_is_waited_for(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("late")) as supervisor:
        await until(lambda: supervisor.ready)
        assert supervisor.restarts == 0


@pytest.mark.parametrize("where", ["_find", "_carry_out", "_probe"])
async def test_a_bug_costs_one_try_and_not_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real, left = getattr(Supervisor, where), 1

    def fails(*given: object) -> object:
        nonlocal left
        left -= 1
        if left >= 0:
            raise KeyError("a bug")
        return real(*given)

    async def later(*given: object) -> object:
        return await fails(*given)  # type: ignore[misc]

    monkeypatch.setattr(Supervisor, where, later if where == "_probe" else fails)
    # A start that nobody inspects ends by its timeout alone: on a busy machine any number of them may be needed.
    late = 1.0 if where == "_probe" else 60.0
    policy = RestartPolicy(start_timeout=late, backoff_first=0.02, debounce=0.05, max_crashes=1000)
    async with supervised(tmp_path, *server("late"), policy=policy) as supervisor:
        await until(lambda: supervisor._errors.counts)
        supervisor.files_changed({RelPath("package.json")})
        await until(lambda: supervisor.ready)
        assert supervisor._errors.counts == {"dev-server": 1}


async def test_one_that_never_binds_is_ended_and_tried_again(tmp_path: Path) -> None:
    policy = RestartPolicy(start_timeout=0.4, backoff_first=0.02)
    async with supervised(tmp_path, *server("never"), policy=policy) as supervisor:
        await until(lambda: supervisor.restarts >= 2)
        assert supervisor.report()["reason"] == "late"
        assert not supervisor.ready
        await until(supervisor.problems)
        (problem,) = supervisor.problems()
        assert problem.detail.startswith(
            f"nothing answered at {supervisor.url} in 0.4 s, and nothing of the project listens; set DEV_COMMAND"
        )


async def test_one_that_dies_while_serving_is_back_at_once(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("dies-on-third")) as supervisor:
        await until(lambda: supervisor.ready)
        await until(lambda: reached(supervisor, Phase.READY, restarts=1))


async def test_a_crash_loop_fails_says_why_and_ends_with_the_right_change(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("crashes")) as supervisor:
        await until(lambda: supervisor.state is Phase.FAILED)
        assert supervisor.restarts == 4
        (problem,) = supervisor.problems()
        assert (problem.kind, problem.rule) == ("dev_server_failed", "exit")
        assert "a plugin is broken" in problem.detail
        supervisor.files_changed({RelPath("public/picture.png")})
        await asyncio.sleep(0.3)
        assert supervisor.state is Phase.FAILED
        assert supervisor.restarts == 4
        (tmp_path / "project" / "fixed").touch()
        supervisor.files_changed({RelPath("vite.config.ts")})
        await until(lambda: supervisor.ready)
        assert supervisor.problems() == ()


async def test_a_package_json_nested_to_any_depth_is_a_problem_until_it_is_fixed(tmp_path: Path) -> None:
    async with supervised(tmp_path) as supervisor:
        await until(lambda: supervisor.state is Phase.ABSENT)
        package = tmp_path / "project" / "package.json"
        for depth in range(900, 1001):
            package.write_text('{"dependencies": ' + '{"a":' * depth + "1" + "}" * depth + "}")
            supervisor.files_changed({RelPath("package.json")})
        await until(lambda: [each.kind for each in supervisor.problems()] == ["install_failed"])
        (problem,) = supervisor.problems()
        assert problem.rule == "package_json"
        assert problem.detail == "cannot read package.json: it is nested too deep"
        package.write_text('{"scripts": {"dev": "sleep 60"}}')
        supervisor.files_changed({RelPath("package.json")})
        await until(lambda: supervisor.problems() == ())


async def test_one_that_is_essential_ends_the_agent_when_it_fails_for_good(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("crashes"), essential=True):
        (task,) = (t for t in asyncio.all_tasks() if t.get_name() == "supervisor")
        await until(task.done)
        error = task.exception()
        assert isinstance(error, ExceptionGroup)
        assert isinstance(error.exceptions[0], DevServerFailed)
        assert error.exceptions[0].exit_code == 75


async def test_a_hung_server_is_restarted(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("good")) as supervisor:
        await until(lambda: supervisor.ready)
        guard = supervisor.report()["pid"]
        (program,) = (pid for pid in running(str(SERVER)) if pid != guard)
        os.kill(program, signal.SIGSTOP)
        await until(lambda: reached(supervisor, Phase.READY, restarts=1))
        restarts = supervisor._metrics.dev_server_restarts.labels("hung")
        assert restarts._value.get() == 1


async def test_one_whose_entry_module_fails_is_up_and_says_so_until_it_is_fixed(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("broken")) as supervisor:
        await until(lambda: supervisor.ready)
        (problem,) = supervisor.problems()
        assert (problem.kind, problem.rule) == ("preview_error", "entry")
        assert problem.detail == "the entry module /main.js answers 500"
        (tmp_path / "project" / "fixed").touch()
        await until(lambda: supervisor.problems() == ())
        assert (supervisor.state, supervisor.restarts) == (Phase.READY, 0)


@pytest.mark.parametrize(
    ("mode", "rule", "said"),
    [
        ("status-404", "status", "GET / answers 404"),
        ("status-401", "status", "GET / answers 401"),
        ("status-500", "status", "GET / answers 500"),
        ("status-307-http://localhost:PORT/home", "redirect", "a visitor's browser finds nothing"),
        ("status-302-/", "redirect", "redirects without end"),
        ("status-302-https://login.example.com/x", None, "redirects to https://login.example.com/x"),
        ("status-302-http://[", "redirect", "redirects to no page"),
    ],
)
async def test_whatever_the_page_answers_the_server_is_up(
    tmp_path: Path, mode: str, rule: str | None, said: str
) -> None:
    async with supervised(tmp_path, *server(mode)) as supervisor:
        await until(lambda: supervisor.ready)
        assert [(p.kind, p.rule) for p in supervisor.problems()] == (
            [("preview_error", rule)] if rule else []
        )
        assert said in str(supervisor.report()["detail"])


async def test_a_page_that_takes_longer_than_a_probe_is_slow_and_not_silent(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("slow")) as supervisor:
        await until(lambda: supervisor.ready)
        first = supervisor._inspection
        await until(
            lambda: supervisor._inspection is not first
        )  # a whole inspection later: page and entry, 1 s each
        assert (supervisor.state, supervisor.restarts) == (Phase.READY, 0)


async def test_a_server_that_speaks_https_is_up(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    subprocess.run(  # noqa: ASYNC221 - nothing else is going on yet
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem", "-days",
         "2", "-subj", "/CN=localhost"], cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    both = (tmp_path / "key.pem").read_text() + (tmp_path / "cert.pem").read_text()
    (tmp_path / "project" / "certificate.pem").write_text(both)
    async with supervised(tmp_path, *server("https")) as supervisor:
        await until(lambda: supervisor.ready)
        assert supervisor.url.startswith("https://127.0.0.1:")
        assert supervisor.problems() == ()


async def test_an_answer_without_end_does_not_fill_memory(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("endless")) as supervisor:
        await until(lambda: supervisor.ready)
        (problem,) = supervisor.problems()
        assert (problem.kind, problem.rule) == ("preview_error", "entry")


async def test_a_page_without_its_socket_is_served_and_says_so_for_as_long(tmp_path: Path) -> None:
    async with supervised(tmp_path, *server("socketless")) as supervisor:
        await until(lambda: supervisor.ready)
        assert [problem.kind for problem in supervisor.problems()] == ["hmr_unreachable"]
        first = supervisor._inspection
        await until(lambda: supervisor._inspection is not first)
        assert [problem.kind for problem in supervisor.problems()] == ["hmr_unreachable"], (
            "at the next probe too"
        )


def outside() -> str:
    """An address of this machine that is not loopback; skips where there is none."""
    (first, *_) = net.visitors_hosts("::")
    if first == "127.0.0.1":
        pytest.skip("this machine has no address but loopback's")
    return first


async def answered(host: str, port: int) -> int:
    async with httpx.AsyncClient(trust_env=False) as http:
        return (await http.get(f"http://{f'[{host}]' if ':' in host else host}:{port}/")).status_code


async def test_one_that_listens_on_loopback_alone_is_reached_from_outside(tmp_path: Path) -> None:
    """With DEV_HOST everywhere, as on a machine of its own, where visitors come from another one."""
    host = outside()
    async with supervised(tmp_path, *server("good"), host="::") as supervisor:
        await until(lambda: supervisor.ready)
        port = supervisor._settings.dev_port
        assert await answered(host, port) == 200
        assert supervisor.report()["listens_on"] == f"127.0.0.1:{port}"


def _listeners(supervisor: Supervisor) -> Sequence[Listener]:
    return supervisor._elsewhere._listeners if supervisor._elsewhere else ()


async def test_one_that_listens_on_another_port_is_found_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "SETTLED_SECONDS", 0.1)
    monkeypatch.setattr(forward, "READ_EVERY", 0.1)
    async with supervised(tmp_path, "sh", "-c", f"{sys.executable} {SERVER} elsewhere; true") as supervisor:
        await until(lambda: supervisor.ready)
        where = str(supervisor.report()["listens_on"])
        assert where.startswith("127.0.0.1:")
        assert where != f"127.0.0.1:{supervisor._settings.dev_port}"
        assert await answered("127.0.0.1", supervisor._settings.dev_port) == 200
        (program,) = running(f"{SERVER} elsewhere")[-1:]
        os.kill(program, signal.SIGKILL)
        await until(lambda: reached(supervisor, Phase.READY, restarts=1))
        assert await answered("127.0.0.1", supervisor._settings.dev_port) == 200


async def test_one_that_listens_where_visitors_come_and_is_slow_is_not_taken_for_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "READ_EVERY", 0.05)
    async with supervised(tmp_path, *server("slow"), probe_seconds=5) as supervisor:
        await until(lambda: _listeners(supervisor))
        await until(lambda: supervisor.ready)
        await until(lambda: not [t for t in asyncio.all_tasks() if t.get_name().startswith("elsewhere")])
        assert supervisor.report()["listens_on"] is None
        assert supervisor.problems() == ()


async def test_of_two_that_listen_elsewhere_none_is_guessed_and_both_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "SETTLED_SECONDS", 0.1)
    monkeypatch.setattr(forward, "READ_EVERY", 0.1)
    policy = RestartPolicy(start_timeout=2.0, backoff_first=0.02)
    async with supervised(tmp_path, *server("two"), policy=policy) as supervisor:
        await until(lambda: len(_listeners(supervisor)) == 2)
        ports = [each.port for each in _listeners(supervisor)]
        await until(supervisor.problems)
        (problem,) = supervisor.problems()
        assert problem.rule == "late"
        assert all(f"127.0.0.1:{port}" in problem.detail for port in ports)
        assert "set DEV_PORT" in problem.detail


async def test_a_port_that_another_process_holds_is_a_problem_until_it_is_free(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        project = tmp_path / "project"
        project.mkdir()
        settings = Settings(
            project_id=UUID(int=1), session_id=UUID(int=1), project_dir=project, dev_host="127.0.0.1",
            dev_port=other.getsockname()[1], dev_command=tuple(server("good")),
        )  # fmt: skip
        supervisor = Supervisor(settings, policy=RestartPolicy(backoff_first=0.01, backoff_most=0.02))
        task = asyncio.create_task(supervisor.run())
        supervisor.project_ready()
        await until(lambda: supervisor.restarts > 2 * RestartPolicy().max_crashes)
        (problem,) = supervisor.problems()
        assert problem.kind == "port_taken"
        assert problem.detail == (
            f"port {settings.dev_port} is taken by another program: end that one, or set DEV_PORT to a free port"
        )
    await until(lambda: supervisor.ready)
    assert supervisor.problems() == ()
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
async def test_an_outdated_dependency_cache_is_left_behind_once(tmp_path: Path) -> None:
    modules = tmp_path / "project" / "node_modules"
    (modules / ".bin").mkdir(parents=True)
    (modules / "vite").mkdir()
    (tmp_path / "project" / "package.json").write_text('{"scripts": {"dev": "vite"}}')
    program = f"['{sys.executable}', '{SERVER}', 'outdated', ...process.argv.slice(2)]"
    (modules / "vite/vite.js").write_text(
        f"#!/usr/bin/env node\nconst [run, ...given] = {program}\n"
        "require('child_process').spawnSync(run, given, { stdio: 'inherit' })\n"
    )
    (modules / "vite/vite.js").chmod(0o755)
    (modules / ".bin/vite").symlink_to("../vite/vite.js")
    async with supervised(tmp_path) as supervisor:
        await until(lambda: supervisor.ready)
        assert supervisor.restarts == 1
        (served,) = running(f"{SERVER}\0outdated")
        assert "--force" in Path(f"/proc/{served}/cmdline").read_text()


async def test_the_last_200_lines_are_in_the_report_and_the_log_is_spared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = (
        f"i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; exec {sys.executable} {SERVER} good"
    )
    async with supervised(tmp_path, "sh", "-c", noise) as supervisor:
        await until(lambda: supervisor.ready)
        log = supervisor.report()["log"]
        assert isinstance(log, list)
        assert log == [f"line {n}" for n in range(4800, 5000)]
        assert "log" not in supervisor.report(log=False)
    assert capsys.readouterr().out.count("dev_server.output ") <= 10 * LOGGED_LINES


async def test_after_hurry_a_stubborn_server_is_not_waited_for(tmp_path: Path) -> None:
    async with supervised(
        tmp_path, "sh", "-c", f"trap '' TERM; {sys.executable} {SERVER} good"
    ) as supervisor:
        await until(lambda: supervisor.ready)
        supervisor.kill_now()
        await until(lambda: supervisor.state is not Phase.READY)


async def test_a_directory_without_package_json_stays_absent(tmp_path: Path) -> None:
    async with supervised(tmp_path) as supervisor:
        await asyncio.sleep(0.2)
        assert supervisor.state is Phase.ABSENT
        (tmp_path / "project" / "package.json").write_text('{"scripts": {"dev": "sleep 60"}}')
        supervisor.files_changed({RelPath("package.json")})
        await until(lambda: supervisor.state is Phase.STARTING)


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A control group with 32 MB, where this machine lets us make one."""
    for parent, limit in (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    ):
        group = Path(parent, f"preview-test-{os.getpid()}")
        try:
            group.mkdir()
            (group / limit).write_text(str(32 * 2**20))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        yield group
        group.rmdir()
        return
    pytest.skip("no control group for memory can be made here")


async def test_a_kill_for_memory_is_recognised(tmp_path: Path, small_memory: Path) -> None:
    script = f"echo $$ >{small_memory}/cgroup.procs; exec perl -e '$x = q(x) x 300_000_000; sleep 60'"
    async with supervised(tmp_path, "sh", "-c", script) as supervisor:
        await until(lambda: supervisor.state in (Phase.BACKOFF, Phase.FAILED))
        assert supervisor.report()["reason"] == "oom"
