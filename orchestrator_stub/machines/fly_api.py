"""The Fly Machines API over HTTP: its calls, its rate limits, what its errors mean, and when to ask again.

    400 404 422           the request is wrong, the app or machine is not there          MachineRefused, or None
    401 403               the token is not good                                          MachineRefused
    408                   a wait that is not over                                        False
    409                   a name that is taken, a lease of another holder                Conflict
    412, 422 "insufficient …"     no room on the hosts of the region now                 MachineUnavailable
    429 5xx, no reply     asked again, with full jitter and at least `Retry-After`, then MachineUnavailable

Every call may be repeated: creation because a name is unique in its app, the others by what they mean. Limits are per
action and per app (creating, listing) or machine (the rest), about one a second with a burst of three; reading a
machine five a second. A bucket for each keeps us below them, so that a 429 is the exception.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx
import tenacity

from orchestrator_stub.machines.driver import MachineError, MachineRefused, MachineUnavailable

TIMEOUT: Final = httpx.Timeout(10.0, read=75.0)
"""Seconds. Above the longest `wait` the API takes, 60 s."""

ATTEMPTS: Final = 5
"""Tries of one call; with the waits between them about 15 s, well inside one claim on a session."""

RETRIED: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
NO_ROOM: Final = ("insufficient", "no capacity", "could not reserve", "not enough")
"""What the API says, among other words, when a host or a region is full."""

LONG_REST: Final = 5.0
"""Seconds. Where an app asks for more, its creations are given up, so that they keep no other app from its turn."""

MAX_BUCKETS: Final = 10_000
"""Buckets kept; a full bucket is the same as none, so the oldest can be forgotten."""


class Conflict(MachineError):
    """The API says 409: the name is taken, or another holder has leased the machine."""


class NotThere(MachineError):
    """The API says 404: no such machine, or no such app."""


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_second` on average, up to `burst` at once."""

    per_second: float = 1.0
    burst: int = 3


READS: Final = Rate(5.0, 5)
WRITES: Final = Rate(1.0, 3)


class Buckets:
    """Token buckets by (action, app or machine). `clock` in seconds, monotonic; `sleep` waits that long."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._free_at: dict[tuple[str, str], float] = {}
        self._rests: dict[tuple[str, str], float] = {}

    async def take(self, action: str, of: str, rate: Rate) -> None:
        """Wait for one's turn. Turns are given in the order of asking.

        Kept as one number, the moment at which the bucket is full again (the generic cell rate algorithm): a turn
        moves it on by `1/per_second`, and may be taken once it is no more than a burst ahead.
        """
        step = 1.0 / rate.per_second
        now = self._clock()
        full = max(self._free_at.pop((action, of), now), now) + step
        self._free_at[action, of] = full
        if len(self._free_at) > MAX_BUCKETS:
            del self._free_at[next(iter(self._free_at))]
        wait = full - now - rate.burst * step
        if wait > 0:
            await self._sleep(wait)

    def rest(self, action: str, of: str, seconds: float) -> None:
        """Note that the platform wants none of an action for so many seconds."""
        if seconds > 0:
            self._rests[action, of] = max(self._rests.get((action, of), 0.0), self._clock() + seconds)
        if len(self._rests) > MAX_BUCKETS:
            del self._rests[next(iter(self._rests))]

    def resting(self, action: str, of: str) -> float:
        """For how many more seconds it wants none."""
        left = self._rests.get((action, of), 0.0) - self._clock()
        if left <= 0:
            self._rests.pop((action, of), None)
        return max(left, 0.0)


class _Again(Exception):
    """One try failed in a way that may pass. `retry_after` in seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(reason)


class _NotYet(Exception):
    """The state that was waited for did not come within the time that was given."""


class _Wait(tenacity.wait.wait_base):
    """Full jitter, and at least what was asked for."""

    def __init__(self) -> None:
        self._jitter = tenacity.wait_random_exponential(multiplier=0.5, max=8)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        asked = error.retry_after if isinstance(error, _Again) else None
        return max(self._jitter(retry_state), asked or 0.0)


class FlyApi:
    """The calls on one app. `http` has no base URL; `token` goes into the header of each call and nowhere else.

    `writes`: the limit of every action that changes something; Fly raises it for an organization on request.
    """

    def __init__(
        self,
        base_url: str,
        app: str,
        token: str,
        http: httpx.AsyncClient,
        *,
        buckets: Buckets | None = None,
        writes: Rate = WRITES,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._machines = f"{base_url.rstrip('/')}/apps/{app}/machines"
        self._app = app
        self._headers = {"Authorization": f"Bearer {token}"}
        self._http = http
        self._buckets = buckets or Buckets(sleep=sleep)
        self._writes = writes
        self._sleep = sleep

    async def create(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Make a machine. Raises `Conflict` when one of that name is there, `MachineError`."""
        return _machine(await self._call("create", "POST", "", of=self._app, json=request))

    async def list(self) -> list[dict[str, Any]]:
        """The app's machines, without their configuration."""
        # In full each has its configuration and its events: ten times as much to read, before anything else can run.
        answer = await self._call("list", "GET", "", of=self._app, rate=READS, params={"summary": "true"})
        if not isinstance(answer, list):
            raise MachineUnavailable("the Machines API answered a listing without a list")
        return [_machine(item) for item in answer]

    async def get(self, machine_id: str) -> dict[str, Any] | None:
        """One machine, or None."""
        try:
            return _machine(await self._call("get", "GET", f"/{machine_id}", of=machine_id, rate=READS))
        except NotThere:
            return None

    async def start(self, machine_id: str) -> None:
        """Start a machine that is stopped or suspended."""
        await self._call("start", "POST", f"/{machine_id}/start", of=machine_id)

    async def stop(self, machine_id: str, *, signal: str = "SIGTERM", timeout: float = 5) -> None:
        """Stop it: `signal`, and SIGKILL after `timeout` seconds."""
        body = {"signal": signal, "timeout": duration(timeout)}
        await self._call("stop", "POST", f"/{machine_id}/stop", of=machine_id, json=body)

    async def suspend(self, machine_id: str) -> None:
        """Put it to sleep with its memory; the next start goes on from there."""
        await self._call("suspend", "POST", f"/{machine_id}/suspend", of=machine_id)

    async def wait(self, machine_id: str, state: str, *, timeout: int = 30) -> bool:
        """Whether the machine came to `state` within `timeout` seconds (1 to 60)."""
        query = {"state": state, "timeout": str(max(1, min(timeout, 60)))}
        try:
            await self._call("wait", "GET", f"/{machine_id}/wait", of=machine_id, params=query)
        except _NotYet:
            return False
        return True

    async def destroy(self, machine_id: str, *, nonce: str | None = None) -> None:
        """Kill and remove it; one that is gone is no error."""
        headers = {"fly-machine-lease-nonce": nonce} if nonce else {}
        try:
            await self._call(
                "destroy",
                "DELETE",
                f"/{machine_id}",
                of=machine_id,
                params={"force": "true"},
                headers=headers,
            )
        except NotThere:
            return

    async def lease(self, machine_id: str, *, ttl: int, nonce: str | None = None) -> str:
        """Hold the machine against changes by others for `ttl` seconds; gives the nonce. `nonce` renews."""
        headers = {"fly-machine-lease-nonce": nonce} if nonce else {}
        answer = await self._call(
            "lease", "POST", f"/{machine_id}/lease", of=machine_id, json={"ttl": ttl}, headers=headers
        )
        data = answer.get("data", answer) if isinstance(answer, dict) else {}
        if not isinstance(data.get("nonce"), str):
            raise MachineUnavailable("the Machines API answered a lease without a nonce")
        return str(data["nonce"])

    async def release(self, machine_id: str, nonce: str) -> None:
        """Give the lease back; one that ran out is no error."""
        headers = {"fly-machine-lease-nonce": nonce}
        try:
            await self._call("release", "DELETE", f"/{machine_id}/lease", of=machine_id, headers=headers)
        except NotThere:
            return

    async def set_metadata(self, machine_id: str, key: str, value: str) -> None:
        """Note something on the machine without restarting it."""
        await self._call(
            "metadata", "POST", f"/{machine_id}/metadata/{key}", of=machine_id, json={"value": value}
        )

    async def _call(
        self,
        action: str,
        method: str,
        path: str,
        *,
        of: str,
        rate: Rate | None = None,
        headers: Mapping[str, str] | None = None,
        **content: Any,
    ) -> Any:
        """One call, tried again while that can help. Raises `Conflict`, `NotThere`, `MachineError`."""
        if (rest := self._buckets.resting(action, of)) > LONG_REST:
            raise MachineUnavailable(f"cannot {action} on Fly: it asked for a rest of {rest:.0f} s", rest)
        try:
            async for attempt in tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(ATTEMPTS),
                wait=_Wait(),
                retry=tenacity.retry_if_exception_type(_Again),
                sleep=self._sleep,
                reraise=True,
            ):
                with attempt:
                    await self._buckets.take(action, of, rate or self._writes)
                    try:
                        return await self._once(action, method, path, headers, content)
                    except _Again as error:
                        self._buckets.rest(action, of, error.retry_after or 0.0)
                        raise
        except _Again as error:
            raise MachineUnavailable(f"cannot {action} on Fly: {error}", error.retry_after) from None
        raise AssertionError("unreachable: the loop returns or raises")

    async def _once(
        self,
        action: str,
        method: str,
        path: str,
        headers: Mapping[str, str] | None,
        content: Mapping[str, Any],
    ) -> Any:
        try:
            response = await self._http.request(
                method,
                self._machines + path,
                headers={**self._headers, **(headers or {})},
                timeout=TIMEOUT,
                follow_redirects=False,
                **content,
            )
        except httpx.HTTPError as error:
            raise _Again(type(error).__name__) from None
        if response.is_success:
            return _json(response)
        status, said = response.status_code, _said(response)
        if status == 408 and action == "wait":
            raise _NotYet
        if status in RETRIED:
            raise _Again(f"HTTP {status} {said}".strip(), _seconds(response.headers.get("retry-after")))
        if status in (412, 422) and any(word in said.lower() for word in NO_ROOM):
            raise MachineUnavailable(f"cannot {action} on Fly: {said}")
        if status in (409, 412):
            raise Conflict(f"cannot {action} on Fly: {said or 'conflict'}")
        if status == 404:
            raise NotThere(f"cannot {action} on Fly: {said or 'not found'}")
        raise MachineRefused(f"cannot {action} on Fly: HTTP {status} {said}".strip())


def duration(seconds: float) -> str:
    """A length of time as the API reads it: with its unit, for a bare number would be nanoseconds."""
    return f"{seconds:g}s"


def _machine(answer: Any) -> dict[str, Any]:
    if not isinstance(answer, dict) or not isinstance(answer.get("id"), str):
        raise MachineUnavailable("the Machines API answered without a machine's id")
    return answer


def _json(response: httpx.Response) -> Any:
    try:
        return response.json() if response.content else None
    except ValueError:
        raise _Again("the answer is not JSON") from None


def _said(response: httpx.Response) -> str:
    try:
        answer = response.json()
    except ValueError:
        return ""
    return str(answer.get("error", ""))[:300] if isinstance(answer, dict) else ""


def _seconds(value: str | None) -> float | None:
    try:
        return min(max(float(value), 0.0), 60.0) if value is not None else None
    except ValueError:
        return None
