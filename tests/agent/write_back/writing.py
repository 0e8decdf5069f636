"""An orchestrator that takes what containers give back, as the contract says, over the database of the loop's world."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx

from agent.link.source import Received
from tests.agent.sync.world import World, refused
from tests.fakes.realtime import jwt


@dataclass
class Writer:
    """Attributes:
    offers: every offer that came, replays too.
    events: what to tell of the versions that were made.
    script: the answers of the next offers in place of what the database says: a response, or an error.
    """

    world: World
    offers: list[dict[str, Any]] = field(default_factory=list)
    events: list[Received] = field(default_factory=list)
    script: list[Any] = field(default_factory=list)
    answers: dict[str, Any] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    refuses: dict[str, str] = field(default_factory=dict)
    """By path, the rule that it is refused by."""
    tokens: int = 0
    may_write: bool = True

    def __post_init__(self) -> None:
        self.world.orchestrator.other = self

    def __call__(self, what: str, body: dict[str, Any]) -> Any:
        if what == "token":
            self.tokens += 1
            given = {"realtime_token": jwt(2_000_000_000 + self.tokens)}
            return given | ({"write_token": jwt(2_000_000_000, generation=3)} if self.may_write else {})
        assert what == "changes", what
        self.offers.append(body)
        if self.script:
            answer = self.script.pop(0)
            if isinstance(answer, Exception):
                raise answer
            if callable(answer):
                answer = answer(body)
            return answer
        return self.take(body)

    def take(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer an offer; the same one again as the first time."""
        if body["offer_id"] not in self.answers:
            results = [self._one(change) for change in body["changes"]]
            self.answers[body["offer_id"]] = {
                "epoch": self.world.database.epoch,
                "revision": self.world.database.revision,
                "results": results,
            }
        answer: dict[str, Any] = self.answers[body["offer_id"]]
        return answer

    def lose_the_answer(self, body: dict[str, Any]) -> httpx.Response:
        """Take an offer, and have its answer never come."""
        self.take(body)
        return refused(503)(None)

    def _one(self, change: dict[str, Any]) -> dict[str, Any]:
        path, database = change["file_path"], self.world.database
        version = database.versions.get(path, 0)
        result = {"file_path": path}
        if path in self.refuses:
            return {**result, "outcome": "refused", "rule": self.refuses[path]}
        if database.files.get(path) == change["content"]:
            return {**result, "outcome": "same", "version": version}
        unknown_tombstone = change["base_version"] == 0 and database.files.get(path) is None
        if change["base_version"] != version and not unknown_tombstone:
            if change["content"] is not None:
                self.kept.append(change["content"])
            return {**result, "outcome": "conflict", "version": version, "kept_id": f"k{len(self.kept)}"}
        self.events.append(database.commit({path: change["content"]}))
        return {**result, "outcome": "applied", "version": version + 1, "revision": database.revision}

    @property
    def paths(self) -> list[str]:
        """Every path that was offered, in order."""
        return [change["file_path"] for offer in self.offers for change in offer["changes"]]
