"""The wheel, installed where no checkout is: every command of both programs runs from it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orchestrator_stub.platform.migrations import MIGRATIONS, read_migrations
from tests.agent.cli.test_check import environment
from tests.orchestrator.test_serve import settings
from tests.package.checkout import (
    ROOT,
    Installed,
    copy_checkout,
    install,
    locked,
    make_wheel,
    with_built_page,
)
from tests.system.stack import Stack, copy_example

pytestmark = pytest.mark.system

VERSIONS = [migration.version for migration in read_migrations(MIGRATIONS)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("clean") / "preview-sync")


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    return make_wheel(checkout)


@pytest.fixture(scope="module")
def constraints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return locked(tmp_path_factory.mktemp("lock") / "constraints.txt")


@pytest.fixture(scope="module")
def whole(wheel: Path, constraints: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """An installation with the control plane."""
    place = tmp_path_factory.mktemp("whole")
    return install(place, f"preview-sync[orchestrator] @ {wheel.as_uri()}", constraints=constraints)


@pytest.fixture(scope="module")
def agent_only(wheel: Path, constraints: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """An installation without any extra, as a machine or another project's CI has it."""
    return install(tmp_path_factory.mktemp("agent"), str(wheel), constraints=constraints)


@pytest.fixture
def plain(postgres_dsn: str) -> str:
    """An empty database of a PostgreSQL that has nothing of Supabase's."""
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        server.execute("drop database if exists preview_installed with (force)")
        server.execute("create database preview_installed")
    return make_conninfo(postgres_dsn, dbname="preview_installed")


def assert_clean(ended: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """What it said on standard output, after an end as it should be."""
    assert "Traceback" not in ended.stdout + ended.stderr, ended.stderr
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout


def test_the_wheel_and_the_one_made_from_the_sdist_carry_the_same(
    checkout: Path, wheel: Path, tmp_path: Path
) -> None:
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    source = with_built_page(copy_checkout(tmp_path / "source"), checkout)
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, check=True, timeout=120
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(command, cwd=unpacked, capture_output=True, check=True, timeout=120)
    (again,) = unpacked.glob("*.whl")
    first, second = (set(zipfile.ZipFile(each).namelist()) for each in (wheel, again))
    assert first == second
    for package in ("agent", "orchestrator_stub"):
        assert f"{package}/py.typed" in first
        known = {
            str(path.relative_to(checkout))
            for path in (checkout / package).rglob("*")
            if path.suffix in (".py", ".sql", ".mjs") and "__pycache__" not in path.parts
        }
        assert known <= first
    assert {f"orchestrator_stub/migrations_sql/{path.name}" for path in MIGRATIONS.iterdir()} <= first


def test_it_is_installed_whole(whole: Installed) -> None:
    where = "import agent, orchestrator_stub; print(agent.__file__, orchestrator_stub.__file__)"
    said = assert_clean(whole.run("python", "-c", where))
    assert str(ROOT) not in said
    assert said.count(str(whole.prefix)) == 2
    assert_clean(whole.run("python", "-m", "pip", "check"))


@pytest.mark.parametrize("program", ["preview-agent", "preview-orchestrator"])
def test_help_says_the_commands(whole: Installed, program: str) -> None:
    assert program in assert_clean(whole.run(program, "--help"))


def test_migrate_applies_every_migration(whole: Installed, plain: str) -> None:
    said = assert_clean(whole.run("preview-orchestrator", "migrate", "--bootstrap", "--database-url", plain))
    assert said.split() == [word for version in VERSIONS for word in ("applied", version)]
    again = assert_clean(whole.run("preview-orchestrator", "migrate", DATABASE_URL=plain))
    assert again == "nothing to apply\n"


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
def test_dev_serves_a_project(whole: Installed, tmp_path: Path) -> None:
    app, state = copy_example(tmp_path / "app"), tmp_path / "state"
    options = ("--once", "--json", "--port", "0", "--state", str(state))
    said = assert_clean(whole.run("preview-orchestrator", "dev", str(app), *options))
    assert set(json.loads(said.splitlines()[-1])) >= {"start_seconds", "save_to_served_ms"}
    assert not Stack(app, state).processes()


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
def test_uvx_serves_a_project_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    """README's line for whoever has a Vite project and the wheel."""
    (line,) = re.findall(r"(?m)^uvx .*$", (ROOT / "README.md").read_text())
    assert wheel.name in line
    app = copy_example(tmp_path / "app")
    shutil.copy(wheel, app)
    venv.create(tmp_path / "venv", with_pip=True)
    there = Installed(tmp_path / "venv", app)
    assert_clean(there.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"))
    said = assert_clean(
        there.run(
            "bash", "-c", f"{line} --once --json --port 0", timeout=600,
            UV_PYTHON=sys.executable, UV_CACHE_DIR=str(tmp_path / "cache"),
        )
    )  # fmt: skip
    assert set(json.loads(said.splitlines()[-1])) >= {"start_seconds", "save_to_served_ms"}
    assert not Stack(app, app / ".preview-sync").processes()


def test_serve_says_that_it_has_no_template(whole: Installed, database: str, tmp_path: Path) -> None:
    """Only a checkout has the example that new projects begin with."""
    process = subprocess.Popen(
        ["preview-orchestrator", "serve"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=whole.environ | settings(database, PORT="0", LOG_FORMAT="json"),
    )  # fmt: skip
    assert process.stderr is not None
    try:
        lines = iter(process.stderr.readline, "")
        said = next(json.loads(line) for line in lines if '"serving"' in line)
        assert said["template"] == "none: new projects stay empty; TEMPLATE_DIR gives them one"
    finally:
        process.terminate()
        process.stderr.close()
        assert process.wait(timeout=20) == 0


def test_replay_runs_a_scenario(agent_only: Installed, tmp_path: Path) -> None:
    for name in ("snapshot-zip.jsonl", "snapshot-zip.zip"):
        shutil.copy(ROOT / "tests" / "scenarios" / name, tmp_path)
    said = assert_clean(agent_only.run("preview-agent", "replay", str(tmp_path / "snapshot-zip.jsonl")))
    assert said.startswith("ok")


def test_check_looks_at_the_machine(agent_only: Installed, tmp_path: Path) -> None:
    """Nobody answers at its addresses, which is what it has to say."""
    session = {name: value for name, value in environment(tmp_path).items() if name != "PATH"}
    ended = agent_only.run("preview-agent", "check", **session)
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "ok    settings      complete; preview-agent " in ended.stdout
    assert "fail  session api   127.0.0.1:" in ended.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("preview-orchestrator", "--help"),
        ("preview-orchestrator", "serve"),
        ("python", "-m", "orchestrator_stub", "migrate"),
    ],
)
def test_without_the_extra_it_is_named_in_one_sentence(agent_only: Installed, words: tuple[str, ...]) -> None:
    ended = agent_only.run(*words)
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("preview-orchestrator: ")
    assert "pip install '.[orchestrator]'" in line
