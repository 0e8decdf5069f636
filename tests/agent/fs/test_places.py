"""Directories in whose place the project's user could put something else: refused at the start; no link is followed.

The agent is root then, and writes, gives away and locks what stands there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from agent.config import Settings
from agent.core.errors import RootUnusable
from agent.core.model import Cursor
from agent.devserver.install import Installer
from agent.devserver.sandbox import Rights
from agent.fs.places import replaceable, weaknesses
from agent.fs.project_dir import ProjectDir
from agent.sync.ledger import Ledger
from tests.agent.cli.test_check import environment
from tests.agent.disks import Agent, kinds, opened, write
from tests.agent.processes import until

ROOT = Path(__file__).parents[3]
UID, GID = 65534, 54_341
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what is not its own")


def theirs(path: Path) -> None:
    os.chown(path, UID, GID)


def mode(bits: int) -> Callable[[Path], None]:
    return lambda path: path.chmod(bits)


def group_may_write(path: Path) -> None:
    os.chown(path, 0, GID)
    path.chmod(0o775)


def their_acl(path: Path) -> None:
    """`setfacl -m u:somebody:rwx`, without the program."""
    entries = ((0x01, 7, 0xFFFFFFFF), (0x02, 7, UID), (0x04, 5, 0xFFFFFFFF), (0x10, 7, 0xFFFFFFFF),
               (0x20, 5, 0xFFFFFFFF))  # fmt: skip
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, "system.posix_acl_access", packed)
    except OSError as error:
        pytest.skip(f"this file system has no access lists: {error}")


def nothing(path: Path) -> None:
    return


@needs_root
@pytest.mark.parametrize(
    ("above", "is_weak"),
    [
        (nothing, False),
        (theirs, True),
        (lambda path: (theirs(path), path.chmod(0o555)), True),
        (group_may_write, True),
        (lambda path: (group_may_write(path), os.chown(path, 0, GID + 1)), False),
        (their_acl, True),
        (mode(0o777), True),
        (mode(0o1777), False),
        (lambda path: (os.chown(path, 54_399, 54_399), path.chmod(0o755)), False),
    ],
    ids=["root's", "theirs", "theirs, closed for now", "their group's", "another group's", "by access list",
         "everybody's", "sticky", "a third user's"],
)  # fmt: skip
@pytest.mark.parametrize("depth", ["app", "app/deep"])
def test_who_may_write_above_can_put_something_else_there(
    open_path: Path, above: Callable[[Path], object], is_weak: bool, depth: str
) -> None:
    place = open_path / depth / "place"
    place.mkdir(parents=True)
    above(open_path / "app")
    assert replaceable(str(place), UID, GID) == (str(open_path / "app") if is_weak else None)


@needs_root
@pytest.mark.parametrize("made", [True, False])
def test_in_a_sticky_directory_it_depends_on_whose_the_thing_is(open_path: Path, made: bool) -> None:
    open_path.chmod(0o1777)
    place = open_path / "place"
    if made:
        place.mkdir()
        assert replaceable(str(place), UID, GID) is None
        assert replaceable(str(place), UID, GID, given=True) == str(open_path)
        theirs(place)
    assert replaceable(str(place), UID, GID) == str(place if made else open_path)


@needs_root
def test_links_on_the_way_have_ways_of_their_own(open_path: Path) -> None:
    for name in ("roots", "users", "real/place"):
        (open_path / name).mkdir(parents=True)
    theirs(open_path / "users")
    (open_path / "roots/link").symlink_to("../users/link")
    (open_path / "users/link").symlink_to(open_path / "real")
    (open_path / "roots/short").symlink_to(open_path / "real")
    (open_path / "round").symlink_to("round")
    assert replaceable(str(open_path / "roots/link/place"), UID, GID) == str(open_path / "users")
    assert replaceable(str(open_path / "roots/short/place"), UID, GID) is None
    assert replaceable(str(open_path / "roots/../users/../real/place"), UID, GID) is None
    assert replaceable(str(open_path / "round/place"), UID, GID) is None, "the kernel refuses it"


@needs_root
def test_nobody_else_may_write_in_the_state_either(open_path: Path) -> None:
    (open_path / "state").mkdir()
    (open_path / "state/ledger.sqlite").touch()
    settings = Settings(
        project_id=UUID(int=1), session_id=UUID(int=1), project_dir=open_path / "project",
        state_dir=open_path / "state",
    )  # fmt: skip
    assert weaknesses(settings, "somebody", UID, GID) == []
    for bits in (0o777, 0o1777):
        (open_path / "state").chmod(bits)
        (sentence,) = weaknesses(settings, "somebody", UID, GID)
        assert sentence.startswith("STATE_DIR: ")


# --- the agent itself


def layout(open_path: Path, **more: str) -> dict[str, str]:
    """As in the image: a directory of root's, with a project of the user's."""
    (open_path / "app/project").mkdir(parents=True)
    os.chown(open_path / "app/project", UID, 65534)
    (open_path / "state").mkdir(mode=0o700)
    given = environment(open_path, PROJECT_DIR=str(open_path / "app/project"), DEV_USER="nobody")
    return given | {"LOG_FORMAT": "json", "HEALTH_PORT": "0"} | more


@contextmanager
def running_agent(environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    agent = subprocess.Popen(
        [sys.executable, "-m", "agent", "run"], env=environ, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip
    try:
        yield agent
    finally:
        if agent.poll() is None:
            agent.send_signal(signal.SIGKILL)
        agent.wait()


@needs_root
@pytest.mark.parametrize(
    ("weak", "names"),
    [("app", "PROJECT_DIR, STAGING_DIR and MODULES_DIR"), ("state", "STATE_DIR"), ("", "PROJECT_DIR")],
)
async def test_a_start_where_the_user_could_put_a_link_is_refused(
    open_path: Path, weak: str, names: str
) -> None:
    environ = layout(open_path)
    os.chown(open_path / weak, UID, 65534)
    before = sorted(open_path.rglob("*"))
    with running_agent(environ) as agent:
        said, _ = await asyncio.to_thread(agent.communicate, timeout=20)
        assert agent.returncode == 71
    (line,) = [line for line in said.decode().splitlines() if line.startswith("preview-agent: ")]
    assert line.startswith(f"preview-agent: {names}")
    place = open_path / weak
    assert f"chown root {place} && chmod go-w {place}" in line
    assert sorted(open_path.rglob("*")) == before


@needs_root
@pytest.mark.parametrize(
    "more", [{}, {"DEV_USER": ""}, {"SYNC_MODE": "shadow"}], ids=["image", "same user", "shadow"]
)
async def test_a_start_in_the_images_layout_or_without_another_user_is_not(
    open_path: Path, more: dict[str, str]
) -> None:
    environ = layout(open_path, **more)
    if more:
        os.chown(open_path / "app", UID, 65534)
    with running_agent(environ) as agent:
        assert agent.stdout is not None
        os.set_blocking(agent.stdout.fileno(), False)
        said = bytearray()
        await until(lambda: said.extend(agent.stdout.read() or b"") or b"agent.started" in said)
        agent.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(agent.wait, 20) == 0, said


@needs_root
async def test_check_says_it_too(open_path: Path) -> None:
    environ = layout(open_path)
    theirs(open_path / "app")
    done = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent", "check", env=environ, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    said = (await done.communicate())[0].decode()
    assert done.returncode == 71
    (line,) = [line for line in said.splitlines() if "chmod go-w" in line]
    assert line.startswith("fail  isolation     PROJECT_DIR, STAGING_DIR and MODULES_DIR")


# --- links


def elsewhere(tmp_path: Path, link: str) -> Path:
    """A directory of somebody's, to which a link leads from `link`."""
    target = tmp_path / "elsewhere"
    target.mkdir(mode=0o755)
    (target / "precious").write_text("precious")
    (tmp_path / link).symlink_to(target)
    return target


def untouched(target: Path) -> bool:
    found = target.stat()
    return (
        os.listdir(target) == ["precious"]
        and stat.S_IMODE(found.st_mode) == 0o755
        and found.st_uid == os.geteuid()
    )


@pytest.mark.parametrize("link", ["project", "staging"])
def test_a_link_in_the_place_of_root_or_staging_is_not_followed(tmp_path: Path, link: str) -> None:
    target = elsewhere(tmp_path, link)
    owner = (12_345, 12_345) if os.geteuid() == 0 else None
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging", owner=owner)
    with pytest.raises(RootUnusable, match=f"{link}: it is a symbolic link; name the directory"):
        disk.open()
    assert untouched(target)


def test_a_link_in_the_place_of_the_state_is_not_followed(tmp_path: Path) -> None:
    target = elsewhere(tmp_path, "state")
    ledger = Ledger(tmp_path / "state" / "ledger.sqlite")
    with pytest.raises(RootUnusable, match="it is a symbolic link; name the directory"):
        ledger.load()
    with pytest.raises(RootUnusable, match="it is a symbolic link; name the directory"):
        ledger.record((), Cursor())
    assert untouched(target)


async def test_a_link_in_the_place_of_the_modules_is_not_followed(tmp_path: Path) -> None:
    target = elsewhere(tmp_path, "modules")
    (tmp_path / "project").mkdir()
    settings = Settings(
        project_id=UUID(int=1),
        session_id=UUID(int=1),
        project_dir=tmp_path / "project",
        modules_dir=tmp_path / "modules",
    )
    installer = Installer(settings, environ={}, rights=Rights(), on_line=print)
    with pytest.raises(RootUnusable, match="it is a symbolic link; name the directory"):
        await installer.open()
    assert untouched(target)


@pytest.mark.parametrize("made", [True, False], ids=["there before", "made anew"])
def test_a_root_that_is_replaced_by_a_link_while_we_work_is_not_followed(tmp_path: Path, made: bool) -> None:
    root = tmp_path / "project"
    with opened(root, tmp_path / "staging") as agent:
        agent.put({"a": "1", "b/c": "2"})
        root.rename(tmp_path / "aside")
        target = elsewhere(tmp_path, "project")
        result = agent.apply(write("a", "3", version=2), write("d/e" if made else "b/c", "4", version=2))
        assert {kind for kind, *_ in kinds(result)} == {"path_unusable"}
        assert untouched(target)
        root.unlink()
        (tmp_path / "aside").rename(root)
        assert not agent.apply(write("a", "3", version=2)).problems
    assert isinstance(agent, Agent)
