"""Measures putting one received change on disk against a C program that writes a temporary file and renames it.

Ours begins with the text of the frame: JSON, every field checked, SHA-256, the directory proven to be where it was,
stat before and after, staging, rename. The C program has its bytes in memory, checks nothing, and does `open, write,
close, rename`. Both replace the files of two equal trees, in turn, round by round.

Ours exchanges old and new file (`agent.fs.transaction` says why): on ext4 that spares a write to the disk at each
replacement, on tmpfs nothing. The second row's C program exchanges too: what is left is the price of the checks. Bounds
are for this disk. The rows on an ext4 in memory (`bench.harness.scratch_fs`) show how much of the ratio is the disk's
share in C's rename; they have no bound.

A `planned, recorded` row is the agent's whole path: with the planner's step, and the ledger's record of each change.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import orjson

from agent.core.messages import read_event
from agent.core.model import Commit, Cursor, Entry, RelPath, Tree, Write
from agent.core.reconcile import step
from agent.fs.inspect import FileStat
from agent.fs.project_dir import ProjectDir
from agent.fs.transaction import TransactionResult
from agent.sync.ledger import Ledger
from bench.harness.results import Row, Unmeasurable, Waits, in_turn, ratio_of
from bench.harness.scratch_fs import NEW, Ground

SIZES = ((1_000, 0.70), (10_000, 0.70), (100_000, 0.50), (1_000_000, 0.30))
"""Bytes of a file, and the share of the C program's speed that is asked for."""

FILES = 50
DIRECTORIES = 5
LINE = "  const [count, setCount] = useState(0); // how often it was clicked\n"
GROUND = 1 << 30
"""Bytes of a file system in memory: some hundred files of a megabyte, and what ext4 wants for itself."""

OURS, RENAMING, EXCHANGING, FOLLOWED = "ours", "C temp+rename", "C temp+exchange", "followed"
EPOCH = "00000000-0000-4000-8000-00000000000e"

C_SOURCE = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
static void scheduled(long *ran, long *waited) {
    FILE *file = fopen("/proc/self/schedstat", "r");
    if (!file || fscanf(file, "%ld %ld", ran, waited) != 2)
        *ran = *waited = 0;
    if (file)
        fclose(file);
}
int main(int argc, char **argv) {
    const char *root = argv[1], *staging = argv[2];
    size_t size = strtoul(argv[3], 0, 10);
    int files = atoi(argv[4]), directories = atoi(argv[5]), exchanges = atoi(argv[6]), count;
    long done = 0, ran[2], waited[2];
    char *content = malloc(size), temporary[4096], target[4096];
    memset(content, 'c', size);
    while (scanf("%d", &count) == 1) {
        struct timespec before, after;
        scheduled(&ran[0], &waited[0]);
        clock_gettime(CLOCK_MONOTONIC, &before);
        for (int n = 0; n < count; n++, done++) {
            int file = done % files;
            snprintf(temporary, sizeof temporary, "%s/%c%ld", staging, exchanges ? 'x' : 'r', done);
            snprintf(target, sizeof target, "%s/src/part%d/file%d.tsx", root, file % directories, file);
            int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
            int failed = fd < 0 || write(fd, content, size) != (ssize_t)size || close(fd);
            if (!failed && exchanges && done >= files)
                failed = renameat2(AT_FDCWD, temporary, AT_FDCWD, target, RENAME_EXCHANGE) || unlink(temporary);
            else if (!failed)
                failed = rename(temporary, target);
            if (failed) {
                perror(target);
                return 1;
            }
        }
        clock_gettime(CLOCK_MONOTONIC, &after);
        scheduled(&ran[1], &waited[1]);
        printf("%.9f %ld %ld\n", (after.tv_sec - before.tv_sec) + (after.tv_nsec - before.tv_nsec) / 1e9,
               ran[1] - ran[0], waited[1] - waited[0]);
        fflush(stdout);
    }
    return 0;
}
"""


def path_of(number: int) -> str:
    file = number % FILES
    return f"src/part{file % DIRECTORIES}/file{file}.tsx"


class Ours:
    """The agent's path, over frames as they come from the socket."""

    def __init__(self, home: Path, size: int, waits: Waits) -> None:
        self.waits = waits
        self.disk = ProjectDir(home / "ours", home / "staging")
        self.disk.open()
        self.ledger = Ledger(home / "state/ledger.db")
        self.tree = Tree(Cursor(EPOCH, 0))
        self.known: dict[RelPath, FileStat] = {}
        self.size = size
        self.rest = LINE * (size // len(LINE) + 1)
        self.revision = 0

    def close(self) -> None:
        self.disk.close()
        self.ledger.close()

    def frames(self, count: int) -> list[bytes]:
        """The next messages, as Realtime sends them (vsn 2.0.0)."""
        made = []
        for number in range(self.revision, self.revision + count):
            content = f"export const n = {number};\n{self.rest}"[: self.size]
            payload = {
                "file_path": path_of(number),
                "content": content,
                "content_hash": hashlib.sha256(content.encode()).hexdigest(),
                "version": number + 1,
                "timestamp": "2026-11-23T04:00:00.000000+00:00",
                "sender": "user",
                "revision": number + 1,
                "epoch": EPOCH,
                "file_type": "typescript",
                "size": self.size,
                "id": "00000000-0000-4000-8000-000000000001",
            }
            message = {"type": "broadcast", "event": "file:update", "payload": payload}
            made.append(orjson.dumps([None, None, "realtime:project:p", "broadcast", message]))
        return made

    def apply(self, count: int) -> float:
        """Decode and apply so many, one by one; seconds each."""
        return self._timed(self._apply, count)

    def follow(self, count: int) -> float:
        """The same with plan and ledger."""
        return self._timed(self._apply_and_record, count)

    def _apply(self, frame: bytes) -> None:
        (change,) = self._read(frame).changes
        assert change.digest is not None
        entry = Entry(change.version or 0, change.digest, change.size or 0)
        self._follow(self.disk.apply([Write(change.path, entry, change.content)], self.known))

    def _apply_and_record(self, frame: bytes) -> None:
        plan = step(self.tree, self._read(frame))
        result = self.disk.apply(plan.operations, self.known, tree=self.tree.entries)
        self._follow(result)
        self.tree = plan.tree
        self.ledger.record(result.done, self.tree.cursor)

    def _read(self, frame: bytes) -> Commit:
        message = orjson.loads(frame)[4]
        commit = read_event(message["event"], message["payload"])
        assert isinstance(commit, Commit)
        return commit

    def _follow(self, result: TransactionResult) -> None:
        for done in result.done:
            assert done.stat is not None
            self.known[done.operation.path] = done.stat

    def _timed(self, one: Callable[[bytes], None], count: int) -> float:
        frames = self.frames(count)
        with self.waits.turn():
            started = time.perf_counter()
            for frame in frames:
                one(frame)
            seconds = time.perf_counter() - started
        self.revision += count
        assert len(self.known) == min(self.revision, FILES)
        self.tree = Tree(Cursor(EPOCH, self.revision), self.tree.entries)
        return seconds / count


class Peer:
    """The C program, waiting to be told how many to write."""

    def __init__(self, binary: Path, home: Path, size: int, waits: Waits, *, exchanges: bool) -> None:
        self.waits = waits
        root = home / ("exchanging" if exchanges else "renaming")
        for number in range(DIRECTORIES):
            (root / f"src/part{number}").mkdir(parents=True)
        self.process = subprocess.Popen(
            [
                str(binary),
                str(root),
                str(home / "staging"),
                str(size),
                str(FILES),
                str(DIRECTORIES),
                str(int(exchanges)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def take(self, count: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        seconds, ran, waited = self.process.stdout.readline().split()
        self.waits.add(int(ran), int(waited))
        return float(seconds) / count

    def close(self) -> None:
        self.process.communicate()


def compile_peer(directory: Path) -> Path:
    """The C program, built. Raises `Unmeasurable` without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise Unmeasurable("no C compiler to build the peer with (Debian: apt-get install gcc libc6-dev)")
    source = directory / "peer.c"
    source.write_text(C_SOURCE)
    binary = directory / "peer"
    subprocess.run([compiler, "-O2", "-o", str(binary), str(source)], check=True)
    return binary


def measure(home: Path, binary: Path, size: int, *, rounds: int) -> Callable[..., Row]:
    """One size, all contestants in turn; makes a row of two of them."""
    count = max(4, min(20, 4_000_000 // size))
    os.sync()  # what was written before would be written now, by the kernel's threads, in a contestant's time
    waits = Waits()
    ours = Ours(home, size, waits)
    renaming, exchanging = (
        Peer(binary, home, size, waits, exchanges=exchanges) for exchanges in (False, True)
    )
    try:
        samples = in_turn(
            {
                OURS: lambda: ours.apply(count),
                RENAMING: lambda: renaming.take(count),
                EXCHANGING: lambda: exchanging.take(count),
                FOLLOWED: lambda: ours.follow(count),
            },
            rounds,
            warm_up=5,
        )
    finally:
        for each in (ours, renaming, exchanging):
            each.close()

    def row(what: str, key: str, peer: str, at_least: float | None = None) -> Row:
        return Row(
            f"apply {size // 1000:,} KB{what}",
            ours=median(samples[key]) * 1e6,
            unit="µs",
            peer=peer,
            theirs=median(samples[peer]) * 1e6,
            ratio=ratio_of(samples[peer], samples[key]),
            sense="speed",
            at_least=at_least,
            samples=rounds,
            waited=waits.share,
        )

    return row


def run(quick: bool = False) -> Sequence[Row]:
    """All sizes on the file system of the temporary directory, then on a new one in memory."""
    rounds = 25 if quick else 151
    ground = Ground(GROUND)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as directory:
        home = Path(directory)
        binary = compile_peer(home)
        for size, bound in SIZES:
            row = measure(home / str(size), binary, size, rounds=rounds)
            rows.append(row("", OURS, RENAMING, bound))
            rows.append(row("", OURS, EXCHANGING))
            rows.append(row(", planned, recorded", FOLLOWED, RENAMING))
        if ground.lack is not None:
            print(f"  not {NEW}, since {ground.lack}")
            return rows
        for size, _ in SIZES:
            with ground.fresh() as place:
                row = measure(place, binary, size, rounds=rounds)
            rows.append(row(", ext4 in memory", OURS, RENAMING))
    return rows
