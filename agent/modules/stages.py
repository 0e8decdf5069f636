"""The staging directories of a project's installs, and the shell that works in them as the project's user.

A staging directory belongs to the process whose pid is in its name. What a killed agent left is found by that, a swap
that did not end is undone, and the directory is removed.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from typing import Final, Generic, Protocol, TypeVar

from agent.modules.steps import PUT_BACK, StepFailed, is_left_over

SHELL_SECONDS: Final = 120.0
"""For one script of `steps`. They take tens of milliseconds; on a full or a slow disk they must end too."""
AT_ONCE: Final = 200
"""Staging directories that one shell is given. The guard gets them in one argument, of at most 128 KB on Linux."""
STEPS: Final = {
    "stage": "stage the install",
    "seal": "finish the install",
    "swap": "put node_modules in place",
}
"""What a problem says could not be done, by step."""


class Ended(Protocol):
    """How a program ended, and its last lines."""

    @property
    def ok(self) -> bool: ...
    @property
    def last(self) -> str: ...
    @property
    def tail(self) -> Sequence[str]: ...


T = TypeVar("T", bound=Ended)
E = TypeVar("E", bound=Ended, covariant=True)


class Run(Protocol[E]):
    """Runs a program as the project's user, with a descriptor as its standard input, for at most some seconds."""

    def __call__(
        self,
        argv: tuple[str, ...],
        given: int | None,
        seconds: float,
        more: Mapping[str, str] | None = None,
    ) -> Awaitable[E]: ...


class Stages(Generic[T]):
    """Staging directories in `directory` for the project in `project_dir`."""

    def __init__(self, directory: Path, project_dir: Path, run: Run[T]) -> None:
        self._directory = directory
        self._project_dir = project_dir
        self._run = run
        self._numbers = itertools.count(1)
        self._used: list[Path] = []
        """Those of the install under way."""

    def new(self) -> Path:
        """Name a staging directory of the install under way."""
        self._used.append(self._directory / f"stage-{os.getpid()}-{next(self._numbers)}")
        return self._used[-1]

    async def with_tree(self) -> Path | None:
        """Make a staging directory that has an empty `tree`; the next install that ends removes it. None: no room."""
        stage = self.new()
        done = await self.shell('mkdir -p "$1/tree"', stage)
        return stage if done.ok else None

    async def discard(self, *more: Path) -> None:
        """Undo what the install under way left half-done, and remove its staging directories and those."""
        stages, self._used = [*self._used, *more], []
        await self.shell(PUT_BACK, self._project_dir, *stages)

    async def recover(self) -> None:
        """Undo and remove what a killed agent left."""
        left = [name for name in os.listdir(self._directory) if is_left_over(name)]
        for start in range(0, len(left), AT_ONCE):
            await self.shell(PUT_BACK, self._project_dir, *left[start : start + AT_ONCE])

    async def do(
        self, rule: str, script: str, *arguments: str | Path, secrets: Mapping[str, str] | None = None
    ) -> None:
        """Run a script of `steps`. Raises `StepFailed`."""
        done = await self.shell(script, *arguments, secrets=secrets)
        if not done.ok:
            raise StepFailed(rule, f"cannot {STEPS[rule]}: {done.last}")

    async def shell(
        self,
        script: str,
        *arguments: str | Path,
        seconds: float = SHELL_SECONDS,
        secrets: Mapping[str, str] | None = None,
    ) -> T:
        """Run a script, with `secrets` in its environment; return how it ended."""
        return await self._run(("sh", "-c", script, "install", *map(str, arguments)), None, seconds, secrets)
