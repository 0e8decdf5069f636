"""The programs that people mirror a directory with today, each as fast as its settings let it be.

Every one mirrors `source` to `target` on this machine, over loopback where it speaks to a network, and is watched by
the same `Landing`. It is started at its first turn, in a session of its own, and ended with everything it started. What
a machine lacks is said: `missing` names the program that would have to be installed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from bench.harness.inotify import Landing, NotLanded
from bench.harness.results import PeerFailed

FILES = 500
"""In the mirrored tree, all the time: a burst writes each of them anew."""

SLOW_EDITS = 4
"""A turn's edits of one that takes a second for each."""

DEADLINE = 60.0
"""Seconds for anything to land. The slowest takes two."""


def name_of(number: int) -> str:
    return f"file{number % FILES:03}.ts"


def content_of(number: int) -> str:
    """About 1 KB. Its length differs from that of the file's last content: some look at size and second only."""
    return f"export const n = {number};\n".ljust(1_000 + number // FILES % 50, "x")


def pauses(count: int, longest: float, chance: random.Random) -> list[float]:
    """Seconds to wait before each edit of a turn: spread evenly up to the longest, in any order.

    A program that polls is met at every moment of its period alike, and a turn of four edits has its true median.
    """
    spread = [(n + chance.random()) / count * longest for n in range(count)]
    chance.shuffle(spread)
    return spread


class Mirror:
    """A program that keeps `target` equal to `source`."""

    name = ""
    programs: tuple[str, ...] = ()
    pause = 0.01
    """Seconds that an edit waits at the longest after the one before: the period of one that polls."""

    edits = 100
    """A turn's edits: as many as take a few seconds."""

    grace = 5.0
    """Seconds that it has to end after SIGTERM."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.source, self.target = place / "from", place / "to"
        self._landing: Landing | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        self._number = 0
        self._chance = random.Random(1)

    @classmethod
    def missing(cls) -> list[str]:
        """The programs it needs and this machine does not have."""
        return [program for program in cls.programs if shutil.which(program) is None]

    def commands(self) -> Sequence[Sequence[str]]:
        """What to start."""
        raise NotImplementedError

    def edit_all(self) -> list[float]:
        """A turn's edits, one after the other: seconds from the save to the file on the other side, each.

        Raises `PeerFailed` when files are lost or it has ended, as does `burst`.
        """
        landing = self._started()
        taken = []
        for pause in pauses(self.edits, self.pause, self._chance):
            time.sleep(pause)
            taken.append(self._save(landing, 1))
        return taken

    def burst(self) -> float:
        """Every file saved anew, at once: seconds from the first to the last on the other side."""
        return self._save(self._started(), FILES)

    def stop(self) -> None:
        """End it, and everything it started: when this returns, nothing of it runs."""
        for process in self._processes:
            for number, seconds in ((signal.SIGTERM, self.grace), (signal.SIGKILL, 5.0)):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                if _ended(process, seconds):
                    break
        self._processes.clear()
        if self._landing is not None:
            self._landing.close()
            self._landing = None

    def _save(self, landing: Landing, count: int) -> float:
        wanted = {name_of(n): content_of(n) for n in range(self._number, self._number + count)}
        self._number += count
        landing.forget()
        began = time.perf_counter()
        for name, content in wanted.items():
            (self.source / name).write_text(content)
        try:
            return landing.wait({name: len(content) for name, content in wanted.items()}, DEADLINE) - began
        except NotLanded as lost:
            ended = [code for process in self._processes if (code := process.poll()) is not None]
            raise PeerFailed(f"it ended, with {ended[0]}" if ended else str(lost)) from None

    def _started(self) -> Landing:
        if self._landing is not None:
            return self._landing
        for directory in (self.source, self.target):
            directory.mkdir(parents=True)
        self.prepare()
        self._landing = Landing(self.target)
        for command in self.commands():
            self._processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={**os.environ, **self.environ()},
                    start_new_session=True,
                )
            )
        self._await_first()
        return self._landing

    def prepare(self) -> None:
        """Write its configuration."""

    def environ(self) -> Mapping[str, str]:
        return {}

    def _await_first(self) -> None:
        """Until it mirrors: an edit is repeated until one comes through, since nobody says when they watch."""
        assert self._landing is not None
        for seconds in (0.25, 0.5, 1, 2, 4, 8, 16, 32):
            with contextlib.suppress(NotLanded):
                name, content = name_of(self._number), content_of(self._number)
                self._number += FILES
                (self.source / name).write_text(content)
                self._landing.wait({name: len(content)}, seconds)
                return
            for process in self._processes:
                if process.poll() is not None:
                    raise PeerFailed(f"it ended at once, with {process.returncode}")
        raise PeerFailed("it mirrors nothing")


class Copying(Mirror):
    """The least there is: what inotifywait says was written, `cp` copies. In place: a reader may see half a file."""

    name = "inotifywait + cp"
    programs = ("inotifywait", "cp")

    def commands(self) -> Sequence[Sequence[str]]:
        source, target = shlex.quote(str(self.source)), shlex.quote(str(self.target))
        loop = f'while IFS= read -r name; do cp "{source}/$name" "{target}/$name"; done'
        return [["bash", "-c", f"inotifywait -m -q -e close_write -e moved_to --format %f {source} | {loop}"]]


class Rsyncing(Mirror):
    """The loop that everybody writes: wait for an event, take those that are there, rsync the tree."""

    name = "inotifywait + rsync"
    programs = ("rsync", "inotifywait")

    def commands(self) -> Sequence[Sequence[str]]:
        source, target = shlex.quote(str(self.source)), shlex.quote(str(self.target))
        drain = "while read -r -t 0.001 _; do :; done"
        loop = f"while read -r _; do {drain}; rsync -a --whole-file {source}/ {target}/; done"
        return [
            ["bash", "-c", f"inotifywait -m -q -r -e close_write -e moved_to -e delete {source} | {loop}"]
        ]


class Lsyncd(Mirror):
    """lsyncd with no delay of its own, and rsync told not to look for differences inside files."""

    name = "lsyncd"
    programs = ("lsyncd", "rsync")
    mode = "default.rsync, rsync = { archive = true, whole_file = true }"

    def prepare(self) -> None:
        (self.place / "lsyncd.lua").write_text(
            "settings { nodaemon = true, insist = true }\n"
            f"sync {{ {self.mode}, source = '{self.source}', target = '{self.target}', delay = 0 }}\n"
        )

    def commands(self) -> Sequence[Sequence[str]]:
        return [["lsyncd", str(self.place / "lsyncd.lua")]]


class LsyncdDirect(Lsyncd):
    """lsyncd's mode for two directories of one machine: `cp` for one file. It reaches no other machine."""

    name = "lsyncd direct"
    mode = "default.direct"


class Unison(Mirror):
    """Unison between two directories: told of changes where its watcher is installed, else looking every second."""

    name = "unison"
    programs = ("unison",)
    edits = SLOW_EDITS

    @property
    def pause(self) -> float:  # type: ignore[override]
        return 0.01 if self._watches() else 1.0

    @staticmethod
    def _watches() -> bool:
        return shutil.which("unison-fsmonitor") is not None

    def environ(self) -> Mapping[str, str]:
        return {"UNISON": str(self.place / "archive"), "HOME": str(self.place)}

    def commands(self) -> Sequence[Sequence[str]]:
        repeat = "watch" if self._watches() else "1"
        options = [
            "-batch",
            "-auto",
            "-ui",
            "text",
            "-fastcheck",
            "true",
            "-logfile",
            os.devnull,
            "-repeat",
            repeat,
        ]
        return [["unison", str(self.source), str(self.target), *options]]


class Syncthing(Mirror):
    """Two Syncthings on loopback that know each other and nobody else. They wait a second for more events, no less."""

    name = "syncthing"
    programs = ("syncthing",)
    edits = SLOW_EDITS
    pause = 1.0

    def prepare(self) -> None:
        homes = [self.place / "home0", self.place / "home1"]
        ports = [_free_port() for _ in homes]
        for home in homes:
            done = subprocess.run(
                ["syncthing", "generate", f"--home={home}", "--no-default-folder", "--skip-port-probing"],
                capture_output=True,
                text=True,
                env={**os.environ, "HOME": str(self.place)},
            )
            if done.returncode:
                raise PeerFailed(f"it cannot make its keys: {done.stderr[-300:].strip()}")
        ids = [self._device_id(home) for home in homes]
        devices = "".join(
            f'<device id="{device}" name="d{n}" compression="never"><address>tcp://127.0.0.1:{port}</address>'
            "</device>"
            for n, (device, port) in enumerate(zip(ids, ports, strict=True))
        )
        members = "".join(f'<device id="{device}"></device>' for device in ids)
        for home, port, directory, kind in zip(
            homes, ports, (self.source, self.target), ("sendonly", "receiveonly"), strict=True
        ):
            (directory / ".stfolder").mkdir()
            (home / "config.xml").write_text(
                f'<configuration version="36"><folder id="bench" path="{directory}" type="{kind}"'
                f' rescanIntervalS="3600" fsWatcherEnabled="true" fsWatcherDelayS="1">{members}'
                "<disableFsync>true</disableFsync></folder>"
                f'{devices}<gui enabled="false"></gui><options>'
                f"<listenAddress>tcp://127.0.0.1:{port}</listenAddress>"
                "<globalAnnounceEnabled>false</globalAnnounceEnabled>"
                "<localAnnounceEnabled>false</localAnnounceEnabled><relaysEnabled>false</relaysEnabled>"
                "<natEnabled>false</natEnabled><urAccepted>-1</urAccepted><startBrowser>false</startBrowser>"
                "<autoUpgradeIntervalH>0</autoUpgradeIntervalH><crashReportingEnabled>false</crashReportingEnabled>"
                "<reconnectionIntervalS>1</reconnectionIntervalS><setLowPriority>false</setLowPriority>"
                "</options></configuration>"
            )

    def environ(self) -> Mapping[str, str]:
        return {"HOME": str(self.place), "STNORESTART": "1", "STNOUPGRADE": "1"}

    def commands(self) -> Sequence[Sequence[str]]:
        return [
            ["syncthing", "serve", f"--home={self.place / home}", "--no-browser"]
            for home in ("home0", "home1")
        ]

    def _device_id(self, home: Path) -> str:
        done = subprocess.run(
            ["syncthing", f"--home={home}", "--device-id"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "HOME": str(self.place)},
        )
        return done.stdout.strip()


MIRRORS: tuple[type[Mirror], ...] = (Copying, LsyncdDirect, Rsyncing, Lsyncd, Unison, Syncthing)
"""Those that take longer for one edit come later."""


def _ended(leader: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether everything of the leader's group has ended within so many seconds.

    A signal is only delivered: who has it ends when a processor gets to it, the leader not last.
    """
    deadline = time.monotonic() + seconds
    while leader.poll() is None or _runs(leader.pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _runs(group: int) -> bool:
    """Whether anything of a process group runs. A zombie does not: whose it is may never ask for it."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
