"""Asking the database what is missing, through the session API, and fetching the snapshot when that is the answer.

The question is `core.scheduler`'s, what the answer means is `core.reconcile`'s; here is only the asking, and the
one place that knows the two ways to a first tree: the URL of the environment, and the session API's offer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import httpx

from agent.config import SnapshotLimits
from agent.core.errors import CredentialRejected, SnapshotRejected, Unavailable
from agent.core.messages import Changes, Current, SnapshotOffer
from agent.core.model import Entry, Problem, RelPath
from agent.core.scheduler import Request
from agent.fs.project_dir import ProjectDir
from agent.retry import Backoff
from agent.session_api import SessionApi
from agent.snapshot.download import Progress, StagedSnapshot, fetch, obtain
from agent.telemetry.status import Problems

Answer = Current | Changes | StagedSnapshot

SNAPSHOT_REJECTED = "snapshot_rejected"
"""The reason that makes the orchestrator build the snapshot anew instead of offering the kept one."""

BACKOFF = Backoff(first=0.25, most=15.0)
"""Between two calls of an orchestrator that failed. At most half of the heartbeat's interval."""


@dataclass(slots=True)
class CatchUp:
    """`api` None: there is no catch-up, only the snapshot URL of the start. `have` gives the tree as it is now."""

    api: SessionApi | None
    disk: ProjectDir
    http: httpx.AsyncClient
    limits: SnapshotLimits
    project_id: str
    problems: Problems
    have: Callable[[], Mapping[RelPath, Entry]]
    progress: Progress = field(default_factory=Progress)
    _rejected: bool = False
    """The last snapshot offered was no good: the next question says so, and gets another build of it."""
    _built: float | None = None
    """Seconds that building the snapshot offered last took; its archive cannot say so itself."""
    offered: str | None = field(default=None, repr=False)
    """URL of the latest `snapshot:ready`: the only answer there is without a session API."""

    @property
    def can_ask(self) -> bool:
        """Whether there is anybody, or anything, to get an answer from."""
        return self.api is not None or self.offered is not None

    def distrust(self) -> None:
        """Let the next answer be built anew, independently of the last."""
        self._rejected = True

    async def ask(self, request: Request) -> Answer:
        """One question, one answer. Raises whatever made it impossible; asking again is the caller's decision."""
        if self.api is None:
            if self.offered is None:
                raise Unavailable("catch-up", "SESSION_API_URL is not set")
            offer, self.offered = self.offered, None
            return await self._fetch(offer)
        reason = SNAPSHOT_REJECTED if self._rejected else request.reason.value
        answer = await self.api.sync(request.epoch, request.revision, reason, sorted(request.paths) or None)
        self.problems.clear_kinds("session_api_unreachable", "token_refused")
        if not isinstance(answer, SnapshotOffer):
            return answer
        self._hear(answer)
        return self._with_build_time(await self._fetch(answer.snapshot_url))

    def _hear(self, offer: SnapshotOffer) -> None:
        self._built = offer.manifest.build_seconds if offer.manifest is not None else None

    def _with_build_time(self, staged: StagedSnapshot) -> StagedSnapshot:
        if self._built is None:
            return staged
        return replace(staged, manifest=replace(staged.manifest, build_seconds=self._built))

    async def _fetch(self, url: str) -> StagedSnapshot:
        try:
            staged = await fetch(
                url,
                disk=self.disk,
                http=self.http,
                limits=self.limits,
                expected_project=self.project_id,
                progress=self.progress,
                have=self.have(),
            )
        except SnapshotRejected as error:
            self._rejected = True
            self._refused(error)
            raise
        except CredentialRejected as error:
            # Of the URL, not of our token: the next question brings another.
            self._refused(error)
            raise Unavailable("the snapshot", str(error)) from None
        self._rejected = False
        self._taken()
        return staged

    def _refused(self, error: SnapshotRejected | CredentialRejected) -> None:
        if isinstance(error, SnapshotRejected):
            self.problems.add(Problem("snapshot_rejected", str(error), rule=error.rule))
        else:
            self.problems.add(Problem("snapshot_expired", str(error)))

    def _taken(self) -> None:
        self.problems.clear_kinds("snapshot_rejected", "snapshot_expired")

    async def first(self, url: str | None) -> StagedSnapshot:
        """The tree to start from: from `url` while it is good, else from what the session API offers.

        Raises `HydrationImpossible`, `CredentialRejected` or `RootUnusable` when there is none to be had.
        """
        staged = await obtain(
            url,
            renew=self._offer if self.api is not None else None,
            on_refusal=self._refused,
            disk=self.disk,
            http=self.http,
            limits=self.limits,
            expected_project=self.project_id,
            progress=self.progress,
        )
        self._taken()
        return self._with_build_time(staged)

    async def _offer(self, reason: str) -> str | None:
        """A fresh URL for an agent that has no tree; `reason` as `snapshot.download.obtain` gives it."""
        assert self.api is not None
        answer = await self.api.sync(None, 0, reason, None)
        if not isinstance(answer, SnapshotOffer):
            return None
        self._hear(answer)
        return answer.snapshot_url
