"""The channel protocol, PURE: frames in, meaning and frames out, time passed in. No socket, no clock, no task.

Phoenix channels as Supabase Realtime speaks them, `vsn=2.0.0`: text frames are arrays
`[join_ref, ref, topic, event, payload]`, database broadcasts are binary frames of type 4. One `Phoenix` follows one
topic on one socket. Its refs only grow, so a frame meant for an earlier join can never be taken for ours.

The state is in the link's `LinkStateMachine`, which `Phoenix` moves; `agent.meanings` is what comes out. Nothing a
server sends makes this module raise: what cannot be read is counted in `ignored`.

    channel = Phoenix("realtime:project:…", machine)
    channel.opened(now, token)                   # the shell has a socket
    for text in channel.outgoing(): send(text)
    match channel.receive(frame, now): ...       # at most one meaning per frame
    channel.tick(now)                            # at channel.next_deadline()

Time is in seconds of any monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

import orjson

from agent.linksettings import DEFAULTS, Timing
from agent.linkstate import JOINED_STATES, WITH_SOCKET, Cause, LinkStateMachine
from agent.meanings import (
    Broadcast,
    Dropped,
    Joined,
    Meaning,
    Refused,
    ReplicationReady,
    TokenExpired,
    judge,
)

BROADCAST_FRAME: Final = 4
"""The first byte of a binary frame that carries a broadcast from the server."""


NO_HEAD: Final = b"\x04\0\0\0\0\0"
"""What no broadcast begins with: its topic would be empty."""


class Phoenix:
    """One topic's protocol on one socket. See the module for how it is held.

    `ignored` counts the frames that meant nothing to us, by reason: unreadable, foreign, stale, unknown.
    """

    def __init__(
        self,
        topic: str,
        machine: LinkStateMachine,
        timing: Timing = DEFAULTS.timing,
        ignored: Counter[str] | None = None,
    ) -> None:
        self.topic = topic
        self.machine = machine
        self.timing = timing
        self.ignored: Counter[str] = Counter() if ignored is None else ignored
        self._topic_bytes = topic.encode()
        self._like: tuple[str, int, bytes] = ("", 0, NO_HEAD)
        self._out: list[str] = []
        self._ref = 0
        self._join_ref: str | None = None
        self._joins_expired = 0
        self._token = ""
        self._token_unsent = False
        self._probe_at: float | None = None
        self._join_by: float | None = None
        self._replication_by: float | None = None
        self._replication_ready = False
        self._heartbeat_ref: str | None = None
        self._heartbeat_at: float | None = None
        self._heartbeat_by: float | None = None

    # --- what the shell tells us

    def opened(self, now: float, token: str) -> None:
        """The socket is open: join, and start the heartbeat."""
        if self.machine.move(Cause.OPENED, "socket open"):
            self._heartbeat_at = now + self.timing.heartbeat_every
            self._join(now, token)

    def close(self) -> None:
        """The socket is gone: nothing is due on it any more, and what is still read from it means nothing."""
        self._leave_join()
        self._heartbeat_ref = self._heartbeat_at = self._heartbeat_by = None
        self._out.clear()

    def new_token(self, token: str, now: float) -> None:
        """Use `token` from now on: push it on the joined channel, or join with it when the last one expired."""
        if self.machine.state not in WITH_SOCKET:
            return
        if self._join_ref is None:
            self._join(now, token)
            return
        self._token = token
        if self._join_by is None:
            self._push_token(now)
        else:
            # A push before the join's reply may find no channel; it follows the reply.
            self._token_unsent = True

    def leave(self) -> None:
        """Say goodbye on the channel; whatever comes after it is stale."""
        if self._join_ref is not None:
            self._push("phx_leave", {})
            self._join_ref = None

    def outgoing(self) -> list[str]:
        """The frames to send now, in order; each is given out once."""
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float | None:
        """When `tick` must be called at the latest; None without a socket."""
        if self.machine.state not in WITH_SOCKET:
            return None
        deadlines = (
            self._heartbeat_at,
            self._heartbeat_by,
            self._join_by,
            self._replication_by,
            self._probe_at,
        )
        return min((at for at in deadlines if at is not None), default=None)

    # --- what time tells us

    def tick(self, now: float) -> Dropped | None:
        """Do what is due: send a heartbeat, give up on one, give up on a join."""
        if self.machine.state not in WITH_SOCKET:
            return None
        grace = self.timing.late_tick
        if self._heartbeat_by is not None and now >= self._heartbeat_by:
            if now - self._heartbeat_by > grace:
                self._heartbeat_by = now + grace
                return None
            return self._drop(
                "heartbeat_timeout", f"no heartbeat reply within {self.timing.heartbeat_within:g} s"
            )
        if self._join_by is not None and now >= self._join_by:
            if now - self._join_by > grace:
                self._join_by = now + grace
                return None
            return self._drop("join_timeout", f"no reply to the join within {self.timing.join_within:g} s")
        if self._replication_by is not None and now >= self._replication_by:
            self._replication_by = None
            self.machine.feed_ready()
        if self._probe_at is not None and now >= self._probe_at:
            self._push_token(now)
        if self._heartbeat_at is not None and now >= self._heartbeat_at:
            self._heartbeat(now)
        return None

    # --- what the server tells us

    def receive(self, frame: bytes, now: float, at: float = 0.0) -> Meaning | None:
        """Read one frame, text or binary. Never raises; None: nothing for the shell to do.

        Which of the two it is shows by its first byte: no JSON begins with a 4. `at`: Unix seconds, for a broadcast
        to carry.
        """
        if self._heartbeat_at is None:  # no socket
            return self._ignore("stale")
        if frame and frame[0] == BROADCAST_FRAME:
            return self._binary(frame, at)
        try:
            join_ref, ref, topic, event, payload = orjson.loads(frame)
        except (ValueError, TypeError):
            return self._ignore("unreadable")
        if not isinstance(payload, dict) or not isinstance(event, str):
            return self._ignore("unreadable")
        if topic == self.topic:
            return self._on_channel(join_ref, ref, event, payload, now, at)
        if topic == "phoenix" and event == "phx_reply":
            if ref is not None and ref == self._heartbeat_ref:
                self._heartbeat_ref = self._heartbeat_by = None
                return None
            return self._ignore("stale")
        return self._ignore("foreign")

    def _binary(self, frame: bytes, at: float) -> Meaning | None:
        """Type 4: u8 lengths of topic, event and meta, u8 encoding (1 JSON), then the four fields.

        The meta is nothing to us. Frames like the last one, up to their meta, are told by one comparison.
        """
        event, start, head = self._like
        if not frame.startswith(head):
            if len(frame) < 5:
                return self._ignore("unreadable")
            topic_end = 5 + frame[1]
            event_end = topic_end + frame[2]
            start = event_end + frame[3]
            if start > len(frame) or frame[4] != 1:
                return self._ignore("unreadable")
            if frame[5:topic_end] != self._topic_bytes:
                return self._ignore("foreign")
            try:
                event = frame[topic_end:event_end].decode()
            except ValueError:
                return self._ignore("unreadable")
            self._like = event, start, frame[:event_end]
        try:
            payload = orjson.loads(frame[start:])
        except ValueError:
            return self._ignore("unreadable")
        return Broadcast(event, payload, at) if type(payload) is dict else self._ignore("unreadable")

    def _on_channel(
        self, join_ref: object, ref: object, event: str, payload: dict[str, object], now: float, at: float
    ) -> Meaning | None:
        match event:
            case "broadcast":
                name, body = payload.get("event"), payload.get("payload")
                if isinstance(name, str) and isinstance(body, dict):
                    return Broadcast(name, body, at)
                return self._ignore("unreadable")
            case "phx_reply":
                if self._join_by is not None and ref == self._join_ref:
                    return self._join_reply(payload, now)
                return self._push_reply(ref, payload)
            case "system":
                return self._system(join_ref, payload)
            case "phx_close" | "phx_error":
                # The server names the join it closes; on a duplicate join that is the old one, not ours.
                named = join_ref if join_ref is not None else ref
                if self._join_ref is None or (named is not None and named != self._join_ref):
                    return self._ignore("stale")
                cause = "channel_closed" if event == "phx_close" else "channel_error"
                return self._drop(cause, f"the server sent {event}")
            case "presence_state" | "presence_diff" | "postgres_changes":
                return None
            case _:
                return self._ignore("unknown")

    def _join_reply(self, payload: dict[str, object], now: float) -> Meaning | None:
        self._join_by = None
        if payload.get("status") == "ok":
            self._joins_expired = 0
            self._probe_at = now + self.timing.probe_every
            if self._token_unsent:
                self._push_token(now)
            if not self._replication_ready:
                self._replication_by = now + self.timing.replication_within
            self.machine.joined("join accepted", feed_ready=self._replication_ready)
            return Joined()
        response = payload.get("response")
        reason = str(response.get("reason", "no reason given") if isinstance(response, dict) else response)
        kind = judge(reason)
        if kind == "expired":
            self._joins_expired += 1
            if self._joins_expired < 2:
                return self._expired(reason)
        if kind in ("expired", "credential"):
            return self._refuse(reason)
        return self._drop("rate_limited" if kind == "rate_limited" else "join_error", reason)

    def _push_reply(self, ref: object, payload: dict[str, object]) -> Meaning | None:
        """Success is silent on the pushes we make. The one error that counts: the server has no such channel."""
        response = payload.get("response")
        if not isinstance(response, dict) or response.get("reason") != "unmatched topic":
            return None
        if self._join_ref is None or not _later(ref, self._join_ref):
            return self._ignore("stale")
        return self._drop("channel_gone", "the server does not know our channel any more")

    def _system(self, join_ref: object, payload: dict[str, object]) -> Meaning | None:
        message = str(payload.get("message", ""))
        if self._join_ref is None or (join_ref is not None and join_ref != self._join_ref):
            return self._ignore("stale")
        if payload.get("extension") not in (None, "system"):
            return None
        if payload.get("status") == "ok":
            if message != "Replication connection established" or self._replication_ready:
                return None
            self._replication_ready = True
            if self.machine.state not in JOINED_STATES:
                return None
            prompt = self._replication_by is not None
            self._replication_by = None
            self.machine.behind("replication ready" if prompt else "replication ready late")
            self.machine.feed_ready()
            return ReplicationReady()
        match judge(message):
            case "expired":
                return self._expired(message)
            case "credential":
                return self._refuse(message)
            case "rate_limited":
                return self._drop("rate_limited", message)
            case _:
                return self._drop("system_error", message)

    # --- what ends a join, or the socket

    def _expired(self, reason: str) -> TokenExpired:
        self._leave_join()
        self.machine.move(Cause.EXPIRED, reason)
        return TokenExpired(reason)

    def _refuse(self, reason: str) -> Refused:
        self.close()
        self.machine.move(Cause.REFUSED, reason)
        return Refused(reason)

    def _drop(self, cause: str, reason: str) -> Dropped:
        self.close()
        self.machine.move(Cause.LOST, reason)
        return Dropped(cause, reason)

    def _leave_join(self) -> None:
        self._join_ref = None
        self._join_by = self._replication_by = self._probe_at = None
        self._token_unsent = False
        self._replication_ready = False

    def _ignore(self, reason: str) -> Meaning | None:
        self.ignored[reason] += 1
        return None

    # --- what we send

    def _next_ref(self) -> str:
        self._ref += 1
        return str(self._ref)

    def _send(
        self, join_ref: str | None, ref: str, topic: str, event: str, payload: Mapping[str, object]
    ) -> None:
        self._out.append(orjson.dumps([join_ref, ref, topic, event, payload]).decode())

    def _push(self, event: str, payload: Mapping[str, object]) -> None:
        self._send(self._join_ref, self._next_ref(), self.topic, event, payload)

    def _push_token(self, now: float) -> None:
        self._push("access_token", {"access_token": self._token})
        self._token_unsent = False
        self._probe_at = now + self.timing.probe_every

    def _join(self, now: float, token: str) -> None:
        self._leave_join()
        self._token = token
        self._join_ref = self._next_ref()
        self._join_by = now + self.timing.join_within
        config = {
            "broadcast": {"ack": False, "self": False, "replication_ready": True},
            "presence": {"key": "", "enabled": False},
            "postgres_changes": [],
            "private": True,
        }
        self._send(
            self._join_ref, self._join_ref, self.topic, "phx_join", {"config": config, "access_token": token}
        )

    def _heartbeat(self, now: float) -> None:
        self._heartbeat_at = now + self.timing.heartbeat_every
        if self._heartbeat_by is not None:
            return
        self._heartbeat_ref = self._next_ref()
        self._heartbeat_by = now + self.timing.heartbeat_within
        self._send(None, self._heartbeat_ref, "phoenix", "heartbeat", {})


def _later(ref: object, join_ref: str) -> bool:
    """Whether `ref` is of a push made after the join `join_ref`: our refs are numbers that only grow."""
    return isinstance(ref, str) and ref.isascii() and ref.isdigit() and int(ref[:20]) > int(join_ref)
