"""The token at the link: seen when it changes, wherever it came from, renewed in time, asked for once by many.

Renewed at a share of its life (`agent.tokens`), or at once when the server says that it expired.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from agent.errors import AgentError, CredentialRejected, SessionGone, Unavailable
from agent.linksettings import LinkSettings
from agent.tokens import Token, TokenSource, spread


class Holder(Protocol):
    """Who uses the token: the link."""

    @property
    def wants_token(self) -> bool:
        """Whether it waits for a token, its last one having expired."""

    @property
    def joined(self) -> bool:
        """Whether the token in force was accepted."""

    def token_changed(self) -> None:
        """There is another token in force."""

    def token_refused(self, reason: str) -> None:
        """It waits for a token, and none is to be had."""


class TokenKeeper:
    """Keeps a fresh token for `holder`.

    `wall`: the clock that tokens are dated by. `backoff`: seconds to wait after so many failures in a row.
    """

    def __init__(
        self,
        tokens: TokenSource,
        settings: LinkSettings,
        holder: Holder,
        wall: Callable[[], float],
        backoff: Callable[[int], float],
    ) -> None:
        self._tokens = tokens
        self._settings = settings
        self._holder = holder
        self._wall = wall
        self._renewing = asyncio.Lock()
        self._wanted_now = asyncio.Event()
        self._seen: Token | None = None
        self._seen_at = wall()
        self._spread = spread()
        self._backoff = backoff
        self.sent: Token | None = None
        """The token that the server was last given."""
        self.problem: str | None = None
        """Why there is none that is accepted, when there is none."""

    def current(self) -> Token | None:
        """The token in force, for a report: nothing is noticed by it."""
        return self._tokens.current()

    def look(self) -> Token | None:
        """The token in force; a change of it is noticed here, wherever it came from."""
        token = self._tokens.current()
        if token is not self._seen:
            self._seen = token
            self._seen_at = self._wall()
            self._holder.token_changed()
        return token

    def renew_now(self) -> None:
        """The server says that it expired."""
        self._wanted_now.set()

    async def renew(self, stale: Token | None) -> Token:
        """A newer token than `stale` if there is one; of several callers one asks.

        Raises `CredentialRejected`, `SessionGone` or `Unavailable`.
        """
        async with self._renewing:
            held = self.look()
            if held is not None and held is not stale:
                return held
            try:
                async with asyncio.timeout(self._settings.renew_within):
                    token = await self._tokens.renew_token()
            except TimeoutError:
                raise Unavailable("the issuer of tokens", "no answer in time") from None
            self.look()
            return token

    async def run(self) -> None:
        """Renew at a share of the token's life, or at once when the server says that it expired, until cancelled."""
        failures = 0
        now = asyncio.get_running_loop().time
        earliest = 0.0
        while True:
            due_in = max(self._refresh_in(), earliest - now())
            if due_in > 0 and not self._wanted_now.is_set():
                with contextlib.suppress(TimeoutError):
                    # At most half a minute at a time: the due time is on the wall clock, which may be set.
                    async with asyncio.timeout(min(due_in, 30.0)):
                        await self._wanted_now.wait()
                continue
            stale = self.sent if self._holder.wants_token else self.look()
            try:
                renewed = await self.renew(stale) is not stale
                if not renewed and self._holder.wants_token:
                    raise CredentialRejected("the token has expired and no newer one is to be had")
            except (CredentialRejected, SessionGone) as error:
                self._wanted_now.clear()
                self.problem = str(error)
                if self._holder.wants_token:
                    self._holder.token_refused(str(error))
                earliest = now() + self._settings.refused_retry
            except AgentError as error:
                failures += 1
                await asyncio.sleep(max(self._backoff(failures), asked_wait(error)))
            else:
                self._wanted_now.clear()
                if self._holder.joined:
                    self.problem = None
                failures = 0
                earliest = now() + self._settings.renew_pause

    def _refresh_in(self) -> float:
        token = self.look()
        at = token.refresh_at(self._seen_at, self._spread) if token else None
        return 3600.0 if at is None else at - self._wall()


def asked_wait(error: AgentError) -> float:
    """The least number of seconds that `error`'s peer asked to wait; 0 when it did not."""
    return (error.retry_after or 0.0) if isinstance(error, Unavailable) else 0.0
