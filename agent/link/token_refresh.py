"""Keeps the link's token fresh: notices a new one wherever it came from, and renews it in time, once for all callers.

A token is renewed at a share of its life (`agent.tokens`), or at once when the server says that it expired.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from agent.core.errors import AgentError, CredentialRejected, SessionGone
from agent.link.types import LinkSettings
from agent.retry import Backoff, within
from agent.tokens import Token, TokenSource, spread


class TokenHolder(Protocol):
    """The user of the token, which is the link."""

    @property
    def wants_token(self) -> bool:
        """Whether it waits for a token, because its last one expired."""

    @property
    def joined(self) -> bool:
        """Whether the server accepted the token in force."""

    def token_changed(self) -> None:
        """Note that another token is in force."""

    def token_refused(self, reason: str) -> None:
        """Note that there is no token, while it waits for one."""


class TokenRefresher:
    """Keeps a fresh token for the link."""

    def __init__(
        self,
        tokens: TokenSource,
        settings: LinkSettings,
        holder: TokenHolder,
        wall: Callable[[], float],
        backoff: Backoff,
    ) -> None:
        """Keep the token of `holder` fresh.

        Args:
            tokens: Has the token in force, and gets the next one.
            settings: How often and how long a renewal is tried.
            holder: Is notified of a change.
            wall: The clock that tokens are dated by, Unix seconds.
            backoff: How long to wait after failures in a row.
        """
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
        """Why no token is accepted; None: one is, as far as is known."""

    def current(self) -> Token | None:
        """Return the token in force, for a report: a change is not noticed here."""
        return self._tokens.current()

    @property
    def file_problem(self) -> str | None:
        """Why a token that somebody put there cannot be taken."""
        return self._tokens.problem

    def poll(self) -> Token | None:
        """Return the token in force, and tell the holder when it is another one than at the last poll."""
        token = self._tokens.current()
        if token is not self._seen:
            self._seen = token
            self._seen_at = self._wall()
            self._holder.token_changed()
        return token

    def renew_now(self) -> None:
        """Renew at once: the server says that the token expired."""
        self._wanted_now.set()

    async def renew(self, stale: Token | None) -> Token:
        """Get a newer token than `stale`; of several callers at once, one asks the issuer.

        Returns:
            The token in force, which is `stale` itself when the issuer has no newer one.

        Raises:
            CredentialRejected: The issuer refused the old token.
            SessionGone: The issuer does not know the session.
            Unavailable: There was no answer in time.
            MalformedMessage: The answer has no token in it.
        """
        async with self._renewing:
            held = self.poll()
            if held is not None and held is not stale:
                return held
            async with within(self._settings.renew_within, "the issuer of tokens", "no answer in time"):
                token = await self._tokens.renew_token()
            self.poll()
            return token

    async def run(self) -> None:
        """Renew the token whenever that is due, until cancelled."""
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
            stale = self.sent if self._holder.wants_token else self.poll()
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
                await asyncio.sleep(self._backoff.delay(failures, error))
            else:
                self._wanted_now.clear()
                if self._holder.joined:
                    self.problem = None
                failures = 0
                earliest = now() + self._settings.renew_pause

    def _refresh_in(self) -> float:
        token = self.poll()
        at = token.refresh_at(self._seen_at, self._spread) if token else None
        return 3600.0 if at is None else at - self._wall()
