"""Answers a replayed agent's requests from the scenario's log: the session API, and the storage of snapshots."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import zipfile
from collections.abc import Mapping

import httpx
import orjson

from agent.core.messages import MANIFEST_PATH
from agent.replay.faults import DELTA_SHARE, PAUSES, UNAVAILABLE_SHARE, FaultPlan
from agent.replay.scenario import Log
from agent.session_api import PROBLEM_MEDIA_TYPE, PROBLEM_TYPE

HOST = "http://scenario"
FIRST_SNAPSHOT = f"{HOST}/snapshot.zip"


class ScenarioOrchestrator:
    """Both ends that an agent asks, as the handler of an `httpx.MockTransport`."""

    def __init__(self, log: Log, archive: bytes | None, plan: FaultPlan) -> None:
        """`archive`: the first snapshot; None: one is made of the log."""
        self._log = log
        self._plan = plan
        self._archives = {"snapshot.zip": self._zip() if archive is None else archive}
        self._tokens = 0
        self._dice = random.Random(plan.seed)  # noqa: S311 - a reproducible disorder is the point
        self.catch_ups = 0
        """How many questions were asked, and why."""
        self.reasons: set[str] = set()

    async def respond(self, request: httpx.Request) -> httpx.Response:
        """Answer; when events are shuffled, the answer is late, or it is 503."""
        answer = self._answer(request)
        if self._plan.shuffle and not request.url.path.endswith("/token"):
            await asyncio.sleep(self._dice.choice(PAUSES))
            if self._falls(UNAVAILABLE_SHARE):
                return _body(503, b"away for a moment")
        return answer

    def token(self) -> str:
        """Return the token in force."""
        claims = orjson.dumps({"role": "preview_agent", "jti": self._tokens})
        return f"eyJhbGciOiJub25lIn0.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.eA"

    def expire_token(self) -> None:
        """Refuse the token in force from now on."""
        self._tokens += 1

    def _answer(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if name in self._archives:
            return _body(200, self._archives[name])
        if name == "token":
            return _json(200, {"realtime_token": self.token(), "expires_at": None})
        self.catch_ups += 1
        question = orjson.loads(request.content)
        self.reasons.add(question["reason"])
        if request.headers["authorization"] != f"Bearer {self.token()}":
            problem = {"type": f"{PROBLEM_TYPE}token_expired", "title": "token expired", "status": 401}
            return _json(401, problem)
        name = f"{self.catch_ups}.zip"
        answer = self._log.answer(question, f"{HOST}/{name}")
        if answer["kind"] == "changes" and self._falls(DELTA_SHARE) and not question.get("paths"):
            self._archives[name] = self._zip(base=question["revision"])
            answer = {"kind": "snapshot", "snapshot_url": f"{HOST}/{name}", "manifest": None}
        elif answer["kind"] == "snapshot":
            self._archives[name] = self._zip()
        return _json(200, answer)

    def _falls(self, share: float) -> bool:
        return self._plan.shuffle and self._dice.random() < share

    def _zip(self, base: int | None = None) -> bytes:
        manifest, files = self._log.manifest(base), self._log.files()
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MANIFEST_PATH, orjson.dumps(manifest))
            for item in manifest["files"]:
                archive.writestr(item["file_path"], files[item["file_path"]])
        return whole.getvalue()


def _body(status: int, content: bytes, media: str = "application/octet-stream") -> httpx.Response:
    """As an answer comes from a socket: its body is not read yet."""
    return httpx.Response(status, headers={"content-type": media}, stream=httpx.ByteStream(content))


def _json(status: int, body: Mapping[str, object]) -> httpx.Response:
    return _body(status, orjson.dumps(body), "application/json" if status < 400 else PROBLEM_MEDIA_TYPE)
