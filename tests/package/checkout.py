"""A clean checkout and clean virtual environments: what somebody has who installs this elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator_stub.devstack.editor_page import EditorPage

ROOT = Path(__file__).parents[2]


def copy_checkout(to: Path) -> Path:
    """Every file that git knows, as the working tree has it, and nothing else: links stay links."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in names.decode().split("\0"):
        source = ROOT / name
        if name and (source.is_symlink() or source.is_file()):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name, follow_symlinks=False)
    return to


def with_built_page(checkout: Path, place: Path = ROOT) -> Path:
    """Put the editor page of `place` there, if it is built: building it is what the browser's tests test."""
    built = place / "orchestrator_stub" / "editor_page"
    if EditorPage(built, place / "examples" / "editor").current:
        shutil.copytree(built, checkout / "orchestrator_stub" / "editor_page")
    return checkout


def make_wheel(checkout: Path) -> Path:
    """Make the wheel as `make wheel` does in `checkout`, with the tools of the running interpreter's environment."""
    tools = Path(sys.executable).parent.parent
    with_built_page(checkout)
    command = ["make", "wheel", f"VENV={tools}", "--old-file", f"{tools}/.ready"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (checkout / "dist").glob("*.whl")
    assert str(made.relative_to(checkout)) in done.stdout
    return made


def locked(to: Path) -> Path:
    """requirements/dev.lock as a constraints file, which may not have hashes beside a wheel that has none."""
    lock = (ROOT / "requirements" / "dev.lock").read_text()
    pins = re.findall(r"(?m)^([a-z0-9][\w.-]*==[^ \\]+)(?: ; ([^\\\n]+?))? *\\?$", lock)
    assert len(pins) > 50
    to.write_text("".join(f"{pin} ; {marker}\n" if marker else f"{pin}\n" for pin, marker in pins))
    return to


@dataclass(frozen=True)
class Installed:
    """A virtual environment, and a directory to stand in that has nothing to do with a checkout."""

    prefix: Path
    cwd: Path

    @property
    def environ(self) -> dict[str, str]:
        """The tests' own environment without a trace of this checkout."""
        left_out = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        here = {str(Path(sys.executable).parent), str(ROOT / ".venv" / "bin")}
        path = [part for part in os.environ["PATH"].split(os.pathsep) if part not in here]
        return {**kept, "PATH": os.pathsep.join([str(self.prefix / "bin"), *path])}

    def run(self, *command: str, timeout: float = 300, **environ: str) -> subprocess.CompletedProcess[str]:
        """`command` there; its output, both streams apart. No exit code is an error here."""
        return subprocess.run(
            command, cwd=self.cwd, env=self.environ | environ, capture_output=True, text=True,
            timeout=timeout, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip


def install(place: Path, *what: str, constraints: Path) -> Installed:
    """A new virtual environment with `what`, and the versions of the lock."""
    venv.create(place / "venv", with_pip=True)
    there = Installed(place / "venv", place)
    command: Sequence[str] = (
        "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
        "--only-binary", ":all:", "--constraint", str(constraints), *what,
    )  # fmt: skip
    done = there.run(*command, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return there
