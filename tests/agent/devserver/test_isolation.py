"""What the project's programs can do to the agent and to its guard, which may both be root."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import agent
from agent.devserver.process import Child
from agent.devserver.sandbox import Launch, Rights, User
from tests.agent.processes import until

OTHER = User("other", 54_331, 54_331, "/")
ENV = {"PATH": os.environ["PATH"]}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

LIBRARY = r"""
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>
unsigned la_version(unsigned version) { return version; }
__attribute__((constructor)) static void loaded(void) {
  char line[32];
  int file = open(WHERE, O_WRONLY | O_APPEND);
  int length = snprintf(line, sizeof line, "%d\n", (int)geteuid());
  if (file >= 0) (void)!write(file, line, length);
}
"""
"""Writes down as whom it was loaded. `la_version` makes it a library for LD_AUDIT too."""


class Library:
    """A shared library of the project's, and the users who loaded it so far."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "x.so"
        self._said = directory / "loaded-by"
        self._said.touch()
        self._said.chmod(0o666)
        source = directory / "x.c"
        source.write_text(LIBRARY)
        where = f'-DWHERE="{self._said}"'
        subprocess.run(["gcc", "-shared", "-fPIC", where, "-o", self.file, source], check=True)

    @property
    def loaded_by(self) -> set[int]:
        return set(map(int, self._said.read_text().split()))


@pytest.fixture
def library(open_path: Path) -> Library:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: no library can be compiled")
    return Library(open_path)


def test_the_guard_loads_the_standard_library_alone() -> None:
    """Its interpreter has no site-packages, so `agent` and `agent.devserver` must not import anything either."""
    script = "import sys; sys.path.append(sys.argv[1]); import agent.devserver.guard; print(*sys.modules)"
    packages = str(Path(agent.__file__).parents[1])
    bare = [sys.executable, "-I", "-S", "-c", script, packages]
    loaded = subprocess.run(bare, env={}, capture_output=True, text=True, check=True).stdout.split()
    others = {name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names}
    assert others - {"__main__"} == {"agent", "agent.devserver", "agent.devserver.guard"}


async def run(argv: tuple[str, ...], env: Mapping[str, str], rights: Rights) -> list[str]:
    """Its output, once it has ended well."""
    lines: list[str] = []
    program = await Child.start(Launch(argv, "/", env, rights), on_line=lines.append)
    assert await program.wait() == 0, lines
    return lines


@needs_root
@pytest.mark.parametrize("variable", ["LD_PRELOAD", "LD_AUDIT"])
async def test_what_the_linker_is_told_to_load_is_never_loaded_as_root(
    library: Library, variable: str
) -> None:
    await run(("true",), {**ENV, variable: str(library.file)}, Rights(OTHER))
    assert library.loaded_by == {OTHER.uid}


@needs_root
async def test_the_guard_is_given_no_environment(library: Library) -> None:
    """Whatever is read from it, by the linker, by libc or by Python, cannot come from the project."""
    lines: list[str] = []
    env = {**ENV, "GCONV_PATH": "/x", "LOCPATH": "/x", "PYTHONPATH": "/x", "BASH_ENV": "/x", "ENV": "/x"}
    program = await Child.start(
        Launch(("sh", "-c", "echo up; cat /dev/zero"), "/", env, Rights(OTHER)), on_line=lines.append
    )
    try:
        await until(lambda: lines)
        assert Path(f"/proc/{program.pid}/environ").read_bytes() == b""
    finally:
        await program.kill()


async def test_the_program_gets_its_environment_to_the_byte(tmp_path: Path) -> None:
    """More than a pipe holds at once, text of every kind, and bytes that are no text."""
    strange = {
        **ENV, "LONG": "x" * 100_000, "LONGER": "é" * 60_000, "LINES": "one\ntwo\r\n\x1f", "QUOTED": '"\\u0041\\',
        "EMPTY": "", "A NAME": "=", "BYTES": os.fsdecode(b"\xff\xfe ok \xc3\xa9"),
    }  # fmt: skip
    kept = tmp_path / "environ"
    await run(("dd", "if=/proc/self/environ", f"of={kept}"), strange, Rights())
    given = dict(pair.split(b"=", 1) for pair in kept.read_bytes().rstrip(b"\0").split(b"\0"))
    assert given == {os.fsencode(name): os.fsencode(value) for name, value in strange.items()}


@pytest.mark.parametrize("said", [b"", b'{"PATH": "/bin"'], ids=["nothing", "half"])
async def test_a_guard_whose_agent_dies_before_it_said_all_starts_nothing(
    said: bytes, tmp_path: Path
) -> None:
    mark = tmp_path / "started"
    guard = await asyncio.create_subprocess_exec(
        *Launch(("touch", str(mark)), "/", ENV, Rights()).command(),
        stdin=asyncio.subprocess.PIPE, env={}, start_new_session=True,
    )  # fmt: skip
    assert guard.stdin is not None
    guard.stdin.write(said)
    guard.stdin.close()
    assert await guard.wait() == 137
    assert not mark.exists()
