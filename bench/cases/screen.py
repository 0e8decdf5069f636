"""Measures from a save to the pixels: the whole stack, browser included, against Vite alone on the same app.

Both serve 220 modules from the same installed packages to a page each of one Chromium, which notes what stands there
frame by frame. A turn of forty files goes through the database here, and there is what `git checkout` writes. A frame
that shows neither the app before a turn nor the app after it is a *wrong state*.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from agent.devserver.screen import PREVIEW
from bench.cases.idle import _processor_seconds as processor_seconds
from bench.cases.start import _by_hand as start_by_hand
from bench.cases.start import first_page, free_port
from bench.harness.many_components import COMPONENTS, MARKED, PAGES, app, changes, plain, root, write
from bench.harness.results import Row, Unmeasurable, in_turn, ratio_of
from tests.browser.conftest import Browser, missing
from tests.browser.served import small_project
from tests.system.stack import Stack

RENAME_AT_MOST = 1.1
"""Of Vite's own time from a direct write, for a file that the agent renames into place."""
TURN_AT_MOST = 0.6
"""Of Vite's time after `git checkout`, for a turn through the database."""
TOLD_AT_MOST_MS = 15.0
"""From the frame after the one that shows a revision to the answer of the session API."""
START_AT_MOST = 1.1
"""Of Vite's start without the hook."""
IDLE_AT_MOST = 0.3
"""Percent of a core, for an agent with a page open."""
GROWTH_AT_MOST = 30.0
"""MB that agent and dev server may grow while a page forges 2,000 errors a second."""
BETWEEN = 0.6
"""Seconds between two saves: each is two heartbeats, and an agent sends four a second at most."""
RIGHT_WITHIN = 2.0
"""Seconds after the last of forty single saves."""
LOST = 5.0
"""Seconds after which a single save that is not painted never will be."""
NEVER = 30.0
"""Seconds after which a page that is not right never will be."""

WATCH = """
let told = ''
const look = () => {
  const seen = { blank: !document.querySelector('#kept'), overlay: !!document.querySelector('vite-error-overlay') }
  for (const { dataset } of document.querySelectorAll('[data-v]')) {
    seen[dataset.v] = (seen[dataset.v] ?? 0) + 1
    if (dataset.mark > '0') seen.mark = dataset.mark
  }
  const now = JSON.stringify(seen)
  if (now !== told) void __state(JSON.stringify([performance.timeOrigin + performance.now(), (told = now)]))
  requestAnimationFrame(look)
}
addEventListener('DOMContentLoaded', look)
const send = WebSocket.prototype.send
WebSocket.prototype.send = function (data) {
  if (String(data).includes('"preview:rendered"'))
    (window.__rendered ??= {})[JSON.parse(data).data.revision] ??= performance.timeOrigin + performance.now()
  return send.call(this, data)
}
"""
"""Tells each state of the page with the time of its frame, and notes when the page said that it had rendered."""

State = dict[str, Any]


@dataclass
class Count:
    """What went wrong on the way from one state to the next."""

    wrong: int = 0
    refused: int = 0
    failed: int = 0
    kept: int = 0
    rounds: int = 0

    def __str__(self) -> str:
        return (
            f"{self.wrong} wrong states, {self.refused} answers of 400 and more, {self.failed} page errors, "
            f"state kept {self.kept} of {self.rounds}"
        )


class Page:
    """One contestant's page."""

    def __init__(self, browser: Browser, name: str, url: str) -> None:
        self.browser, self.name, self.url = browser, name, url

    def open(self) -> None:
        """Load it anew, with state that a reload would lose, and forget what was seen before."""
        self.browser.do("close", self.name)
        self.browser.do("open", self.name, url=self.url, script=WATCH)
        self.browser.do("wait", self.name, code="document.querySelectorAll('[data-v]').length >= 150")
        time.sleep(1)
        self.browser.run("void (window.kept = true)", self.name)
        self.browser.do("forget", self.name)

    def states(self) -> list[tuple[float, State]]:
        """Times in Unix seconds, and what stood there from then on."""
        told = [json.loads(each) for each in self.browser.do("seen", self.name)["states"]]
        return [(moment / 1000, json.loads(state)) for moment, state in told]

    def painted(self, wanted: Callable[[State], bool], seconds: float = NEVER) -> tuple[float, State] | None:
        """When the page came to look as wanted, and its state; None: not in so many seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (states := self.states()) and wanted(states[-1][1]):
                return states[-1]
            time.sleep(0.02)
        return None

    def count(self, into: Count, right: State) -> None:
        """Add what was seen since the last `forget`."""
        seen = self.browser.do("seen", self.name)
        into.wrong += sum(state != right for _, state in self.states())
        into.refused += len(seen["refused"])
        into.failed += len(seen["failed"])
        into.kept += self.browser.run("window.kept === true", self.name) is True
        into.rounds += 1


class Bench:
    """The stack and Vite alone, each with its page."""

    def __init__(self, stack: Stack, browser: Browser, vite: Alone) -> None:
        self.stack, self.vite, self.alone = stack, vite, vite.place
        self.project = Path(stack.info["project_dir"])
        self.ours = Page(browser, "page", stack.info["preview_url"])
        self.theirs = Page(browser, "other", vite.url)
        self.number = 0
        self.turned = {"ours": False, "theirs": False}
        self.counts = {"ours": Count(), "theirs": Count()}
        self.lost = {"page": 0, "other": 0}
        self.told: list[float] = []
        self.saved: list[float] = []
        self.after: list[tuple[float, float]] = []

    def open(self) -> None:
        """Load both pages anew."""
        for each in (self.ours, self.theirs):
            self._open(each)

    def _open(self, page: Page) -> None:
        """Load it anew. Vite alone may keep a file that it read half written: then it is started anew."""
        try:
            page.open()
        except AssertionError:
            if page is self.ours:
                raise
            self.vite.start()
            page.open()

    # --- one save

    def rename_to_painted(self, saves: int) -> float:
        """Milliseconds from the agent's rename to the frame, the median of so many saves through the database."""

        def save(text: str) -> Callable[[], float]:
            began = time.time()
            revision = int(self.stack.save(MARKED, text)["revision"])
            self._ask(revision)
            told = time.time()
            if shown := self.ours.painted(lambda state: state.get("mark") == f"m{self.number}", LOST):
                self.saved.append((shown[0] - began) * 1e3)
            rendered = self.ours.browser.run(f"window.__rendered?.[{revision}]", self.ours.name)
            if rendered:
                self.told.append(told * 1e3 - rendered)
            return lambda: (self.project / MARKED).stat().st_ctime_ns / 1e9

        return self._saves(self.ours, saves, save)

    def write_to_painted(self, saves: int) -> float:
        """The same from a direct write, with Vite alone."""

        def save(text: str) -> Callable[[], float]:
            began = time.time()
            (self.alone / MARKED).write_text(text)
            return lambda: began

        return self._saves(self.theirs, saves, save)

    def _saves(self, page: Page, saves: int, save: Callable[[str], Callable[[], float]]) -> float:
        taken = []
        for _ in range(saves):
            self.number += 1
            mark = f"m{self.number}"
            began = save(plain("C019", mark))
            shown = page.painted(lambda state, mark=mark: state.get("mark") == mark, LOST)  # type: ignore[misc]
            if shown is None:
                self.lost[page.name] += 1
                self._open(page)
                continue
            taken.append((shown[0] - began()) * 1e3)
            time.sleep(BETWEEN)
        if not taken:
            raise RuntimeError(f"{page.name} shows no save")
        return median(taken)

    def _ask(self, revision: int) -> None:
        info = self.stack.info
        httpx.get(
            f"{info['orchestrator_url']}/v1/projects/{info['project_id']}/shown",
            params={"revision": revision, "wait": 20, "quiet": 0},
            headers={"authorization": f"Bearer {info['service_key']}"},
            timeout=30,
        ).raise_for_status()

    # --- a turn

    def begin(self, files: int) -> None:
        """From now on turns are of so many files; both apps stand before one."""
        self._apply(changes(app(False, self.files), app(False, files)))
        git(self.alone, "checkout", "--quiet", f"before-{files}")
        self.files, self.counts = files, {"ours": Count(), "theirs": Count()}

    def _apply(self, files: Mapping[str, str | None]) -> None:
        written = [
            {"action": "delete", "file_path": path}
            if text is None
            else {"action": "update", "file_path": path, "content": text}
            for path, text in files.items()
        ]
        if written:
            self.stack.rpc("apply_project_files", changes=written)

    def turn(self, files: int) -> float:
        """Milliseconds from the RPC to the frame that shows all of it."""
        before, after = (app(turned, files) for turned in (self.turned["ours"], not self.turned["ours"]))
        written = changes(before, after)
        return self._turn("ours", self.ours, lambda: self._apply(written))

    def checkout(self, files: int) -> float:
        """Milliseconds from the start of `git checkout` to the frame, with Vite alone."""
        branch = f"{'before' if self.turned['theirs'] else 'after'}-{files}"
        return self._turn("theirs", self.theirs, lambda: git(self.alone, "checkout", "--quiet", branch))

    def _turn(self, who: str, page: Page, write_it: Callable[[], object]) -> float:
        self._open(page)
        turned = not self.turned[who]
        self.turned[who] = turned
        self.total = sum(1 for path in app(turned, self.files) if path.startswith("src/c/"))
        began = time.time()
        write_it()

        def whole(state: State) -> bool:
            parts = {version: state.get(version, 0) for version in "012"}
            return (
                sum(parts.values()) == self.total and not parts["1" if turned else "2"] and not state["blank"]
            )

        shown = page.painted(whole)
        time.sleep(0.5)
        right = shown or page.painted(whole)
        page.count(self.counts[who], right[1] if right else {})
        return (shown[0] - began) * 1e3 if shown else NEVER * 1e3

    files = 40
    total = 0

    # --- saves one by one

    def single_saves(self, who: str) -> bool:
        """Whether forty single saves, the page before its components, are right in time."""
        page = self.ours if who == "ours" else self.theirs
        self._open(page)
        app_path = "src/App.tsx"
        files = {app_path: root(new=39)} | {f"src/c/M{n:03}.tsx": plain(f"M{n:03}", "new") for n in range(39)}
        for path, text in files.items():
            if who == "ours":
                self.stack.save(path, text)
            else:
                write(self.alone, {path: text})
                time.sleep(0.01)  # about what a save through the database takes
        last = time.time()
        total = PAGES * COMPONENTS + 39
        shown = page.painted(lambda state: state.get("0", 0) + state.get("1", 0) == total, RIGHT_WITHIN + 1)
        after = shown[0] - last if shown is not None else NEVER
        back: dict[str, str | None] = dict.fromkeys(files) | {app_path: root()}
        if who == "ours":  # the page cannot be built without its last component: then it is loaded once more
            load = "performance.getEntriesByType('navigation')[0].loadEventEnd"
            self.after.append((after, page.browser.run(load, page.name) / 1e3))
            self._apply(back)
        else:
            write(self.alone, back)
        time.sleep(1)
        return after <= RIGHT_WITHIN

    # --- what it costs

    def idle(self, seconds: float) -> float:
        """Percent of a core that the agent takes while a page is open and nothing happens."""
        self.ours.open()
        time.sleep(3)
        agent = self._agent()
        before = processor_seconds(agent)
        time.sleep(seconds)
        return (processor_seconds(agent) - before) / seconds * 100

    def flooded(self, seconds: float) -> tuple[float, int]:
        """MB that agent and dev server grew by, and lines of log, while a page forged 2,000 errors a second."""
        self.ours.open()
        self.ours.browser.run(FLOOD, self.ours.name)
        time.sleep(seconds / 2)  # what the first of them take stays
        before, lines = self._memory(), len(self.stack.log().splitlines())
        time.sleep(seconds)
        self.ours.browser.run("clearInterval(window.flooding)", self.ours.name)
        return self._memory() - before, len(self.stack.log().splitlines()) - lines

    def _agent(self) -> int:
        (found,) = (pid for pid, command in self.stack.processes().items() if " -m agent" in command)
        return found

    def _memory(self) -> float:
        """Of the agent and of what runs below it, MB."""
        agent = psutil.Process(self._agent())
        family = (agent, *agent.children(recursive=True))
        return float(sum(each.memory_info().rss for each in family)) / 1e6


FLOOD = """import('/@vite/client').then(({ createHotContext }) => {
  const hot = createHotContext('/hostile')
  let round = 0
  window.flooding = setInterval(() => {
    for (let n = 0; n < 100; n++) {
      const message = `${round++} ` + 'x'.repeat(2000)
      hot.send('preview:error', { load: 'x', kind: 'runtime', message, revision: 1e6 })
    }
  }, 50)
}).then(() => 0)"""


def git(place: Path, *arguments: str) -> None:
    """One command. Raises `CalledProcessError`."""
    names = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
    subprocess.run(["git", *names, *arguments], cwd=place, check=True, capture_output=True)


def repository(place: Path) -> None:
    """A repository of the app with a branch before and after each turn."""
    (place / ".gitignore").write_text("node_modules\n")
    git(place, "init", "--quiet")
    for files in (40, 200):
        for turned in (False, True):
            shutil.rmtree(place / "src" / "c", ignore_errors=True)
            write(place, app(turned, files))
            git(place, "checkout", "--quiet", "-B", f"{'after' if turned else 'before'}-{files}")
            git(place, "add", "--all")
            git(place, "commit", "--quiet", "--allow-empty", "--message", "state")
    git(place, "checkout", "--quiet", "before-40")


class Alone:
    """Vite as by hand."""

    def __init__(self, place: Path) -> None:
        self.place, self.port = place, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.starts = 0
        self._vite: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, after whatever it was."""
        self.stop()
        flags = ["--host", "127.0.0.1", "--port", str(self.port), "--strictPort"]
        self._vite = vite = subprocess.Popen(
            [self.place / "node_modules" / ".bin" / "vite", *flags], cwd=self.place, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        first_page(self.port, lambda: vite.poll() is not None)
        self.starts += 1

    def stop(self) -> None:
        """End it."""
        if self._vite is not None:
            os.killpg(self._vite.pid, signal.SIGKILL)
            self._vite.wait()
            self._vite = None


def rows(bench: Bench, quick: bool) -> Iterator[Row]:
    """All that needs the stack."""
    bench.open()
    saves, rounds = (5, 7) if quick else (10, 21)
    taken = in_turn(
        {"ours": lambda: bench.rename_to_painted(saves), "vite": lambda: bench.write_to_painted(saves)},
        rounds,
    )
    yield Row(
        "screen: rename to painted, p50", median(taken["ours"]), "ms", "vite alone", median(taken["vite"]),
        ratio_of(taken["ours"], taken["vite"]), at_most=RENAME_AT_MOST, samples=rounds,
        note="one component of 220 modules; vite from a direct write; never shown: "
        f"{bench.lost['page']}, vite alone {bench.lost['other']}",
    )  # fmt: skip
    yield Row("screen: database to painted, p50", median(bench.saved), "ms", samples=len(bench.saved))
    yield Row(
        "screen: told after the second frame, p50", median(bench.told), "ms", at_most=TOLD_AT_MOST_MS,
        samples=len(bench.told), note="GET /v1/projects/{id}/shown that waits for the revision",
    )  # fmt: skip
    for files in (40, 200):
        yield from _turns(bench, files, 4 if quick else 12)
    rounds = 3 if quick else 10
    right = {"ours": 0, "theirs": 0}
    for _ in range(rounds):
        for who in right:
            right[who] += bench.single_saves(who)
    yield Row(
        "screen: 40 single saves, page first, right within 2 s", right["ours"] / rounds, "share", at_least=1.0,
        samples=rounds, note=f"after {median(after for after, _ in bench.after):.1f} s, of which the page's load takes "
        f"{median(load for _, load in bench.after):.1f}; vite alone {right['theirs']} of {rounds}",
    )  # fmt: skip
    share = bench.idle(15 if quick else 90)
    yield Row(
        "screen: agent with an open page, processor", share, "% of a core", at_most=IDLE_AT_MOST, samples=1
    )
    grown, lines = bench.flooded(5 if quick else 30)
    yield Row(
        "screen: growth under 2,000 forged errors a second", grown, "MB", sense="memory", at_most=GROWTH_AT_MOST,
        samples=1, note=f"agent and dev server; {lines} lines of log",
    )  # fmt: skip


def _turns(bench: Bench, files: int, rounds: int) -> Iterator[Row]:
    bench.begin(files)
    taken = in_turn(
        {"ours": lambda: bench.turn(files), "vite": lambda: bench.checkout(files)},
        rounds + rounds % 2,
        warm_up=2,
    )
    ours, theirs = bench.counts["ours"], bench.counts["theirs"]
    yield Row(
        f"screen: turn of {files} files to painted", median(taken["ours"]), "ms", "vite, git checkout",
        median(taken["vite"]), ratio_of(taken["ours"], taken["vite"]), at_most=TURN_AT_MOST, samples=rounds,
        note=f"vite alone: {theirs}, had to be started anew {bench.vite.starts - 1} times",
    )  # fmt: skip
    yield Row(
        f"screen: turn of {files} files, what went wrong", ours.wrong + ours.refused + ours.failed, "things",
        sense="size", at_most=0, samples=ours.rounds, note=str(ours),
    )  # fmt: skip
    yield Row(
        f"screen: turn of {files} files, state kept", ours.kept / ours.rounds, "share", sense="size", at_least=1.0,
        samples=ours.rounds, note=f"vite alone {theirs.kept} of {theirs.rounds}",
    )  # fmt: skip


def start_row(alone: Path, rounds: int) -> Row:
    """Vite's start with the hook and without; no agent listens, as for a moment at each start."""
    hook = {
        "NODE_OPTIONS": f"--import={(PREVIEW / 'hook.mjs').as_uri()}",
        "PREVIEW_SYNC_AGENT": f"127.0.0.1 {free_port()}", "PREVIEW_SYNC_SECRET": "x",
    }  # fmt: skip
    taken = in_turn(
        {"hook": lambda: start_by_hand(alone, hook), "vite": lambda: start_by_hand(alone)}, rounds
    )
    return Row(
        "screen: Vite's start with the hook", median(taken["hook"]), "s", "vite alone", median(taken["vite"]),
        ratio_of(taken["hook"], taken["vite"]), at_most=START_AT_MOST, samples=rounds, note="to its first page",
    )  # fmt: skip


def run(quick: bool = False) -> Sequence[Row]:
    """From a save to the pixels. Raises `Unmeasurable` without Chromium, Node or git."""
    why = missing() or next((f"needs {name}" for name in ("npm", "git") if shutil.which(name) is None), None)
    if why is not None:
        raise Unmeasurable(why)
    with tempfile.TemporaryDirectory(prefix="bench-screen-") as name, contextlib.ExitStack() as ending:
        place = Path(name)
        source = small_project(place / "app", dict(app(False, 40)))
        stack = Stack(source, place / "state", options=("--no-watch",))
        ending.callback(stack.kill)
        stack.start()
        alone = small_project(place / "alone", {})
        (alone / "node_modules").symlink_to((Path(stack.info["project_dir"]) / "node_modules").resolve())
        repository(alone)
        browser = Browser()
        ending.callback(browser.close)
        vite = Alone(alone)
        ending.callback(vite.stop)
        vite.start()
        found = list(rows(Bench(stack, browser, vite), quick))
        stack.kill()
        vite.stop()
        return [*found, start_row(alone, 7 if quick else 21)]
