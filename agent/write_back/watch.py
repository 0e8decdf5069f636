"""Watches the directories that the rules cover and reports files that were made, changed or deleted.

Watched are the directories that a rule may speak of, each by itself, never the protected ones (node_modules and the
like), and at most `MOST_DIRECTORIES`. Events can be lost, so after each arming, and every few minutes, what is there is
compared by stat. A path is only named here; whether it is another than the database's is judged when it is read.
"""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from agent.core.errors import PathRefused
from agent.core.globs import Rule, roots, rule_for
from agent.core.model import PROTECTED, Entry, RelPath, parse_path
from agent.fs.inspect import FileStat
from agent.fs.notify import changed
from agent.fs.project_dir import ProjectDir
from agent.fs.turns import Steps, in_turns

STEP_MS, LONGEST_MS = 50, 200
"""Quiet time after which a burst of events is taken, and the most; what is seen then waits to be quiet in `states`."""
SWEEP_SECONDS = 300.0
"""Between two comparisons of everything; a tenth of it where there are no watches to be had."""
MOST_DIRECTORIES = 1_000
"""Watched: the kernel's budget is the dev server's too. Those past it are compared with the sweeps alone."""
MOST_NAMES = 5_000
"""Names of one burst; past it everything is compared instead."""
RENEW_SECONDS, RENEW_REST = 0.5, 10
"""Between two armings, and the same as a multiple of what comparing everything took: a tenth of a core at most."""


class Watch:
    """Names paths until it is cancelled.

    Args:
        disk: the project's directory.
        rules: what may be given back.
        ours: gives the tree's entries, and the stat of each file when its content was known.
        report: is told of a path that is not as known, and of its size; -1: nothing is there.
    """

    def __init__(
        self,
        disk: ProjectDir,
        rules: Sequence[Rule],
        ours: Callable[[], tuple[Mapping[RelPath, Entry], Mapping[RelPath, FileStat]]],
        report: Callable[[RelPath, int], None],
    ) -> None:
        self._disk = disk
        self._rules = rules
        self._roots = roots(rules)
        self._ours = ours
        self._report = report
        self._swept = 0.0
        self.unwatched = 0
        """Directories that are looked at with the sweeps alone."""

    async def run(self) -> None:
        """Watch, and arm anew when a directory comes or goes."""
        while True:
            watched: list[str] = []
            await in_turns(self._directories(watched))
            self.unwatched = max(0, len(watched) - MOST_DIRECTORIES)
            try:
                notify = await asyncio.to_thread(self._arm, watched[:MOST_DIRECTORIES])
            except (OSError, WatchfilesRustInternalError):
                await self._sweep(watched)
                await asyncio.sleep(SWEEP_SECONDS / 10)
                continue
            try:
                with notify:
                    await self._sweep(watched)
                    while not await self._turn(notify, watched):
                        pass
            except WatchfilesRustInternalError:
                pass  # a name that is not UTF-8: what else it saw is found by comparing
            await asyncio.sleep(max(RENEW_SECONDS, RENEW_REST * self._swept))

    async def _turn(self, notify: RustNotify, watched: Sequence[str]) -> bool:
        """Name what one burst is about. Returns True when other directories are to be watched."""
        names = await changed(notify, LONGEST_MS, STEP_MS, SWEEP_SECONDS)
        if names is None:
            await self._sweep(watched)
            return False
        if len(names) > MOST_NAMES:
            return True
        root, known, moved = f"{self._disk.root}/", set(watched), False
        for name in sorted(names):
            path = name.removeprefix(root) if name.startswith(root) else ""
            found = self._disk.lstat(path) if path else None
            if not path or path in known or (found is not None and stat.S_ISDIR(found.st_mode)):
                moved = moved or self._watches(path)
                continue
            self._name(path, -1 if found is None else found.st_size)
        return moved

    def _watches(self, directory: str) -> bool:
        """Whether a rule may speak of what is in `directory`, or below it."""
        if not PROTECTED.isdisjoint(directory.split("/")):
            return False
        return any(
            _within(root, directory) or (deep and _within(directory, root))
            for root, deep in self._roots.items()
        )

    def _directories(self, into: list[str]) -> Steps[None]:
        """Gather the directories there are now, each above those in it."""
        above = {""}
        for root in self._roots:
            parts = root.split("/") if root else []
            above.update("/".join(parts[:number]) for number in range(1, len(parts)))
        into.extend(sorted(each for each in above if self._is_directory(each)))
        waiting = [(root, deep) for root, deep in self._roots.items() if self._is_directory(root)]
        seen = set(into)
        while waiting:
            at, deep = waiting.pop()
            if at not in seen:
                seen.add(at)
                into.append(at)
            if deep and len(into) <= 2 * MOST_DIRECTORIES:
                for name, found in self._disk.listing(at):
                    if stat.S_ISDIR(found.st_mode) and name not in PROTECTED:
                        waiting.append((f"{at}/{name}" if at else name, True))
            yield

    def _is_directory(self, path: str) -> bool:
        found = self._disk.lstat(path) if path else None
        return not path or (found is not None and stat.S_ISDIR(found.st_mode))

    def _arm(self, watched: Sequence[str]) -> RustNotify:
        places = [str(self._disk.root / path) if path else str(self._disk.root) for path in watched]
        return RustNotify(places, False, False, 0, False, True)

    async def _sweep(self, watched: Sequence[str]) -> None:
        began = time.monotonic()
        await in_turns(self._comparing(watched))
        self._swept = time.monotonic() - began

    def _comparing(self, watched: Sequence[str]) -> Steps[None]:
        for directory in watched:
            for name, found in self._disk.listing(directory):
                if not stat.S_ISDIR(found.st_mode):
                    self._name(f"{directory}/{name}" if directory else name, found.st_size)
                yield
            yield
        for path in self._tree_paths():
            if self._disk.lstat(path) is None:
                self._name(path, -1)
            yield

    def _tree_paths(self) -> Iterator[RelPath]:
        entries, _ = self._ours()
        return (path for path, entry in entries.items() if entry.is_file and rule_for(self._rules, path))

    def _name(self, raw: str, size: int) -> None:
        """Report a path of the rules that is not as it is known to be."""
        try:
            path = parse_path(raw)
        except PathRefused:
            return
        if rule_for(self._rules, path) is None:
            return
        entries, stats = self._ours()
        known, here = stats.get(path), self._disk.stat(path)
        entry = entries.get(path)
        if here is not None and here == known and entry is not None and entry.is_file:
            return
        self._report(path, size)


def _within(path: str, directory: str) -> bool:
    return directory in ("", path) or path.startswith(f"{directory}/")
