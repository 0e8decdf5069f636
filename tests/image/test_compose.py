"""docs/operations.md, "Deploy on one machine" and "Back it up", followed to the letter on this machine's podman.

Replaced is what a reader replaces too: ports that are taken, PostgreSQL's official image where no registry is reached
(one of Debian's packages that reads the same variables), and how long an alert's cause must last.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.docs.reading import ROOT
from tests.image.engine import TAG, Engine
from tests.image.following import Step, follow, steps
from tests.ports import free_port

pytestmark = pytest.mark.image

PAGE = ROOT / "docs" / "operations.md"
ORCHESTRATOR = "localhost/preview-orchestrator:test"
NEXT = "localhost/preview-agent:test-next"
POSTGRES = "localhost/preview-postgres:test"
OURS = ("preview-database", "preview-supabase", "preview-orchestrator", "preview-door")
NEEDED = {"podman-compose": "podman-compose", "prometheus": "prometheus", "promtool": "prometheus"}
"""Programs, and Debian's packages that have them."""
DNSNAME = "golang-github-containernetworking-plugin-dnsname"
NETWORKS = ("preview-machines", "preview-alone")
VOLUMES = ("preview-database", "preview-database-socket", "preview-storage")


def resolves_names(engine: Engine) -> str:
    """Why the containers of a network do not find each other by name here; empty when they do."""
    network = f"preview-names-{os.getpid()}"
    engine.call("network", "create", network)
    try:
        run = ["run", "--rm", *engine.run_flags[2:], "--network", network]
        resolv = engine.call(*run, "--entrypoint", "cat", TAG, "/etc/resolv.conf", check=False)
        (subnet,) = re.findall(r'"gateway": "([\d.]+)"', engine.call("network", "inspect", network).stdout)
        return (
            "" if f"nameserver {subnet}" in resolv.stdout else f"no name server at {subnet}: {resolv.stderr}"
        )
    finally:
        engine.call("network", "rm", network)


@pytest.fixture(scope="module")
def shell(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a shell whose podman works here, its socket served. Skips, saying why, where it cannot."""
    if not engine.is_podman:
        pytest.skip("the page is written for podman; this engine is another")
    for program, package in NEEDED.items():
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (Debian: {package})")
    if why := resolves_names(engine):
        pytest.skip(
            f"containers do not find each other by name (Debian 12: {DNSNAME}, 13: aardvark-dns): {why}"
        )
    for name in OURS:
        if engine.call("container", "inspect", name, check=False).returncode == 0:
            pytest.skip(f"a deployment runs on this machine: there is a container {name}")
    for name in VOLUMES:
        if engine.call("volume", "exists", name, check=False).returncode == 0:
            pytest.skip(f"a deployment's data is on this machine: there is a volume {name}")
    directory = tmp_path_factory.mktemp("engine")
    lines = ["[containers]", 'default_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]']
    if "--runtime" in engine.command:
        lines += ["[engine]", f'runtime = "{engine.command[-1]}"']
    (directory / "containers.conf").write_text("\n".join(lines) + "\n")
    environ = {**os.environ, "CONTAINERS_CONF": str(directory / "containers.conf")}
    socket_path = directory / "podman.sock"
    service = subprocess.Popen(
        [engine.command[0], "system", "service", "--time", "0", f"unix://{socket_path}"],
        env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while not socket_path.exists():
            assert time.monotonic() < deadline, "podman serves no socket"
            time.sleep(0.05)
        yield {**environ, "ENGINE_SOCKET": str(socket_path)}
    finally:
        service.terminate()
        service.wait(30)


def written() -> list[Step]:
    """The steps of the page, the rehearsed backup before the end as step 10 says, with a save that it takes back."""
    deploy, backup = steps(PAGE, "Deploy on one machine"), steps(PAGE, "Back it up")
    save = next(step for step in deploy if "upsert_project_file" in step.commands)
    later = replace(
        save, place="a save after the backup", shows=(), commands=save.commands.replace("41", "42")
    )
    taken_back = "until curl -sf $PREVIEW/src/hello.ts | grep 'hello = 41'; do sleep 0.2; done"
    after = replace(later, place="a save after it was restored", commands=later.commands.replace("42", "43"))
    *before, end = deploy
    made, restored = backup
    back = Step("what was saved after the backup is gone", taken_back, ())
    return [*before, made, later, restored, back, after, end]


@pytest.fixture
def checkout(engine: Engine, shell: dict[str, str], tmp_path: Path) -> Iterator[Path]:
    """What the steps read of a checkout, the alerts' patience shortened; nothing of the deployment is left after."""
    shutil.copytree(
        ROOT / "deploy", tmp_path / "deploy", ignore=shutil.ignore_patterns(".env", "backup", "metrics")
    )
    observability = tmp_path / "docs" / "observability"
    observability.mkdir(parents=True)
    alerts = (ROOT / "docs" / "observability" / "alerts.yml").read_text()
    (observability / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 1s", alerts))
    yield tmp_path
    containers = engine.call(
        "ps", "--all", "--quiet", "--filter", "label=preview-sync.session"
    ).stdout.split()
    engine.call("rm", "--force", "--ignore", "--time", "1", *OURS, *containers, check=False)
    engine.call("untag", NEXT, NEXT, check=False)  # alone, it would take every name
    for kind, names in (("volume", VOLUMES), ("network", NETWORKS)):
        for name in names:
            engine.call(kind, "rm", name, check=False)


def test_the_page_is_followed(engine: Engine, shell: dict[str, str], checkout: Path) -> None:
    engine.build(ORCHESTRATOR, "deploy/Dockerfile")
    engine.build(POSTGRES, "tests/image/postgres/Dockerfile")
    orchestrator, supabase, door, prometheus = (free_port() for _ in range(4))
    (checkout / "here.env").write_text(
        f"POSTGRES_IMAGE={POSTGRES}\nAGENT_IMAGE={TAG}\nORCHESTRATOR_IMAGE={ORCHESTRATOR}\n"
        f"ENGINE_SOCKET={shell['ENGINE_SOCKET']}\nORCHESTRATOR_PORT={orchestrator}\nSUPABASE_PORT={supabase}\n"
        f"DOOR_PORT={door}\nPREVIEW_DOMAIN=preview.localhost:{door}\n"
    )
    scrape = checkout / "deploy" / "prometheus.yml"
    replacements = {
        r"127\.0\.0\.1:8080": f"127.0.0.1:{orchestrator}",
        r"127\.0\.0\.1:54321": f"127.0.0.1:{supabase}",
        r"127\.0\.0\.1:9090": f"127.0.0.1:{prometheus}",
        r"/run/podman/podman\.sock": shell["ENGINE_SOCKET"],
        r"(?<= )preview-orchestrator(?= (secrets|-C))": ORCHESTRATOR,
        r"(?<=> deploy/\.env\n)": "cat here.env >> deploy/.env\n",
        r"localhost/preview-agent:next": NEXT,
        r"(_interval: )15s": r"\g<1>1s",
    }

    def here(text: str) -> str:
        for there, ours in replacements.items():
            text = re.sub(there, ours, text)
        return text

    scrape.write_text(here(scrape.read_text()))
    typed = [
        replace(s, commands=here(s.commands), shows=tuple(here(line) for line in s.shows)) for s in written()
    ]
    # The eight lines of `here.env` are counted with the file's own.
    typed = [replace(s, shows=("21",) if s.shows == ("13",) else s.shows) for s in typed]
    try:
        told = follow(typed, checkout, shell, 600)
    except AssertionError as failed:
        logs = [engine.call("logs", "--tail", "5", name, check=False) for name in OURS]
        raise AssertionError("\n".join([str(failed), *(log.stdout + log.stderr for log in logs)])) from None
    assert '"state":"firing"' in "".join(told.values())
