"""Measures hydrating against `curl | bsdtar` and `curl` then `unzip`, and building a snapshot against `zip -r`.

One archive as the orchestrator builds it, one local server (sendfile), the contestants in turn, each time onto a file
system made for that turn (`bench.harness.scratch_fs`). The smallest load also goes onto this disk, without a bound: a
disk in use moves the same contestant by more than a bound could mean.

Ours is the agent's own path in a process of its own: download, unpack, CRC and SHA-256 of every file, the manifest, the
plan, promotion by rename. The peers check the CRC and nothing else. Time is until the files are in place. Starting an
interpreter is not in ours, since the agent runs already; starting a shell, 10 ms, is in theirs. Processor time is user
and system of all processes of a contestant, without the server's.

Memory is the growth of the process's peak above what it held before: `fetched` until the whole archive is verified
in staging, `hydrated` until it is in place and the tree is known.

Building is from the first query to the object in storage (the local stand-in, in its own process), against `zip -q -r`
of the same files to a local file.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psycopg
import uvicorn
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette

from agent.config import SnapshotLimits
from agent.core.model import RelPath, Tree
from agent.core.reconcile import reconcile
from agent.fs.inspect import FileStat
from agent.fs.project_dir import ProjectDir
from agent.snapshot.download import Downloader
from bench.harness.results import Row, Unmeasurable, in_turn, ratio_of
from bench.harness.scratch_fs import Ground
from orchestrator_stub.local_supabase.app import stand_in
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
from orchestrator_stub.machines.local import ALLOCATOR
from orchestrator_stub.platform.migrations import bootstrap, migrate
from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.snapshots.builder import SnapshotBuilder
from orchestrator_stub.snapshots.zip_writer import ZipWriter

PROJECT = "00000000-0000-4000-8000-000000000001"
EPOCH = "00000000-0000-4000-8000-00000000000e"
KEYS = ProjectKeys.of(Keyring.from_secret("a secret for benchmarks only, nobody's"))

MEMORY_MIB = 16.25
"""16 MiB and one chunk of 256 KiB."""

REPEAT = 0.5
"""Of the first hydration's time, for hydrating an unchanged project again."""

BUILD = 1.5
"""Of `zip -r`'s time."""


@dataclass(frozen=True, slots=True)
class Load:
    """An archive to hydrate. `at_most`: of bsdtar's time. `rounds`: of a full run."""

    name: str
    files: int
    file_bytes: int
    is_text: bool
    at_most: float
    rounds: int

    @property
    def ground(self) -> int:
        """Bytes of a file system that holds it twice over."""
        return 2 * self.files * (self.file_bytes + 4096) + (128 << 20)


LOADS = (
    Load("2,000 files, 20 MB", 2_000, 10_000, True, 0.9, 21),
    Load("20,000 files, 200 MB", 20_000, 10_000, True, 0.9, 11),
    Load("50 x 4 MB incompressible", 50, 4_000_000, False, 1.2, 21),
)


def contents(load: Load) -> Iterator[tuple[str, bytes]]:
    """Sorted by path, as a snapshot is. Text packs to a quarter, as source does; the seed is fixed."""
    chance = random.Random(1)
    words = [
        "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(3, 11))) for _ in range(400)
    ]
    marks = (" ", " ", " = ", "(", ")", ".", ", ", ";\n", " => {\n    ", "\n  }\n")
    phrases = ["".join(w + chance.choice(marks) for w in chance.choices(words, k=5)) for _ in range(600)]
    for number in range(load.files):
        if load.is_text:
            text = "".join(chance.choices(phrases, k=load.file_bytes // 30)).encode()
            content = text[: load.file_bytes].ljust(load.file_bytes)
        else:
            content = chance.randbytes(load.file_bytes)
        yield f"src/part{number // 160:03}/module{number // 16 % 10}/file{number:05}.tsx", content


def build_archive(load: Load, path: Path) -> None:
    """The archive as the orchestrator builds it."""
    listed = []
    for name, content in contents(load):
        digest = hashlib.sha256(content).hexdigest()
        listed.append({"file_path": name, "content_hash": digest, "size": len(content), "version": 1})
    manifest = {
        "format": 1, "project_id": PROJECT, "epoch": EPOCH, "revision": 1, "base_revision": None,
        "created_at": "2026-01-01T00:00:00+00:00", "files": listed, "deleted": [],
    }  # fmt: skip
    with path.open("wb") as file:
        archive = ZipWriter(file)
        archive.add(".preview-sync/manifest.json", json.dumps(manifest).encode())
        for name, content in contents(load):
            archive.add(name, content)
        archive.finish()


SERVER = """
import os, socket, sys, threading
listener = socket.create_server(("127.0.0.1", 0)); print(listener.getsockname()[1], flush=True)
def serve(connection):
    with connection, open(sys.argv[1], "rb") as file:
        head = b""
        while not head.endswith(b"\\r\\n\\r\\n"):
            head += connection.recv(65536)
        size = os.fstat(file.fileno()).st_size
        connection.sendall(b"HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % size)
        try:
            connection.sendfile(file)
        except ConnectionError:
            pass
while True:
    connection, _ = listener.accept()
    threading.Thread(target=serve, args=(connection,), daemon=True).start()
"""


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """`path` over HTTP, from a process that costs next to nothing."""
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/snapshot.zip"
    finally:
        server.kill()
        server.wait()


def resident(field: str) -> float:
    """MiB, as the kernel counts: `VmRSS` now, `VmHWM` at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise Unmeasurable(f"/proc/self/status has no {field}")


def processor_time(who: int) -> float:
    """Seconds, user and system."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def forget_peak() -> float:
    """Begin a new peak; where it begins, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


async def hydrate(url: str, directory: Path) -> dict[str, float]:
    """The agent's path, then the same again onto the finished tree."""
    disk = ProjectDir(directory / "project", directory / "staging")
    disk.open()
    tree, known = Tree(), dict[RelPath, FileStat]()
    taken: dict[str, float] = {}
    async with httpx.AsyncClient() as http:
        async with http.stream("GET", url):
            pass  # the agent's HTTP library is loaded by then: httpx loads most of itself at its first request
        before = forget_peak()
        for name in ("seconds", "again"):
            started, computed = time.perf_counter(), processor_time(resource.RUSAGE_SELF)
            got = await Downloader(disk, http, SnapshotLimits(), PROJECT).fetch(url, have=tree.entries)
            taken.setdefault("fetched", resident("VmHWM") - before)
            plan = reconcile(tree, got.manifest, got.staged)
            outcome = disk.apply(plan.operations, known)
            taken[name] = time.perf_counter() - started
            taken.setdefault("processor", processor_time(resource.RUSAGE_SELF) - computed)
            taken.setdefault("hydrated", resident("VmHWM") - before)
            if outcome.problems:
                raise RuntimeError(f"{outcome.problems[:3]}")
            known.update((done.operation.path, done.stat) for done in outcome.done if done.stat)
            tree = plan.tree
    disk.close()
    return taken


async def build(dsn: str, url: str, project: str) -> dict[str, float]:
    """One build, stored anew."""
    async with AsyncConnectionPool(dsn, min_size=1, open=False) as pool, httpx.AsyncClient() as http:
        await pool.wait()
        snapshots = SnapshotBuilder(pool, StorageClient(f"{url}/storage/v1", KEYS.service_key, http))
        before = forget_peak()
        built = await snapshots.build(uuid.UUID(project), anew=True)
        return {"seconds": built.build_seconds, "grown": resident("VmHWM") - before}


def in_a_process(*arguments: str, environ: Mapping[str, str] | None = None) -> dict[str, float]:
    """What `hydrate` or `build` measures in a fresh process, with `environ` added to its environment."""
    command = [sys.executable, "-m", "bench.cases.hydrate", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **(environ or {})})
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


@dataclass(frozen=True, slots=True)
class Taken:
    """What the rounds took. `ours`: what `hydrate` measured, the warm-up's too; the rest in seconds."""

    ours: list[dict[str, float]]
    seconds: dict[str, list[float]]
    bsdtar_processor: list[float]

    def against(self, peer: str) -> dict[str, Any]:
        """A row's figures of time."""
        middle = {name: median(each) * 1000 for name, each in self.seconds.items()}
        return {
            "ours": middle["ours"], "unit": "ms", "peer": peer, "theirs": middle[peer],
            "ratio": ratio_of(self.seconds["ours"], self.seconds[peer]), "samples": len(self.seconds[peer]),
        }  # fmt: skip


def contend(path: Path, fresh: Callable[[], AbstractContextManager[Path]], rounds: int) -> Taken:
    """Unpack the archive at `path` by every contestant in turn, each onto what `fresh` gives."""
    taken = Taken([], {}, [])
    with serving(path) as url:

        def agent() -> float:
            with fresh() as target:
                taken.ours.append(in_a_process("--hydrate", url, str(target), environ=ALLOCATOR))
            return taken.ours[-1]["seconds"]

        def shell(command: str) -> float:
            with fresh() as target:
                before, started = processor_time(resource.RUSAGE_CHILDREN), time.perf_counter()
                subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=target, check=True)
                seconds = time.perf_counter() - started
                taken.bsdtar_processor.append(processor_time(resource.RUSAGE_CHILDREN) - before)
            return seconds

        def bsdtar() -> float:
            return shell(f"curl -sf {url} | bsdtar -xf -")

        def unzip() -> float:
            seconds = shell(f"curl -sf -o ../download.zip {url} && unzip -q ../download.zip")
            taken.bsdtar_processor.pop()
            return seconds

        taken.seconds.update(in_turn({"ours": agent, "bsdtar": bsdtar, "unzip": unzip}, rounds))
    return taken


def measure_hydration(load: Load, archive: Path, rounds: int) -> list[Row]:
    """Rows of one load, on a new file system each time."""
    ground = Ground(load.ground)
    if load is LOADS[0]:
        print(f"  everybody {ground.note}")
    taken = contend(archive, ground.fresh, rounds)
    processor = [each["processor"] for each in taken.ours]
    again = ratio_of([each["again"] for each in taken.ours], [each["seconds"] for each in taken.ours])
    fetched, hydrated = (max(each[name] for each in taken.ours) for name in ("fetched", "hydrated"))
    return [
        Row(f"hydrate {load.name}", **taken.against("bsdtar"), at_most=load.at_most, note=ground.note),
        Row("  processor time", median(processor) * 1000, "ms", "bsdtar",
            median(taken.bsdtar_processor) * 1000, ratio_of(processor, taken.bsdtar_processor),
            samples=len(taken.ours)),
        Row(f"hydrate {load.name}", **taken.against("unzip")),
        Row("  unchanged, again", median(each["again"] for each in taken.ours) * 1000, "ms", "the first time",
            median(taken.seconds["ours"]) * 1000, again, at_most=REPEAT, samples=len(taken.ours)),
        Row("  memory, fetched", fetched, "MiB", sense="memory", at_most=MEMORY_MIB, samples=len(taken.ours)),
        Row(f"  memory, hydrated: {load.files:,} files in place", hydrated, "MiB", sense="memory",
            at_most=MEMORY_MIB, samples=len(taken.ours)),
    ]  # fmt: skip


def measure_on_disk(load: Load, archive: Path, rounds: int) -> list[Row]:
    """Beside bsdtar where temporary files are. Nothing is removed before the last round: ext4 would pay for it."""
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as directory:

        @contextmanager
        def fresh() -> Iterator[Path]:
            place = Path(tempfile.mkdtemp(dir=directory))
            os.sync()
            yield place

        taken = contend(archive, fresh, rounds)
    return [Row(f"hydrate {load.name}, on this disk", **taken.against("bsdtar"))]


def serve_storage(pipe: Connection, dsn: str, directory: str) -> None:
    """The local stand-in for Storage, until killed; tells its port."""
    local = stand_in(dsn, KEYS, Path(directory))
    app = Starlette(routes=local.routes, lifespan=local.lifespan)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, **uvicorn_options()))

    async def run() -> None:
        serving_ = asyncio.create_task(server.serve([listener]))
        while not server.started:  # noqa: ASYNC110 - uvicorn offers nothing to wait on
            await asyncio.sleep(0.01)
        pipe.send(listener.getsockname()[1])
        await serving_

    asyncio.run(run())


def new_project(db: psycopg.Connection[Any]) -> tuple[str, uuid.UUID]:
    """A project at revision 1 with no file yet, and its owner."""
    user = uuid.uuid4()
    db.execute("insert into auth.users (id) values (%s)", [user])
    db.execute("insert into public.user_profiles (id) values (%s)", [user])
    row = db.execute("insert into public.projects (owner_id) values (%s) returning id", [user]).fetchone()
    assert row is not None
    db.execute("update public.project_heads set revision = 1 where project_id = %s", [row[0]])
    return str(row[0]), user


FILL = """
    insert into public.project_files (project_id, file_path, file_type, content, content_hash, created_by, revision,
                                      size_bytes)
    select %s, path, 'typescript', content, encode(sha256(convert_to(content, 'UTF8')), 'hex'), %s, 1,
           octet_length(content)
    from load
"""


def fill(db: psycopg.Connection[Any], load: Load) -> str:
    """A project with the load's files; its id."""
    project, owner = new_project(db)
    with db.cursor() as cursor:
        cursor.execute("create temporary table load (path text, content text)")
        with cursor.copy("copy load from stdin") as copy:
            for name, content in contents(load):
                copy.write_row((name, content.decode()))
        cursor.execute(FILL, [project, owner])
        cursor.execute("drop table load")
        cursor.execute("analyze public.project_files")
    return project


def fill_repetitive(db: psycopg.Connection[Any], files: int) -> str:
    """A project of so many files of 10 KB that pack small: Storage takes objects up to 50 MB by default."""
    project, owner = new_project(db)
    db.execute(
        "create temporary table load as select 'src/d' || n / 100 || '/f' || n || '.ts' as path,"
        " repeat(md5(n::text) || E'\\n', 303) as content from generate_series(1, %s) n",
        [files],
    )
    db.execute(FILL, [project, owner])
    db.execute("drop table load")
    db.execute("analyze public.project_files")
    return project


def measure_building(place: Path, rounds: int, quick: bool) -> list[Row]:
    small, large = LOADS[0], LOADS[1]
    tree = place / "tree"
    for name, content in contents(small):
        file = tree / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    ours: list[dict[str, float]] = []
    grown: float | None = None
    with asyncio.Runner() as runner:
        server = EmbeddedPostgres(place / "data")
        dsn = runner.run(server.start())
        ends = multiprocessing.get_context("spawn")
        here, there = ends.Pipe()
        storage = ends.Process(target=serve_storage, args=(there, dsn, str(place / "storage")))
        try:
            runner.run(bootstrap(dsn))
            runner.run(migrate(dsn))
            with psycopg.connect(dsn, autocommit=True) as db:
                project = fill(db, small)
                huge = None if quick else fill_repetitive(db, large.files)
            storage.start()
            if not here.poll(30):
                raise RuntimeError("the storage did not start")
            url = f"http://127.0.0.1:{here.recv()}"

            def snapshot() -> float:
                os.sync()
                ours.append(in_a_process("--build", dsn, url, project))
                return ours[-1]["seconds"]

            def zipping() -> float:
                (place / "peer.zip").unlink(missing_ok=True)
                os.sync()
                started = time.perf_counter()
                subprocess.run(["zip", "-q", "-r", str(place / "peer.zip"), "."], cwd=tree, check=True)
                return time.perf_counter() - started

            seconds = in_turn({"ours": snapshot, "zip": zipping}, rounds)
            if huge is not None:
                grown = in_a_process("--build", dsn, url, huge)["grown"]
        finally:
            storage.kill()
            storage.join()
            runner.run(server.stop())
    middle = {name: median(each) * 1000 for name, each in seconds.items()}
    rows = [
        Row(f"build {small.name}", middle["ours"], "ms", "zip -r", middle["zip"],
            ratio_of(seconds["ours"], seconds["zip"]), at_most=BUILD, samples=rounds),
        Row("  memory", max(each["grown"] for each in ours), "MiB", sense="memory", samples=len(ours)),
    ]  # fmt: skip
    if grown is not None:
        rows.append(Row(f"  memory, {large.name}", grown, "MiB", sense="memory", samples=1))
    return rows


def run(quick: bool) -> Sequence[Row]:
    """Three loads, one of them on the disk too, then building."""
    missing = [tool for tool in ("curl", "bsdtar", "unzip", "zip") if shutil.which(tool) is None]
    if missing:
        raise Unmeasurable(f"{', '.join(missing)} not installed; `make bench-peers` installs them on Debian")
    rows: list[Row] = []
    for load in LOADS[:1] if quick else LOADS:
        with tempfile.TemporaryDirectory(prefix="preview-bench-") as directory:
            archive = Path(directory, "snapshot.zip")
            build_archive(load, archive)
            rows += measure_hydration(load, archive, 3 if quick else load.rounds)
            if load is LOADS[0]:
                rows += measure_on_disk(load, archive, 3 if quick else load.rounds)
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as directory:
        rows += measure_building(Path(directory), 3 if quick else 11, quick)
    return rows


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--hydrate", url, directory]:
            print(json.dumps(asyncio.run(hydrate(url, Path(directory)))))
        case ["--build", dsn, url, project]:
            print(json.dumps(asyncio.run(build(dsn, url, project))))
        case _:
            raise SystemExit("python -m bench hydrate")
