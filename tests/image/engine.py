"""The images, built and run by whatever container engine there is: podman or docker.

    python -m tests.image.engine [TAG] [DOCKERFILE]     build one (`make image`, `make image-orchestrator`)

IMAGE_ENGINE chooses the engine, IMAGE_PLATFORM (`linux/amd64`) the machines that it is for. The base is IMAGE_BASE when
that is set, else what the Dockerfile names. Where no image registry can be reached but Debian's packages can, and this
is root, a base of the same kind is made once by debootstrap, with this machine's npm.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TAG = "localhost/preview-agent:test"
MADE_BASE = "localhost/preview-base:trixie"
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
MOUNTED_BUNDLE = "/run/build-ca.crt"


class NoEngine(Exception):
    """Nothing here can build or run an image; the message says why."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine and the flags it needs here."""

    command: tuple[str, ...]
    build_flags: tuple[str, ...]
    run_flags: tuple[str, ...]

    @property
    def is_podman(self) -> bool:
        return Path(self.command[0]).name == "podman"

    def call(
        self, *arguments: str, timeout: float = 120, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run it; the output as text. Raises `CalledProcessError` with what it said."""
        return subprocess.run(
            [*self.command, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=check,
            cwd=ROOT,
        )

    def has(self, image: str) -> bool:
        return self.call("image", "inspect", image, check=False).returncode == 0

    def build(self, tag: str, dockerfile: str = "Dockerfile", context: Path = ROOT) -> float:
        """Build the image of `dockerfile` in a checkout as `tag`; seconds it took. Progress goes to standard error."""
        arguments = ["--build-arg", f"BASE={base}"] if (base := self.base()) else []
        if platform := os.environ.get("IMAGE_PLATFORM"):
            arguments += ["--platform", platform]
        if self.is_podman and BUNDLE.exists() and os.environ.get("NODE_EXTRA_CA_CERTS"):
            # This machine reaches its registries through somebody who signs for himself.
            arguments += ["--volume", f"{BUNDLE}:{MOUNTED_BUNDLE}:ro"]
            for name in ("NODE_EXTRA_CA_CERTS", "PIP_CERT"):
                arguments += ["--build-arg", f"{name}={MOUNTED_BUNDLE}"]
        began = time.monotonic()
        subprocess.run(
            [*self.command, "build", *self.build_flags, *arguments, "--file", dockerfile, "--tag", tag, "."],
            check=True, cwd=context, stdout=sys.stderr, timeout=1800,
        )  # fmt: skip
        return time.monotonic() - began

    def base(self) -> str | None:
        """The base to build on; None for the Dockerfile's own."""
        if named := os.environ.get("IMAGE_BASE"):
            return named
        if self.has(MADE_BASE):
            return MADE_BASE
        if self.is_podman and os.geteuid() == 0 and shutil.which("debootstrap"):
            self.make_base()
            return MADE_BASE
        return None

    def make_base(self) -> None:
        """Debian trixie with its Node and this machine's npm, from Debian's packages alone."""
        npm = Path(subprocess.check_output(["npm", "root", "--global"], text=True).strip()) / "npm"
        with tempfile.TemporaryDirectory(prefix="preview-base-") as directory:
            packages = "--include=ca-certificates,nodejs"
            command = ["debootstrap", "--variant=minbase", packages, "trixie", directory, *mirror()]
            subprocess.run(command, check=True, stdout=sys.stderr, timeout=1800)
            there = Path(directory) / "usr/local/lib/node_modules/npm"
            shutil.copytree(npm, there, symlinks=True)
            for name in ("npm", "npx"):
                (Path(directory) / "usr/local/bin" / name).symlink_to(
                    f"../lib/node_modules/npm/bin/{name}-cli.js"
                )
            for leftover in ("var/cache/apt/archives", "var/lib/apt/lists"):
                shutil.rmtree(Path(directory) / leftover)
            with subprocess.Popen(["tar", "-C", directory, "-c", "."], stdout=subprocess.PIPE) as tar:
                command = [*self.command, "import", "-", MADE_BASE]
                subprocess.run(command, stdin=tar.stdout, check=True, stdout=sys.stderr, timeout=600)


def mirror() -> list[str]:
    """Where this machine gets Debian from; empty for debootstrap's own default."""
    if shutil.which("apt-get") is None:
        return []
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return [uri for uri in dict.fromkeys(said) if uri.rstrip("/").endswith("/debian")][:1]


def find() -> Engine:
    """The engine of this machine. Raises `NoEngine`."""
    asked = os.environ.get("IMAGE_ENGINE")
    for name in [asked] if asked else ["podman", "docker"]:
        path = shutil.which(name)
        if path is None:
            continue
        if Path(path).name == "podman":
            runtime = ("--runtime", "runc") if shutil.which("runc") and not shutil.which("crun") else ()
            limits = ("--ulimit", "nofile=1024:1024")
            engine = Engine(
                (path, *runtime),
                ("--format", "docker", "--isolation", "chroot", "--network", "host", *limits),
                ("--network", "host", *limits, "--ulimit", "nproc=1000:1000"),
            )
        else:
            engine = Engine((path,), ("--network", "host"), ("--network", "host"))
        if engine.call("info", check=False).returncode == 0:
            return engine
    raise NoEngine(f"no container engine that works ({asked or 'podman or docker'})")


def main(arguments: Sequence[str]) -> int:
    """Build the image; the exit code."""
    try:
        engine = find()
    except NoEngine as error:
        sys.stderr.write(f"image: {error}\n")
        return 1
    tag = arguments[0] if arguments else "preview-agent"
    seconds = engine.build(tag, *arguments[1:2])
    size = int(engine.call("image", "inspect", "--format", "{{.Size}}", tag).stdout)
    name = Path(engine.command[0]).name
    sys.stdout.write(f"{tag}: {size / 1e6:.0f} MB, built in {seconds:.0f} s, kept by {name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
