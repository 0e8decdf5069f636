"""Random scenarios: random commits, lies on the channel and faults, and always the same end.

What the end should be is kept by the generator's own book, not by the replay's log.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from agent.core.model import RelPath, digest_of, parents, tree_hash
from agent.replay.faults import FaultPlan
from agent.replay.runner import ReplayOptions, replay
from tests.profiles import NIGHTLY

SCENARIOS = 1000 if NIGHTLY else 40
BATCH = 20
NAMES = ["a", "b", "lib", "src", "App.tsx", "é.ts", "x.css", "logo.png", "main.ts", "deep"]


class Author:
    """Writes one random scenario. `files` and `versions` are the database as it would be."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.files: dict[RelPath, bytes] = {}
        self.versions: dict[RelPath, int] = {}
        self.epoch = str(UUID(int=1))
        self.epochs = 1
        self.revision = 1
        self.at_ms = 0
        self.lines: list[dict[str, Any]] = []
        for _ in range(self.dice.choice([0, 1, 5, 30])):
            path = self.path()
            self.files[path] = self.text().encode()
            self.versions[path] = 1
        self.first = {path: content.decode() for path, content in self.files.items()}

    def path(self) -> RelPath:
        """A path that the database would take beside the others."""
        while True:
            parts = [self.dice.choice(NAMES) for _ in range(self.dice.choice([1, 1, 2, 2, 3]))]
            path = RelPath("/".join(parts))
            below = any(other.startswith(f"{path}/") for other in self.files)
            if not below and not any(parent in self.files for parent in parents(path)):
                return path

    def text(self) -> str:
        return "".join(self.dice.choice("abc\n é") for _ in range(self.dice.choice([0, 1, 20, 400])))

    def change(self) -> tuple[RelPath, bytes | None]:
        """One change, taken into the book."""
        if self.files and self.dice.random() < 0.3:
            path, content = self.dice.choice(sorted(self.files)), None
            del self.files[path]
        else:
            known = self.files and self.dice.random() < 0.5
            path = self.dice.choice(sorted(self.files)) if known else self.path()
            binary = self.dice.random() < 0.2
            content = self.dice.randbytes(30) if binary else self.text().encode()
            self.files[path] = content
        self.versions[path] = self.versions.get(path, 0) + 1
        return path, content

    def item(self, path: RelPath, content: bytes | None, beside: dict[str, str]) -> dict[str, Any]:
        """The change as an event carries it: inline, by reference, or damaged on the way."""
        if content is None:
            return {"action": "delete", "file_path": path, "version": self.versions[path]}
        item: dict[str, Any] = {"action": "update", "file_path": path, "version": self.versions[path]}
        item["content_hash"] = digest_of(content)
        how = self.dice.random()
        if how < 0.15:
            item["content"] = None
        elif how < 0.25:
            item["content"] = "not what it says"
        else:
            item["content"], item["encoding"] = base64.b64encode(content).decode(), "base64"
            return item
        beside[path] = base64.b64encode(content).decode()
        return item

    def commit(self) -> None:
        """One transaction, one revision, one event."""
        self.revision += 1
        beside: dict[str, str] = {}
        stamp = {"timestamp": "2026-11-20T09:00:00Z", "revision": self.revision, "epoch": self.epoch}
        if self.dice.random() < 0.6:
            item = self.item(*self.change(), beside)
            event = "file:update" if item.pop("action") == "update" else "file:delete"
            payload = {**item, **stamp}
        else:
            changed = dict(self.change() for _ in range(self.dice.choice([1, 2, 5, 12])))
            # A path that was made and removed again in one transaction is not in it.
            files = [self.item(path, content, beside) for path, content in changed.items()]
            event, payload = "bulk:apply", {"files": files, **stamp}
            if all(content is not None for content in changed.values()) and self.dice.random() < 0.1:
                beside = {path: base64.b64encode(c).decode() for path, c in changed.items() if c is not None}
                payload = {"files": [], "complete": False, **stamp}
        self.say(event, payload, beside)

    def say(self, event: str, payload: dict[str, Any], beside: dict[str, str] | None = None) -> None:
        line: dict[str, Any] = {"at_ms": self.at_ms, "event": event, "payload": payload}
        self.lines.append({**line, "bytes": beside} if beside else line)

    def nonsense(self) -> None:
        """What no database says."""
        path = self.dice.choice(sorted(self.files) or ["x"])
        event, payload = self.dice.choice(
            [
                ("file:update", {"file_path": path, "content": "front end", "version": 10**6}),
                ("file:update", {"file_path": path}),
                ("file:delete", {"file_path": "../x", "revision": "?"}),
                ("bulk:apply", {"files": 7}),
                ("presence", {"x": 1}),
                ("snapshot:ready", {"snapshot_url": "http://elsewhere/x.zip", "manifest": None}),
            ]
        )
        self.say(event, {"timestamp": "2026-11-20T09:00:00Z", **payload})

    def fault(self) -> None:
        fault = self.dice.choice(["disconnect", "expire_token", "disk_full", "restart_agent"])
        lost = self.dice.choice([0, 0, 1, 3, 30])
        self.lines.append({"at_ms": self.at_ms, "fault": fault, "lost": lost})

    def write(self, path: Path) -> Path:
        for _ in range(self.dice.choice([1, 5, 20, 60])):
            self.at_ms += self.dice.choice([0, 0, 1, 20, 80, 300, 2000])
            chance = self.dice.random()
            if chance < 0.03:
                self.epochs += 1
                self.epoch, self.revision = str(UUID(int=self.epochs)), self.dice.choice([0, self.revision])
            elif chance < 0.15:
                self.fault()
            elif chance < 0.25:
                self.nonsense()
            else:
                self.commit()
        header = {
            "scenario": 1, "project_id": str(UUID(int=7)), "epoch": str(UUID(int=1)), "revision": 1,
            "snapshot": {"files": self.first},
            "expect": {"tree_hash": tree_hash({p: digest_of(c) for p, c in self.files.items()})},
        }  # fmt: skip
        path.write_text("\n".join(json.dumps(line) for line in [header, *self.lines]))
        return path

    def options(self) -> ReplayOptions:
        dice = self.dice
        faults = FaultPlan(
            seed=dice.randrange(2**31),
            shuffle=dice.random() < 0.5,
            duplicate=dice.choice([0.0, 0.2, 0.9]),
            drop=dice.choice([0.0, 0.2, 0.9]),
            disconnect=dice.choice([0, 1, 4]),
            crash=dice.choice([0, 0, 1, 3]),
        )
        return ReplayOptions(faults, optimistic=dice.random() < 0.2)


@pytest.mark.parametrize("batch", range(SCENARIOS // BATCH))
def test_a_random_scenario_ends_as_the_database(batch: int, tmp_path: Path) -> None:
    for seed in range(batch * BATCH, batch * BATCH + BATCH):
        author = Author(seed)
        path = author.write(tmp_path / f"scenario-{seed}.jsonl")
        options = author.options()
        result = replay(path, tmp_path / str(seed), options)
        assert result.ok, "\n".join([str(options), *result.lines()])
