"""A 2,000-file snapshot over a connection that is cut, stalled or corrupted anywhere, and the whole way to the disk.

After every failure the project holds, byte for byte, what it held before, and staging holds nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from hashlib import md5
from pathlib import Path

import httpx
import pytest

from agent.config import SnapshotLimits
from agent.core.errors import AgentError, CredentialRejected, SnapshotRejected, Unavailable
from agent.core.model import RelPath, Tree, digest_of
from agent.core.reconcile import reconcile
from agent.fs.inspect import FileStat
from agent.fs.project_dir import ProjectDir
from agent.snapshot.download import Downloader
from tests.agent.disks import in_staging
from tests.fakes.origin import Answer, origin
from tests.fakes.zips import PROJECT, manifest, snapshot
from tests.ports import free_port
from tests.profiles import NIGHTLY

CUTS = 500 if NIGHTLY else 8
QUICK = SnapshotLimits(snapshot_stall_seconds=0.15)


def tree_of(count: int, salt: str) -> dict[str, bytes]:
    return {
        f"src/d{i % 40}/f{i}.ts": f"export const {salt}{i} = {i * 7919}\n".encode() * (i % 30 + 1)
        for i in range(count)
    }


OLD = tree_of(50, "old")
NEW = tree_of(2_000, "new")
DATA = snapshot(NEW, described=True)


class Container:
    """A disk and the tree on it, as the agent would have them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.disk = ProjectDir(place / "project", place / "staging")
        self.disk.open()
        self.tree = Tree()
        self.known: dict[RelPath, FileStat] = {}

    async def hydrate(self, url: str, http: httpx.AsyncClient) -> int:
        """The whole way; how many files were written."""
        got = await Downloader(self.disk, http, QUICK, PROJECT).fetch(url, have=self.tree.entries)
        plan = reconcile(self.tree, got.manifest, got.staged)
        outcome = self.disk.apply(plan.operations, self.known, tree=self.tree.entries)
        assert not outcome.problems
        for done in outcome.done:
            self.known.pop(done.operation.path, None)
            if done.stat is not None:
                self.known[done.operation.path] = done.stat
        self.tree = plan.tree
        return len(plan.operations)

    def files(self) -> dict[str, bytes]:
        root = self.place / "project"
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    def staged(self) -> list[str]:
        return in_staging(self.place / "staging")


@pytest.fixture
async def container(tmp_path: Path) -> AsyncIterator[Container]:
    it = Container(tmp_path)
    async with origin(Answer(snapshot(OLD))) as server, httpx.AsyncClient() as http:
        await it.hydrate(server.url, http)
    assert it.files() == OLD
    yield it
    it.disk.close()


@pytest.mark.parametrize("how", ["close", "reset", "stall"])
async def test_a_connection_that_ends_anywhere(how: str, container: Container) -> None:
    chance = random.Random(how)
    cuts = CUTS // 4 if how == "stall" else CUTS
    async with httpx.AsyncClient() as http:
        for _ in range(cuts):
            at = chance.randrange(len(DATA))
            async with origin(Answer(DATA, cut=at, how=how, announced=chance.random() < 0.5)) as server:
                with pytest.raises((Unavailable, SnapshotRejected)) as caught:
                    await container.hydrate(server.url, http)
            assert isinstance(caught.value, Unavailable) or caught.value.rule in ("truncated", "empty")
            assert container.staged() == []
        assert container.files() == OLD
        async with origin(Answer(DATA)) as server:
            assert await container.hydrate(server.url, http) == 2_000
    assert container.files() == NEW


async def test_bytes_that_change_on_the_way(container: Container) -> None:
    chance = random.Random(4)
    expected = OLD
    async with httpx.AsyncClient() as http:
        for _ in range(CUTS):
            broken = bytearray(DATA)
            for _ in range(chance.choice((1, 1, 1, 5))):
                broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
            async with origin(Answer(bytes(broken))) as server:
                try:
                    await container.hydrate(server.url, http)
                except AgentError:
                    assert container.staged() == []
                else:
                    # A date or a permission bit: nothing that is used.
                    expected = NEW
                assert container.files() == expected


async def test_hydrating_the_same_again_touches_nothing(container: Container) -> None:
    root = container.place / "project"
    before = {p: p.stat() for p in root.rglob("*")}
    async with origin(Answer(snapshot(OLD))) as server, httpx.AsyncClient() as http:
        assert await container.hydrate(server.url, http) == 0
    assert {p: p.stat() for p in root.rglob("*")} == before


async def test_a_delta_changes_what_it_names_and_nothing_else(container: Container) -> None:
    root = container.place / "project"
    changed = {"src/d1/f1.ts": b"changed", "src/new.ts": b"new"}
    gone = ["src/d2/f2.ts"]
    listing = manifest(changed, revision=9, base_revision=7, deleted=gone)
    for listed in listing["files"]:  # type: ignore[attr-defined]
        listed["version"] = 2
    kept = {p: (root / p).stat() for p in OLD if p not in changed and p not in gone}
    async with origin(Answer(snapshot(changed, said=listing))) as server, httpx.AsyncClient() as http:
        assert await container.hydrate(server.url, http) == 3
    assert container.files() == {p: c for p, c in (OLD | changed).items() if p not in gone}
    assert {p: (root / p).stat() for p in kept} == kept
    assert container.tree.cursor.revision == 9


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)]
    if subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield small
    subprocess.run(["umount", small], check=True)


async def test_a_full_disk_is_an_honest_answer(small: Path) -> None:
    disk = ProjectDir(small / "project", small / "staging")
    disk.open()
    data = snapshot({"big.bin": os.urandom(4_000_000), "a": b"a"})
    async with origin(Answer(data)) as server, httpx.AsyncClient() as http:
        with pytest.raises(Unavailable, match="staging directory is unavailable: No space left"):
            await Downloader(disk, http, QUICK).fetch(server.url)
    assert in_staging(small / "staging") == []
    disk.close()


# --- a web server that exists


NGINX = """
daemon off; worker_processes 1; pid {place}/pid; error_log {place}/error.log;
events {{ }}
http {{
  access_log off; client_body_temp_path {place}/t1; proxy_temp_path {place}/t2; fastcgi_temp_path {place}/t3;
  uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5;
  server {{
    listen 127.0.0.1:{port};
    location /slow/ {{ alias {place}/files/; limit_rate 20k; }}
    location / {{
      root {place}/files;
      secure_link $arg_md5,$arg_expires;
      secure_link_md5 "$secure_link_expires$uri secret";
      if ($secure_link = "") {{ return 403; }}
      if ($secure_link = "0") {{ return 410; }}
    }}
  }}
}}
"""


@contextmanager
def nginx(place: Path) -> Iterator[int]:
    port = free_port()
    (place / "nginx.conf").write_text(NGINX.format(place=place, port=port))
    server = subprocess.Popen(["nginx", "-p", str(place), "-c", str(place / "nginx.conf")])
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.skip("this nginx does not start (no secure_link module?)")
                time.sleep(0.02)
        yield port
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
async def test_nginx_with_a_link_that_expires(container: Container) -> None:
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        os.chmod(place, 0o755)
        (place / "files").mkdir()
        (place / "files" / "s.zip").write_bytes(DATA)

        def link(port: int, expires: int) -> str:
            digest = md5(f"{expires}/s.zip secret".encode(), usedforsecurity=False).digest()
            token = urlsafe_b64encode(digest).decode().rstrip("=")
            return f"http://127.0.0.1:{port}/s.zip?md5={token}&expires={expires}"

        with nginx(place) as port:
            async with httpx.AsyncClient() as http:
                now = int(time.time())
                for refused in (link(port, now - 5), link(port, now + 60).replace("md5=", "md5=x")):
                    with pytest.raises(CredentialRejected):
                        await container.hydrate(refused, http)
                assert container.files() == OLD
                short = SnapshotLimits(snapshot_total_seconds=0.3)
                with pytest.raises(Unavailable, match="total_time"):
                    await Downloader(container.disk, http, short).fetch(f"http://127.0.0.1:{port}/slow/s.zip")
                assert container.staged() == []
                await container.hydrate(link(port, now + 60), http)
    assert container.files() == NEW
    assert container.tree.entries[RelPath("src/d7/f7.ts")].digest == digest_of(NEW["src/d7/f7.ts"])
