"""Who else works on the machine: seen, counted apart from the run's own work, and reason enough to refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import bench.__main__ as command
from agent.devserver.guard import PR_SET_CHILD_SUBREAPER, prctl
from bench.harness.machine import Descendants, Others, Spent, own_descendants, taken_by_others, versions
from bench.harness.results import Ratio, Row, Unmeasurable

REPOSITORY = Path(__file__).parents[2]
BURN = "import time\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this kernel has no /proc/stat")


@pytest.mark.parametrize(
    ("after", "share"),
    [
        (Spent(20, 20, 0, 0), 0.0),  # idle
        (Spent(20, 5, 15, 0), 0.0),  # all of it ours
        (Spent(20, 5, 5, 0), 0.5),  # a program of others on one of two cores
        (Spent(20, 5, 5, 3), 0.35),  # some of it the kernel's
        (Spent(20, 5, 16, 0), 0.0),  # counted a little later than the idle time
        (Spent(0, 0, 0, 0), 0.0),
    ],
)
def test_what_is_neither_idle_nor_ours_nor_the_kernels_is_taken(after: Spent, share: float) -> None:
    assert taken_by_others(Spent(0, 0, 0, 0), after) == pytest.approx(share)


def test_the_runs_own_work_is_not_others() -> None:
    """The same second, seen from a process with a child that computes and from one without."""
    bystander = subprocess.Popen(["sleep", "60"])
    burning = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{BURN}"], stdout=subprocess.PIPE)
    try:
        assert burning.stdout is not None
        burning.stdout.readline()
        ours, theirs = Others(), Others(bystander.pid)
        before, started = psutil.Process(burning.pid).cpu_times(), time.monotonic()
        time.sleep(1)
        here, there = ours.share(), theirs.share()
        cores = os.cpu_count() or 1
        now = psutil.Process(burning.pid).cpu_times()
        burnt = (now.user + now.system - before.user - before.system) / (time.monotonic() - started) / cores
        assert there - here == pytest.approx(burnt, abs=0.1)
        assert there > here
    finally:
        for process in (bystander, burning):
            process.kill()
            process.communicate()


@contextmanager
def hogs() -> Iterator[None]:
    """As many programs of somebody else's as there are processors: none of them is below this process."""
    prctl(PR_SET_CHILD_SUBREAPER, 0)
    burn = f"import os\nif os.fork(): os._exit(0)\nprint(os.getpid(), flush=True)\n{BURN}"
    pids = []
    try:
        for _ in range(os.cpu_count() or 1):
            done = subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE, text=True)
            assert done.stdout is not None
            pids.append(int(done.stdout.readline()))
            done.wait()
            done.stdout.close()
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_a_run_beside_a_busy_program_is_refused_and_says_no_number(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(quick: bool) -> list[Row]:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            pass
        return [Row("it", 1234.5, "µs", "peer", 2345.6, Ratio(0.5263, 0.5262, 0.5264), at_most=0.7)]

    with hogs():
        result = command.measure("fake", run, True, 0, Descendants())
        text = capsys.readouterr().out
        assert "too noisy" in text
        assert "?" in text
        assert not [number for number in ("1234", "1,234", "2345", "2,345", "0.52", "0.53") if number in text]
        assert not [number for number in ("1234", "2345", "0.52") if number in json.dumps(result)]
        assert command.exit_code({"fake": result}) == 3

        # A run to be quoted is not even begun.
        refused = command.measure("fake", run, False, 0, Descendants())
    assert "others take" in str(refused["too_noisy"])
    assert command.exit_code({"fake": refused}) == 3


def test_what_a_measurement_leaves_running_is_ended_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    pids: list[int] = []

    def run(quick: bool) -> list[Row]:
        forgotten = "import subprocess\nprint(subprocess.Popen(['sleep', '987'], start_new_session=True, stdout=2).pid)"
        done = subprocess.run([sys.executable, "-c", forgotten], stdout=subprocess.PIPE, check=True)
        pids.append(int(done.stdout))
        raise Unmeasurable("it broke")

    with own_descendants() as family:
        result = command.measure("fake", run, True, 0, family)
    assert result == {"not_measured": "it broke"}
    assert "ended what it left running: sleep 987" in capsys.readouterr().out
    assert not psutil.pid_exists(pids[0])


def test_a_peer_that_is_not_installed_is_listed_without_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    there = versions()
    assert there["websockets"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert versions()["lsyncd"] is None
    assert set(versions()) == set(there)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: signal.Signals) -> None:
    """Interrupted as a terminal does it, every process of its group at once; or asked to stop alone."""
    with tempfile.TemporaryDirectory(prefix="b") as place:
        run = subprocess.Popen(
            [sys.executable, "-m", "bench", "mirror", "--quick", "--json", f"{place}.json"],
            cwd=REPOSITORY, env={**os.environ, "TMPDIR": place}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while not _with(place):
                assert run.poll() is None, run.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.05)
            if number == signal.SIGINT:
                os.killpg(run.pid, number)
            else:
                run.send_signal(number)
            said, _ = run.communicate(timeout=60)
            assert run.returncode == 130, said
            assert "nothing is written" in said
            assert not _with(place)
            assert os.listdir(place) == []
            assert not Path(f"{place}.json").exists()
        finally:
            run.kill()
            run.wait()


def _with(place: str) -> list[list[str]]:
    """The command lines that name something below the place."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if f"{place}/" in " ".join(line):
            found.append(line)
    return found
