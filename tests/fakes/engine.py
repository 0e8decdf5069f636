"""A container engine's command line, as far as the driver uses it: containers are files in $ENGINE_STATE.

Words and exit codes are podman's. The suite that runs on it runs on a real engine where there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn


def install(place: Path, *, hints: bool = False) -> str:
    """Put the command into `place`, which keeps its containers too; its path. `hints`: it fails as docker does."""
    (place / "state").mkdir()
    cli = place / "engine"
    environ = f"ENGINE_STATE={place}/state ENGINE_HINTS={'docker' if hints else ''}"
    cli.write_text(f'#!/bin/sh\n{environ} exec {sys.executable} -S {__file__} "$@"\n')
    cli.chmod(0o755)
    return str(cli)


def fail(code: int, text: str) -> NoReturn:
    if os.environ["ENGINE_HINTS"] and sys.argv[1] == "run":
        # Docker 28; 26 says "See 'docker run --help'."
        sys.stderr.write(
            f"docker: Error response from daemon: {text}\n\nRun 'docker run --help' for more information\n"
        )
    else:
        sys.stderr.write(f"Error: {text}\n")
    sys.exit(code)


def path_of(name: str) -> Path:
    return Path(os.environ["ENGINE_STATE"]) / name


def read(name: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path_of(name).read_text())
    except FileNotFoundError:
        fail(125, f'no container with name or ID "{name}" found: no such container')
    return found


def change(name: str, status: str) -> None:
    path_of(name).write_text(json.dumps({**read(name), "State": {"Status": status}}))


def run(arguments: list[str], status: str) -> None:
    parser = argparse.ArgumentParser()
    for option in (
        "name",
        "restart",
        "stop-timeout",
        "pull",
        "memory",
        "pids-limit",
        "security-opt",
    ):
        parser.add_argument(f"--{option}", required=True)
    parser.add_argument("--label", action="append", required=True)
    parser.add_argument("--publish", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("image")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    if "no-such-image" in given.image:
        fail(125, f"{given.image}: image not known")
    ports = {}
    for n, published in enumerate(given.publish):
        host, _, port = published.rpartition("::")
        ports[f"{port}/tcp"] = [{"HostIp": host, "HostPort": str(40000 + n)}]
    made = {
        "Name": given.name,
        "Created": datetime.now(UTC).isoformat(),
        "State": {"Status": status},
        "Config": {
            "Env": [f"{name}={os.environ[name]}" for name in given.env],
            "Labels": dict(label.split("=", 1) for label in given.label),
        },
        "NetworkSettings": {"Ports": ports},
    }
    try:
        with path_of(given.name).open("x") as file:
            json.dump(made, file)
    except FileExistsError:
        fail(125, f'creating container storage: the container name "{given.name}" is already in use by 1f2e')
    sys.stdout.write("1f2e\n")


CHANGES = {"start": "running", "stop": "exited", "pause": "paused", "unpause": "running"}


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command in ("run", "create"):
        run(arguments, "running" if command == "run" else "created")
    elif command in ("container", "inspect"):
        print(json.dumps([read(arguments[-1])]))
    elif command == "ps":
        label, _, value = arguments[arguments.index("--filter") + 1].removeprefix("label=").partition("=")
        for file in Path(os.environ["ENGINE_STATE"]).iterdir():
            labels = json.loads(file.read_text())["Config"]["Labels"]
            if label in labels and value in ("", labels[label]):
                print(file.name)
    elif command in CHANGES:
        if command == "stop" and read(arguments[-1])["State"]["Status"] == "paused":
            fail(125, "cannot stop a paused container")
        change(arguments[-1], CHANGES[command])
    elif command == "rm":
        read(arguments[-1])
        path_of(arguments[-1]).unlink()
    else:
        fail(125, f"unrecognized command {command}")


if __name__ == "__main__":
    main()
