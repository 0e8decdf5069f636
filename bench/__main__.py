"""Measure, side by side: every module of this package that has a `run`, or those named.

    python -m bench                     everything
    python -m bench apply hydrate       these
    python -m bench --quick --json results.json

A module's `run(quick: bool) -> Sequence[Row]` measures and returns; it prints nothing that matters. One that cannot run
on this machine raises `Unmeasurable` with a sentence. Exit: 0 all bounds met or nothing to meet, 1 a bound not met,
2 a module failed, 3 too noisy to say.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import bench
from bench.results import BUSIEST, Row, Unmeasurable, Verdict

Run = Callable[[bool], Sequence[Row]]


def modules(wanted: Sequence[str]) -> dict[str, Run]:
    """The measurements by name. Raises `SystemExit` naming one that does not exist."""
    found: dict[str, Run] = {}
    names = sorted(
        info.name for info in pkgutil.iter_modules(bench.__path__) if not info.name.startswith("_")
    )
    for name in names:
        if wanted and name not in wanted:
            continue
        run = getattr(importlib.import_module(f"bench.{name}"), "run", None)
        if run is not None:
            found[name] = run
    for name in wanted:
        if name not in found:
            raise SystemExit(f"bench: there is no measurement {name!r}; there are: {', '.join(modules(()))}")
    return found


def figure(ratio: float) -> str:
    """Two decimals, or two figures of a small one."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def line(row: Row) -> str:
    """One row, the ratio first."""
    noisy = row.verdict is Verdict.TOO_NOISY
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
    spread = f" [{figure(row.ratio.low)}–{figure(row.ratio.high)}]" if row.ratio is not None else ""
    text = f"{ratio:>7}{spread:<14} {bound:<9} {row.verdict:<10} {row.name:<34} {row.sense:<7} {figures}"
    if row.waited > BUSIEST:
        text += f"  (waited for a processor {row.waited:.0%} of the time)"
    if row.note:
        text += f"  ({row.note})"
    return text


def machine() -> dict[str, object]:
    """Where this was measured, and how busy it was."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                model = text.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Side-by-side measurements, ratios first."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="run only these")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds: to see that it works, not to quote"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    chosen = parser.parse_args(arguments)

    about = machine()
    print(
        f"{about['cpu']}, {about['cores']} cores, {about['system']}, Python {about['python']}, load {about['load']}"
    )
    report: dict[str, object] = {}
    verdicts: set[Verdict] = set()
    broken = False
    for name, run in modules(chosen.names).items():
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        try:
            rows = run(chosen.quick)
        except Unmeasurable as reason:
            print(f"  not measured: {reason}")
            report[name] = {"not_measured": str(reason)}
            continue
        except Exception:
            traceback.print_exc(file=sys.stdout)
            report[name] = {"failed": traceback.format_exc(limit=1)}
            broken = True
            continue
        for row in rows:
            print(line(row))
        print(f"  {time.monotonic() - started:.0f} s")
        report[name] = [row.as_json() for row in rows]
        verdicts.update(row.verdict for row in rows)
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        whole = {"machine": about, "quick": chosen.quick, "at": int(time.time()), "results": report}
        chosen.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    if broken:
        return 2
    if Verdict.NOT_MET in verdicts:
        return 1
    return 3 if Verdict.TOO_NOISY in verdicts else 0


if __name__ == "__main__":
    raise SystemExit(main())
