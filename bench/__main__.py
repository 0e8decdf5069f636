"""The command: runs measurements one after the other, prints their rows, writes them down. `--help` says how."""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog

from bench import cases
from bench.harness.machine import Descendants, Others, busiest, machine, own_descendants, versions
from bench.harness.publish import RESULTS, keep
from bench.harness.results import BUSIEST, TAKEN, Result, Row, Unmeasurable, figure
from orchestrator_stub.machines.local import ALLOCATOR

Run = Callable[[bool], Sequence[Row]]

ABOUT = """Measure this project beside what people use today, in one run on one machine. Contestants take turns, round
by round, and a ratio is formed within each round, so that what slows the machine slows both."""

READING = """
a row:
  ratio [interval of 95 % confidence]  bound  result  name  what the ratio is of  medians
  time, memory: less is better; speed: more is.

results:
  met        the whole interval is on the right side of the bound
  NOT MET    the whole interval is on the wrong side
  measured   there is no bound
  too noisy  nothing can be said, so no number is given: the interval lies across the bound or is wider than 30 % of
             the ratio, or others took more than 10 % of the processors meanwhile. Stop what they run, and run it again.

  peer failed  it lost files, or ended, so that there is nothing to compare with

exit code:
  0 every bound is met, 1 one is not met, 2 a measurement failed, 3 too noisy to say, 130 interrupted
  A comparison without a bound that is too noisy says so in its row, and changes nothing here.

examples:
  python -m bench --quick mirror        whether a measurement works; its numbers are not to be quoted
  python -m bench apply link            two of them, properly
  python -m bench --save                all of them; bench/results/, README.md and docs/measured.md then show this run
"""


def measurements() -> dict[str, str]:
    """The first line of each module with a `run`, by name; nothing is imported for it."""
    found = {}
    for info in pkgutil.iter_modules(cases.__path__):
        source = Path(cases.__path__[0], f"{info.name}.py").read_text()
        tree = ast.parse(source)
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            found[info.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def modules(wanted: Sequence[str]) -> dict[str, Run]:
    """The measurements by name. Raises `SystemExit` naming one that does not exist."""
    there = measurements()
    for name in wanted:
        if name not in there:
            raise SystemExit(f"bench: there is no measurement {name!r}; there are: {', '.join(there)}")
    return {
        name: importlib.import_module(f"bench.cases.{name}").run
        for name in there
        if not wanted or name in wanted
    }


def line(row: Row) -> str:
    """One row, the ratio first."""
    noisy = row.result is Result.TOO_NOISY
    if row.ratio is None:
        ratio = ""
    elif noisy:
        ratio = "?"
    else:
        ratio = figure(row.ratio.value)
    bound = ""
    if row.at_least is not None:
        bound = f"≥ {row.at_least:g}"
    elif row.at_most is not None:
        bound = f"≤ {row.at_most:g}"
    if noisy:
        figures = f"against {row.peer}" if row.peer else ""
    else:
        figures = f"{row.ours:,.1f} {row.unit}" + (f", {row.peer} {row.theirs:,.1f}" if row.theirs else "")
    spread = ""
    if row.ratio is not None and not row.disturbed:
        spread = f" [{figure(row.ratio.low)}–{figure(row.ratio.high)}]"
    if row.failure:
        figures += f", {row.peer} {row.failure}"
    text = f"{ratio:>7}{spread:<16} {bound:<7} {row.result:<9} {row.name:<34} {row.sense:<6} {figures}"
    if row.waited > BUSIEST:
        text += f"  (waited for a processor {row.waited:.0%} of the time)"
    if row.note and not noisy:  # there may be numbers in it
        text += f"  ({row.note})"
    return text


def quiet(patience: float) -> str | None:
    """Wait for it up to so many seconds; None when it is quiet, else who disturbs."""
    deadline = time.monotonic() + patience
    said = False
    while True:
        taken, who = busiest()
        if taken <= TAKEN:
            return None
        reason = f"others take {taken:.0%} of the processors" + (
            f", most of all {', '.join(who)}" if who else ""
        )
        if time.monotonic() >= deadline:
            return reason
        if not said:
            print(f"  waiting up to {patience:.0f} s for a quiet machine: {reason}", flush=True)
            said = True


def measure(name: str, run: Run, quick: bool, patience: float, family: Descendants) -> dict[str, object]:
    """One measurement, printed; what is to be kept of it."""
    started = time.monotonic()
    if not quick and (reason := quiet(patience)):
        print(f"  too noisy: {reason}")
        return {"too_noisy": reason}
    others = Others()
    try:
        rows = run(quick)
    except Unmeasurable as reason:
        print(f"  not measured: {reason}")
        return {"not_measured": str(reason)}
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return {"failed": traceback.format_exc(limit=1)}
    finally:
        for left in family.end():
            print(f"  ended what it left running: {left}")
    taken = round(others.share(), 3)
    rows = [dataclasses.replace(row, taken=taken) for row in rows]
    for row in rows:
        print(line(row))
    seconds = time.monotonic() - started
    print(
        f"  {seconds:.0f} s; others took {taken:.0%} of the processors"
        + (": too noisy" if taken > TAKEN else "")
    )
    return {"seconds": round(seconds), "others": taken, "rows": [row.as_json() for row in rows]}


def exit_code(results: dict[str, dict[str, object]]) -> int:
    """See `--help`."""
    bounded: set[object] = set()
    for result in results.values():
        rows = result.get("rows", ())
        assert isinstance(rows, Sequence)
        bounded |= {
            row["result"] for row in rows if row["at_least"] is not None or row["at_most"] is not None
        }
    if any("failed" in result for result in results.values()):
        return 2
    if Result.NOT_MET in bounded:
        return 1
    refused = Result.TOO_NOISY in bounded or any("too_noisy" in result for result in results.values())
    return 3 if refused else 0


def settled() -> None:
    """Start this program again with the allocator of an agent, which glibc asks its environment for at the start only.

    No child inherits it: peers have their own.
    """
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ALLOCATOR})
    for name in ALLOCATOR:
        del os.environ[name]


def commit() -> str | None:
    """The code that is measured; None outside of git."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


@contextlib.contextmanager
def swept() -> Iterator[Descendants]:
    """No process and no temporary file of the run outlives it, however it ends. TERM ends it as Ctrl-C does."""
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    # Said outright: a shell's `&` starts programs with it ignored.
    on_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    kept, environ = tempfile.tempdir, os.environ.get("TMPDIR")
    place = tempfile.mkdtemp(prefix="bench-")
    os.chmod(place, 0o711)  # the database runs as a user of its own
    tempfile.tempdir = os.environ["TMPDIR"] = place
    try:
        with own_descendants() as family:
            try:
                yield family
            finally:
                signal.signal(
                    signal.SIGINT, signal.SIG_IGN
                )  # sweeping takes a second, and is not to be cut short
    finally:
        tempfile.tempdir = kept
        if environ is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = environ
        shutil.rmtree(place, ignore_errors=True)
        signal.signal(signal.SIGTERM, earlier)
        signal.signal(signal.SIGINT, on_interrupt)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """What is measured says only what goes wrong; the rows are what is read here."""
    earlier, was = structlog.get_config(), structlog.is_configured()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    try:
        yield
    finally:
        structlog.reset_defaults()
        if was:
            structlog.configure(**earlier)


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits for one that makes no sense."""
    listed = "\n".join(f"  {name:<16} {first}" for name, first in measurements().items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=ABOUT,
        epilog=f"measurements:\n{listed}\n{READING}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="run only these")
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it works, not to quote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"keep this run in {RESULTS.name}/, its plot, and the tables in README.md and docs/measured.md",
    )
    parser.add_argument(
        "--patience", type=float, default=120, metavar="SECONDS",
        help="wait so long for a quiet machine before each measurement, then refuse it (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only", action="append", metavar="PART",
        help="of a measurement that has parts (`cold`), only this one; may be given more than once",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.only and chosen.names != ["cold"]:
        parser.error("--only is for `python -m bench cold`")
    if chosen.save and (chosen.quick or chosen.names):
        parser.error("--save keeps one whole run: not with --quick, not with names")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the rows, write the JSON; the exit code."""
    chosen = arguments_of(arguments)
    runs = modules(chosen.names)
    about, began = machine(), time.monotonic()
    print(
        ", ".join(
            f"{name} {value}" if name not in ("cpu", "system") else f"{value}"
            for name, value in about.items()
        )
    )
    peers = versions()
    print("peers: " + ", ".join(f"{name} {version}" for name, version in peers.items() if version))
    if absent := [name for name, version in peers.items() if version is None]:
        print(f"not installed, so not compared with: {', '.join(absent)} (`make bench-peers` installs them)")
    results: dict[str, dict[str, object]] = {}
    try:
        with swept() as family, hushed():
            for number, (name, run) in enumerate(runs.items(), 1):
                print(f"\n[{number}/{len(runs)}] {name}", flush=True)
                if chosen.only:
                    run = partial(run, only=chosen.only)  # type: ignore[call-arg]  # one that has parts takes it
                results[name] = measure(name, run, chosen.quick, chosen.patience, family)
    except KeyboardInterrupt:
        print("\ninterrupted: everything it started is stopped, nothing is written")
        return 130
    seconds = time.monotonic() - began
    print(f"\nall of it in {seconds / 60:.1f} min, load at the end {os.getloadavg()[0]:.2f}")
    whole: dict[str, object] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(), "quick": chosen.quick,
        "seconds": round(seconds), "machine": {**about, "load_after": round(os.getloadavg()[0], 2)},
        "peers": peers, "results": results,
    }  # fmt: skip
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    code = exit_code(results)
    if chosen.save and code == 2:
        print("not saved: a measurement failed")
    elif chosen.save:
        print("saved: " + ", ".join(keep(whole)))
    return code


if __name__ == "__main__":
    settled()
    raise SystemExit(main())
