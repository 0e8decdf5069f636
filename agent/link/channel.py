"""Speaks the Phoenix channel protocol. Pure: frames in, events and frames out, time passed in, no socket, no clock.

Phoenix channels as Supabase Realtime speaks them, `vsn=2.0.0`: text frames are arrays
`[join_ref, ref, topic, event, payload]`, database broadcasts are binary frames of type 4. One `PhoenixChannel` is one
topic on one socket. Its refs only grow, so that the reply to an earlier join is never taken for the reply to this one.

The state is in the link's `LinkStateMachine`, which `PhoenixChannel` moves; the events are in `link.types`. Nothing
that a server sends makes this module raise: what cannot be read is counted in `ignored`.

    channel = PhoenixChannel("realtime:project:…", machine)
    channel.opened(now, token)                   # the caller has a socket
    for text in channel.outgoing(): send(text)
    match channel.receive(frame, now): ...       # at most one event for a frame
    channel.tick(now)                            # at channel.next_deadline()

Time is in seconds of any monotonic clock.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Final

import orjson

from agent.link.types import (
    DEFAULTS,
    JOINED_STATES,
    WITH_SOCKET,
    Cause,
    ChannelEvent,
    Dropped,
    Joined,
    LinkStateMachine,
    Received,
    Refused,
    ReplicationReady,
    Timing,
    TokenExpired,
    classify_error,
)

BROADCAST_FRAME: Final = 4
"""The first byte of a binary frame that carries a broadcast from the server."""

BROADCAST_HEAD: Final = 5
"""Bytes of a broadcast frame before its fields: the type, the lengths of topic, event and meta, the encoding."""

LONGEST_REASON: Final = 500
"""Characters kept of why the server refused or ended something."""

JSON_ENCODING: Final = 1
"""The encoding of a broadcast whose payload is JSON, the only one that is read."""


class PhoenixChannel:
    """One topic on one socket, from the join to the end of the socket."""

    def __init__(
        self,
        topic: str,
        machine: LinkStateMachine,
        timing: Timing = DEFAULTS.timing,
        ignored: Counter[str] | None = None,
    ) -> None:
        """Make the channel of a socket that is about to open.

        Args:
            topic: The topic as it stands on the wire.
            machine: The link's state, moved by what the server says and by deadlines that pass.
            timing: The deadlines.
            ignored: Counts the frames that are ignored, by reason: unreadable, foreign, stale, unknown.
        """
        self.topic = topic
        self.machine = machine
        self.timing = timing
        self.ignored: Counter[str] = Counter() if ignored is None else ignored
        self._topic_bytes = topic.encode()

        # What is sent.
        self._out: list[str] = []
        self._ref = 0

        # The join.
        self._join_ref: str | None = None
        """The ref of the join in force; None: there is none, or its token has expired."""
        self._join_by: float | None = None
        self._joins_expired = 0
        """How many joins in a row were answered with an expired token."""
        self._replication_by: float | None = None
        self._replication_ready = False

        # The token.
        self._token = ""
        self._token_unsent = False
        self._probe_at: float | None = None

        # The heartbeat. `_heartbeat_at` None: there is no socket.
        self._heartbeat_at: float | None = None
        self._heartbeat_ref: str | None = None
        self._heartbeat_by: float | None = None

    # --- what the caller calls

    def opened(self, now: float, token: str) -> None:
        """Join the topic and start the heartbeat: the socket is open."""
        if self.machine.move(Cause.OPENED, "socket open"):
            self._heartbeat_at = now + self.timing.heartbeat_every
            self._join(now, token)

    def close(self) -> None:
        """Drop every deadline and every unsent frame: the socket is gone, and frames still read from it are stale."""
        self._forget_join()
        self._heartbeat_ref = self._heartbeat_at = self._heartbeat_by = None
        self._out.clear()

    def new_token(self, token: str, now: float) -> None:
        """Push `token` on the joined channel, or join with it when the last one expired."""
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
        """Leave the channel; what the server still says about it is stale."""
        if self._join_ref is not None:
            self._push("phx_leave", {})
            self._join_ref = None

    def outgoing(self) -> list[str]:
        """Return the frames to send now, in order. Each is returned once."""
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float | None:
        """Return when `tick` must be called at the latest; None without a socket."""
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

    # --- what is due

    def tick(self, now: float) -> Dropped | None:
        """Send the heartbeat or the token if that is due; give up the socket if an answer is overdue.

        A deadline that is noticed more than `late_tick` late is put off once by as much: our own loop stalled, and the
        answer may lie unread in the socket.
        """
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

    # --- what the server sends

    def receive(self, frame: bytes, now: float, at: float = 0.0) -> ChannelEvent | None:
        """Read one frame. Never raises.

        Args:
            frame: A text or a binary frame; the first byte shows which, since no JSON begins with a 4.
            now: The time, for deadlines that begin with this frame.
            at: The time as Unix seconds, for a broadcast to carry.

        Returns:
            What happened, or None when there is nothing for the caller to do.
        """
        if self._heartbeat_at is None:
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

    def _binary(self, frame: bytes, at: float) -> ChannelEvent | None:
        """Read a broadcast: type, u8 lengths of topic, event and meta, u8 encoding, then the four fields.

        The meta is not read.
        """
        if len(frame) < BROADCAST_HEAD or frame[4] != JSON_ENCODING:
            return self._ignore("unreadable")
        topic_end = BROADCAST_HEAD + frame[1]
        event_end = topic_end + frame[2]
        if frame[BROADCAST_HEAD:topic_end] != self._topic_bytes:
            return self._ignore("foreign")
        try:
            event = frame[topic_end:event_end].decode()
            payload = orjson.loads(frame[event_end + frame[3] :])
        except ValueError:
            return self._ignore("unreadable")
        return Received(event, payload, at) if type(payload) is dict else self._ignore("unreadable")

    def _on_channel(
        self, join_ref: object, ref: object, event: str, payload: dict[str, object], now: float, at: float
    ) -> ChannelEvent | None:
        match event:
            case "broadcast":
                name, body = payload.get("event"), payload.get("payload")
                if isinstance(name, str) and isinstance(body, dict):
                    return Received(name, body, at)
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

    def _join_reply(self, payload: dict[str, object], now: float) -> ChannelEvent | None:
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
        reason = _words(response.get("reason", "no reason given") if isinstance(response, dict) else response)
        kind = classify_error(reason)
        if kind == "expired":
            self._joins_expired += 1
            if self._joins_expired < 2:
                return self._expired(reason)
        if kind in ("expired", "credential"):
            return self._refuse(reason)
        return self._drop("rate_limited" if kind == "rate_limited" else "join_error", reason)

    def _push_reply(self, ref: object, payload: dict[str, object]) -> ChannelEvent | None:
        """Read the reply to a token that was pushed: only `unmatched topic` counts, the server lost the channel."""
        response = payload.get("response")
        if not isinstance(response, dict) or response.get("reason") != "unmatched topic":
            return None
        if self._join_ref is None or not _later(ref, self._join_ref):
            return self._ignore("stale")
        return self._drop("channel_gone", "the server does not know our channel any more")

    def _system(self, join_ref: object, payload: dict[str, object]) -> ChannelEvent | None:
        message = _words(payload.get("message", ""))
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
        match classify_error(message):
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
        self._forget_join()
        self.machine.move(Cause.EXPIRED, reason)
        return TokenExpired(reason)

    def _refuse(self, reason: str) -> Refused:
        self.close()
        self.machine.move(Cause.REFUSED, reason)
        return Refused(reason)

    def _drop(self, cause: str, reason: str) -> Dropped:
        reason = reason or f"{cause}, without a word from the server"
        self.close()
        self.machine.move(Cause.LOST, reason)
        return Dropped(cause, reason)

    def _forget_join(self) -> None:
        self._join_ref = None
        self._join_by = self._replication_by = self._probe_at = None
        self._token_unsent = False
        self._replication_ready = False

    def _ignore(self, reason: str) -> ChannelEvent | None:
        self.ignored[reason] += 1
        return None

    # --- what is sent

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
        self._forget_join()
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


def _words(said: object) -> str:
    """Return what should be text as text, cut; `reprlib`, because JSON may be nested too deep for `repr`."""
    return (said if isinstance(said, str) else reprlib.repr(said))[:LONGEST_REASON]


def _later(ref: object, join_ref: str) -> bool:
    """Return whether `ref` belongs to a push made after the join `join_ref`: our refs are numbers that only grow."""
    return isinstance(ref, str) and ref.isascii() and ref.isdigit() and int(ref[:20]) > int(join_ref)
