"""Programs that misbehave: they ignore TERM, hide in other sessions, fork, print without end."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.core.errors import SettingsError
from agent.devserver import process
from agent.devserver.process import Child, printable
from agent.devserver.sandbox import Launch, Rights, User, environment, find_user
from tests.agent.processes import of_user, running, until

PLAIN = Rights()
ENV = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def word() -> str:
    """Something to know this test's processes by."""
    return f"preview-test-{secrets.token_hex(6)}"


async def start(
    script: str, on_line: Callable[[str], None] = lambda line: None, rights: Rights = PLAIN
) -> Child:
    return await Child.start(Launch(("sh", "-c", script), "/", ENV, rights), on_line=on_line)


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137)]
)
async def test_the_exit_code_is_the_programs(script: str, code: int) -> None:
    assert await (await start(script)).wait() == code


async def test_a_program_that_cannot_be_run_says_so(tmp_path: Path) -> None:
    done = await process.run(["no-such-program"], cwd=tmp_path, env=ENV, rights=PLAIN, timeout=10)
    assert done.code == 126
    assert "cannot run no-such-program: [Errno 2]" in done.tail[0]
    done = await process.run(["true"], cwd=tmp_path / "gone", env=ENV, rights=PLAIN, timeout=10)
    assert done.code == 126


@pytest.mark.parametrize(
    "word", ["x" * 200_000, "nul\0inside"], ids=["too long for the kernel", "no word at all"]
)
async def test_a_program_that_the_system_refuses_to_start_is_one_that_ended(word: str) -> None:
    lines: list[str] = []
    program = await Child.start(Launch(("echo", word), "/", ENV, PLAIN), on_line=lines.append)
    assert await program.wait() == 126
    assert await program.stop(1.0) == 126
    (line,) = lines
    assert line.startswith("cannot run echo: ")


async def test_no_process_left_for_it_is_an_ending_too() -> None:
    """As when the project's fork bomb has filled the container up to its limit."""
    source = """
import asyncio, os, resource
from pathlib import Path
from agent.devserver import process
from agent.devserver.sandbox import Rights
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
if os.geteuid() == 0:
    os.setresuid(54324, 54324, 54324)  # root has no such limit
done = asyncio.run(process.run(["true"], cwd=Path("/"), env={}, rights=Rights(), timeout=10))
print(done.code, done.tail[0])
"""
    done = await asyncio.create_subprocess_exec(
        sys.executable, "-c", source, cwd=Path(__file__).parents[3], stdout=asyncio.subprocess.PIPE
    )
    said = (await done.communicate())[0].decode()
    assert said.startswith("126 cannot run true: [Errno 11]"), said


async def test_a_program_that_ignores_term_is_killed_after_the_grace(word: str) -> None:
    lines: list[str] = []
    program = await start(f"trap '' TERM; echo up; while :; do sleep 0.05; done # {word}", lines.append)
    await until(lambda: lines)
    began = time.monotonic()
    assert await program.stop(0.3) == 137
    assert 0.3 <= time.monotonic() - began < 0.3 + process.KILL_WITHIN
    assert running(word) == []


async def test_one_that_obeys_is_not_waited_for() -> None:
    lines: list[str] = []
    program = await start("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.01; done", lines.append)
    await until(lambda: lines)
    began = time.monotonic()
    assert await program.stop(30) == 3
    assert time.monotonic() - began < 25, "it waited for the grace"
    assert (lines[0], lines[-1]) == ("up", "bye")


HIDES = "setsid -f sh -c 'trap \"\" TERM HUP; echo up; while :; do sleep 0.05; done # {word}'; {then}"
DAEMON = (
    "(setsid -f sh -c 'trap \"\" TERM HUP; cd /; exec <&- >&- 2>&-; while :; do sleep 0.05; done # {word}') "
    "& wait; echo up; {then}"
)
"""Forked twice, in a session of its own, with nothing of ours open: a daemon by the book."""


@pytest.mark.parametrize("how", [HIDES, DAEMON])
async def test_a_grandchild_in_its_own_session_goes_with_the_stop(word: str, how: str) -> None:
    lines: list[str] = []
    program = await start(how.format(word=word, then="sleep 60"), lines.append)
    await until(lambda: lines)
    await program.stop(0.1)
    assert running(word) == []


@pytest.mark.parametrize("how", [HIDES, DAEMON])
async def test_a_grandchild_does_not_outlive_a_program_that_ends_by_itself(word: str, how: str) -> None:
    lines: list[str] = []
    program = await start(how.format(word=word, then="sleep 0.3; exit 5"), lines.append)
    assert await program.wait() == 5
    assert lines == ["up"]
    assert running(word) == []


@pytest.mark.parametrize("end", ["agent", "guard"])
async def test_nothing_outlives_a_killed_agent_or_guard(word: str, end: str) -> None:
    """SIGKILL, so that no code can clean up: the lifeline and PDEATHSIG have to do it."""
    source = f"""
import asyncio, os, sys
from pathlib import Path
from agent.devserver.process import Child
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Launch, Rights
async def main():
    reaper = Reaper()
    reaper.adopt()
    script = {HIDES.format(word=word, then=f"trap '' TERM; sleep 60 # {word}")!r}
    launch = Launch(("sh", "-c", script), "/", {ENV!r}, Rights())
    program = await Child.start(launch, on_line=lambda line: print(line, flush=True), reaper=reaper)
    print(program.pid, flush=True)
    print("ended", await program.wait(), flush=True)
asyncio.run(main())
"""
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", source, stdout=asyncio.subprocess.PIPE)
    assert agent.stdout is not None
    said = {(await agent.stdout.readline()).strip() for _ in range(2)}
    guard = int((said - {b"up"}).pop())
    assert len(running(word)) >= 3
    if end == "agent":
        agent.kill()
        await until(lambda: running(word) == [], 30)
    else:
        os.kill(guard, signal.SIGKILL)
        await until(lambda: set(running(word)) <= {agent.pid}, 30)
        assert (await agent.stdout.readline()).strip() == b"ended 137"
    assert await agent.wait() == (-9 if end == "agent" else 0)
    assert running(word) == []


@needs_root
@pytest.mark.skipif(shutil.which("perl") is None, reason="the bomb is written in perl")
async def test_a_fork_bomb_stays_within_its_limit_and_is_removed() -> None:
    other = User("bomber", 54_321, 54_321, "/")
    rights = Rights(other, processes=40, files=64)
    program = await start(
        "exec perl -e 'while (1) { defined fork or select undef, undef, undef, 0.001 }'", rights=rights
    )
    await until(lambda: len(of_user(54_321)) >= 40)
    done = await process.run(["true"], cwd=Path("/"), env=ENV, rights=PLAIN, timeout=10)
    assert done.ok, "the agent itself could not start anything"
    assert len(of_user(54_321)) == 40
    await program.kill()
    assert of_user(54_321) == []


@needs_root
async def test_another_user_gets_no_group_and_no_way_back() -> None:
    other = User("other", 54_322, 54_322, "/tmp")
    lines: list[str] = []
    program = await start(
        "id -u; id -G; grep NoNewPrivs /proc/self/status; ulimit -n; ulimit -p; cat", lines.append,
        Rights(other, processes=99, files=77),
    )  # fmt: skip
    assert await program.wait() == 0
    assert lines == ["54322", "54322", "NoNewPrivs:\t1", "77", "99"]


async def test_output_comes_line_by_line_and_harmless() -> None:
    lines: list[str] = []
    script = (
        r"printf 'one\ntwo\r\n\033[31mred\033[0m \033]0;title\007bell\007\n'; echo err >&2; printf 'no end'"
    )
    await (await start(script, lines.append)).wait()
    assert lines == ["one", "two", "red bell\\x07", "err", "no end"]


def test_a_line_is_cut_and_cannot_forge_another() -> None:
    assert printable(b"x" * 10_000) == "x" * process.LONGEST_LINE + " … cut"
    assert "\n" not in printable("a\u2028b\u0085c".encode())
    assert "\u202e" not in printable("txt\u202eexe".encode())
    assert printable(b"\xff\xfe ok") == "\ufffd\ufffd ok"


async def test_a_program_that_prints_without_end_is_neither_blocked_nor_kept_in_memory() -> None:
    lengths: list[int] = []
    left_out: list[str] = []

    def on_line(line: str) -> None:
        lengths.append(len(line))
        if line.endswith(" MB left out"):
            left_out.append(line)

    done = await process.run(
        ["sh", "-c", "head -c 200000000 /dev/zero; yes | head -c 200000000; echo; echo the end"],
        cwd=Path("/"), env=ENV, rights=PLAIN, timeout=60, on_line=on_line,
    )  # fmt: skip
    assert done.ok
    assert max(lengths) <= 4 * process.LONGEST_LINE + 10, "a control character becomes four"
    assert len(lengths) < 100_000, "of a hundred million"
    assert left_out
    assert done.tail[-1] == "the end", "the last line is passed on, whatever was dropped before"


async def test_a_timeout_and_a_cancel_leave_nothing(word: str) -> None:
    script = ["sh", "-c", f"echo before; sleep 60 # {word}"]
    done = await process.run(script, cwd=Path("/"), env=ENV, rights=PLAIN, timeout=0.3)
    assert (done.timed_out, done.ok, done.tail) == (True, False, ("before",))
    task = asyncio.create_task(process.run(script, cwd=Path("/"), env=ENV, rights=PLAIN, timeout=60))
    await until(lambda: len(running(word)) >= 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running(word) == []


def test_the_environment_is_an_allow_list() -> None:
    given = {
        "PATH": "/bin", "HOME": "/root", "LC_ALL": "C", "REALTIME_TOKEN": "t", "SNAPSHOT_URL": "u", "NPM_TOKEN": "n",
        "AWS_SECRET_ACCESS_KEY": "k", "npm_config_registry": "r", "DEV_ENV_VITE_API": "a", "DEV_ENV_": "x",
        "DEV_ENV_PATH": "/mine", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1", "MALLOC_TRIM_THRESHOLD_": "1",
    }  # fmt: skip
    assert environment(given, user=None, more={"PORT": "1"}) == {
        "PATH": "/mine", "HOME": "/root", "LC_ALL": "C", "VITE_API": "a", "PORT": "1", "NO_COLOR": "1",
    }  # fmt: skip
    install = environment(given, user=User("u", 5, 5, "/home/u"), more={}, install=True)
    assert (install["npm_config_registry"], install["HOME"], install["USER"]) == ("r", "/home/u", "u")
    assert [name for name in install if name == "NPM_TOKEN" or name.startswith("MALLOC_")] == []


def test_a_user_that_is_nobody_or_root_is_refused() -> None:
    with pytest.raises(SettingsError, match="DEV_USER: there is no user 'no-such-user'"):
        find_user("no-such-user")
    with pytest.raises(SettingsError, match="DEV_USER: is root"):
        find_user("root")
