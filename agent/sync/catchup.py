"""Ask the database what is missing, through the session API, and fetch the snapshot when that is the answer.

The question is `core.scheduler`'s, and what the answer means is `core.reconcile`'s. Here is the asking: the two ways to
a first tree (the URL of the environment, the session API's offer), whether a snapshot is to be trusted, and how long
to wait before the next question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from agent.core.errors import CredentialRejected, SnapshotRejected, TooLarge, Unavailable
from agent.core.messages import Changes, Current, SnapshotOffer
from agent.core.model import Change, Entry, Problem, RelPath, Remove, Tree
from agent.core.reconcile import Plan, brake
from agent.core.scheduler import Request
from agent.retry import Backoff
from agent.session_api import SessionApi
from agent.snapshot.download import Downloader, StagedSnapshot
from agent.snapshot.unpack import StagingFailed
from agent.telemetry.status import OwnedProblems, Problems

Answer = Current | Changes | StagedSnapshot
Patched = Callable[[tuple[Change, ...]], tuple[Change, ...]]

SNAPSHOT_REJECTED = "snapshot_rejected"
"""The reason that makes the orchestrator build the snapshot anew instead of offering the kept one."""

BACKOFF = Backoff(first=0.25, most=15.0)
"""Between two calls of an orchestrator that failed. At most half of the heartbeat's interval."""

REFUSED_RETRY = 60.0
"""Seconds at least between questions once the token is refused for good: somebody may still replace it."""

UNFIT_RETRY = 1.0
"""Seconds at least before what could not be used is asked for again: the same answer would come at once."""


class _UrlRefused(Unavailable):
    """A snapshot's URL was refused: it is over, another may be good."""


@dataclass(slots=True)
class CatchUp:
    """Asks one question at a time. The engine decides when; a question that failed is asked again after `wait`.

    Without `api` there is no catch-up, only snapshots: the one of the start, and those that `snapshot:ready` offers.
    """

    api: SessionApi | None
    snapshots: Downloader
    problems: Problems
    have: Callable[[], Mapping[RelPath, Entry]]
    """Gives the tree's entries as they are now: what is here already is not fetched."""
    offered: str | None = field(default=None, repr=False)
    """URL of the latest `snapshot:ready`: the only answer there is without a session API."""

    attempts: int = 0
    """Questions in a row that came to nothing."""

    # Trust in snapshots. An archive that breaks a rule, and a snapshot that would delete too much, are both answered by
    # asking for another build of it.
    _distrusted: bool = False
    """The next question asks for another build of the snapshot."""
    _doubted: frozenset[RelPath] | None = None
    """What a snapshot would delete that would delete too much; a second build that deletes no more is believed. Its
    other files may differ: saves go on meanwhile."""

    _build_seconds: float | None = None
    """How long the snapshot offered last took to build; its archive cannot say so itself."""
    _problems: OwnedProblems = field(init=False)

    def __post_init__(self) -> None:
        self._problems = self.problems.owned_by("sync.catchup")

    # --- asking

    @property
    def can_ask(self) -> bool:
        """Whether there is anybody, or anything, to get an answer from."""
        return self.api is not None or self.offered is not None

    async def ask(self, request: Request, patched: Patched = lambda changes: changes) -> Answer:
        """Ask one question, once. Raises an `AgentError` when there is no answer, or none that can be used.

        `patched` makes what came as splices whole, at once: the tree may have moved when the answer is taken.
        """
        if self.api is None:
            if self.offered is None:
                raise Unavailable("catch-up", "SESSION_API_URL is not set")
            return await self._fetch_offered(self.offered)
        anew = self._distrusted or request.rebuild
        reason = SNAPSHOT_REJECTED if anew else request.reason.value
        answer = await self.api.sync(
            request.epoch, request.revision, reason, sorted(request.paths) or None, accept=("splices",)
        )
        if isinstance(answer, Changes):
            return replace(answer, changes=patched(answer.changes))
        if isinstance(answer, Current):
            return answer
        staged = await self._fetch(self._url_of(answer))
        return replace(staged, ahead=answer.ahead)

    async def _fetch_offered(self, url: str) -> StagedSnapshot:
        """Fetch what `snapshot:ready` offered. The offer stands until it was taken, or cannot be."""
        try:
            staged = await self._fetch(url)
        except (SnapshotRejected, _UrlRefused):
            self._withdraw(url)
            raise
        self._withdraw(url)
        return staged

    def _withdraw(self, url: str) -> None:
        if self.offered == url:
            self.offered = None

    async def first(self, url: str | None) -> StagedSnapshot:
        """The tree to start from: from `url` while it is good, else from what the session API offers.

        Raises `HydrationImpossible`, `CredentialRejected` or `RootUnusable` when there is none to be had.
        """
        renew = self._offer if self.api is not None else None
        staged = await self.snapshots.obtain(url, renew=renew, on_refusal=self._refused)
        return self._taken(staged)

    async def _offer(self, reason: str) -> str | None:
        """A fresh URL for an agent that has no tree; `reason` as `Downloader.obtain` gives it."""
        assert self.api is not None
        answer = await self.api.sync(None, 0, reason, None)
        return self._url_of(answer) if isinstance(answer, SnapshotOffer) else None

    def _url_of(self, offer: SnapshotOffer) -> str:
        self._build_seconds = offer.manifest.build_seconds if offer.manifest is not None else None
        return offer.snapshot_url

    async def _fetch(self, url: str) -> StagedSnapshot:
        try:
            staged = await self.snapshots.fetch(url, self.have())
        except SnapshotRejected as error:
            self._distrusted = True
            self._refused(error)
            raise
        except CredentialRejected as error:
            # Of the URL, not of our token: the next question brings another.
            self._refused(error)
            raise _UrlRefused("the snapshot", str(error)) from None
        except StagingFailed:
            raise
        except Unavailable as error:
            self._problems.add(Problem("snapshot_unavailable", str(error), waiting=True))
            raise
        self._distrusted = False
        return self._taken(staged)

    def _taken(self, staged: StagedSnapshot) -> StagedSnapshot:
        self._problems.clear("snapshot_rejected", "snapshot_expired", "snapshot_unavailable")
        if self._build_seconds is None:
            return staged
        return replace(staged, manifest=replace(staged.manifest, build_seconds=self._build_seconds))

    def _refused(self, error: SnapshotRejected | CredentialRejected) -> None:
        if isinstance(error, SnapshotRejected):
            self._problems.add(Problem("snapshot_rejected", str(error), rule=error.rule))
        else:
            self._problems.add(Problem("snapshot_expired", str(error)))

    # --- trust

    @property
    def halted(self) -> bool:
        """Whether a snapshot is waited for that says the same as a doubted one, or something else."""
        return self._doubted is not None

    def doubts(self, tree: Tree, plan: Plan) -> Problem | None:
        """Return why a snapshot's plan must not be applied yet: it would delete too much, and no second build says so.

        The next question then asks for another build.
        """
        problem = brake(tree, plan)
        removed = frozenset(each.path for each in plan.operations if isinstance(each, Remove))
        if problem is None or (self._doubted is not None and removed <= self._doubted):
            return None
        self._doubted = removed
        self._distrusted = True
        self._problems.add(problem)
        return problem

    def succeeded(self) -> None:
        """Note that an answer is in the tree: nothing is doubted, and nothing has to be waited for."""
        self.attempts = 0
        self._doubted = None
        self._problems.clear("mass_delete", "snapshot_unavailable")

    # --- asking again

    def wait(self, error: Exception | None, *, least_question: bool = False) -> float:
        """Count a question that came to nothing. Returns the seconds until the next.

        Args:
            error: Why there was no answer; None for an answer that could not be used.
            least_question: It asked for everything, so that nothing smaller can be asked.
        """
        self.attempts += 1
        least = 0.0
        if error is None:
            least = UNFIT_RETRY
        elif isinstance(error, CredentialRejected) or (least_question and isinstance(error, TooLarge)):
            least = REFUSED_RETRY
        return max(least, BACKOFF.delay(self.attempts, error))

    def not_needed(self) -> None:
        """Note that what the last question was for has come in another way: it is not asked again."""
        self.attempts = 0
        self._problems.clear("snapshot_unavailable")
        if self.api is not None:
            self.api.forget_failure("sync")


def revision_of(answer: Answer) -> int | None:
    """Up to which revision an answer is good; None for a plain archive, which counts none."""
    if isinstance(answer, StagedSnapshot):
        return None if answer.plain else answer.manifest.revision
    return answer.revision
