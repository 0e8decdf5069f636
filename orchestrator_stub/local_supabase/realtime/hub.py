"""Keeps who joined which topic, and delivers what is sent there.

One `Connection` per socket, one `Channel` per joined topic. A public and a private topic of the same name are two
different addresses.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator_stub.local_supabase.access import Claims, Policies
from orchestrator_stub.local_supabase.realtime import frames
from orchestrator_stub.local_supabase.realtime.faults import Faults
from orchestrator_stub.local_supabase.realtime.frames import Broadcast, Push, Version
from orchestrator_stub.local_supabase.realtime.limits import Limits, Rate
from orchestrator_stub.local_supabase.realtime.presence import Metas, Presence
from orchestrator_stub.local_supabase.realtime.socket import FrameSocket

log = logging.getLogger("preview_orchestrator.realtime")

Address = tuple[str, bool]
"""A topic without the `realtime:` in front, and whether it is the private one of that name."""

SERVER_DISCONNECT = "Server requested disconnect"


@dataclass(slots=True, eq=False)
class Channel:
    """One joined topic of one connection."""

    connection: Connection
    topic: str
    """Without the `realtime:` in front."""
    join_ref: str | None
    private: bool
    token: str
    claims: Claims
    policies: Policies
    ack: bool
    self_broadcast: bool
    presence_key: str
    presence_enabled: bool
    replayed: frozenset[str] = frozenset()
    expiry: asyncio.TimerHandle | None = None

    @property
    def address(self) -> Address:
        return self.topic, self.private

    @property
    def hears_presence(self) -> bool:
        return not self.private or bool(self.policies.read_presence)

    def push(self, event: str, payload: Any) -> None:
        self.connection.send(f"realtime:{self.topic}", event, payload, ref=None, join_ref=self.join_ref)

    def system(self, status: str, message: str, extension: str = "system") -> None:
        body = {"extension": extension, "status": status, "message": message, "channel": self.topic}
        self.push("system", body)

    def ended(self, event: str) -> None:
        """`phx_close`, or `phx_error` after a crash: the ref is the join's."""
        wire = f"realtime:{self.topic}"
        self.connection.send(wire, event, {}, ref=self.join_ref, join_ref=self.join_ref)


class Connection:
    """One socket and the channels joined on it."""

    __slots__ = ("channels", "hub", "socket", "token", "version")

    def __init__(self, hub: Hub, socket: FrameSocket, version: Version, token: str) -> None:
        self.hub = hub
        self.socket = socket
        self.version = version
        self.token = token
        self.channels: dict[str, Channel] = {}
        socket.before_shutdown = self.farewell

    def write(self, frame: bytes) -> None:
        """One finished frame. A reader that lets too much pile up is cut off."""
        if self.hub.dark():
            return
        self.socket.write_frame(frame)
        if self.socket.backlog > self.hub.limits.backlog_bytes:
            log.warning("realtime.slow_reader")
            self.socket.abort()

    def send(self, topic: str, event: str, payload: Any, *, ref: str | None, join_ref: str | None) -> None:
        self.write(frames.message(self.version, topic, event, payload, ref=ref, join_ref=join_ref))

    def reply(self, push: Push, status: str, response: Any) -> None:
        payload = {"status": status, "response": response}
        self.send(push.topic, "phx_reply", payload, ref=push.ref, join_ref=push.join_ref)

    def farewell(self) -> None:
        """The server goes, as at a deploy of the real one: 1012 follows."""
        for channel in self.channels.values():
            channel.system("ok", SERVER_DISCONNECT)


class Hub:
    """The subscribers of every address. All of it synchronous: no socket waits for another's socket."""

    def __init__(self, limits: Limits, faults: Faults | None, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.faults = faults
        self._messages = Rate(limits.messages_per_second, clock)
        self._subscribers: dict[Address, dict[Channel, None]] = {}
        self._presences: dict[Address, Presence] = {}

    def dark(self) -> bool:
        """Whether a blackout is losing every frame."""
        return self.faults is not None and self.faults.blackout_until > asyncio.get_running_loop().time()

    # --- coming and going

    def add(self, channel: Channel) -> None:
        channel.connection.channels[f"realtime:{channel.topic}"] = channel
        self._subscribers.setdefault(channel.address, {})[channel] = None

    def holds(self, channel: Channel) -> bool:
        return channel in self._subscribers.get(channel.address, {})

    def remove(self, channel: Channel) -> None:
        """Unsubscribe, and tell the others who is gone."""
        channel.connection.channels.pop(f"realtime:{channel.topic}", None)
        if channel.expiry is not None:
            channel.expiry.cancel()
        subscribers = self._subscribers.get(channel.address)
        if subscribers is not None:
            subscribers.pop(channel, None)
            if not subscribers:
                del self._subscribers[channel.address]
        if channel.address in self._presences:
            self.untrack(channel)

    def shut(self, channel: Channel, text: str) -> None:
        """The server ends one channel: the reason, then phx_close. The socket stays open."""
        if self.holds(channel):
            self.remove(channel)
            channel.system("error", text)
            channel.ended("phx_close")

    # --- broadcasts

    def publish(self, message: Broadcast, private: bool, *, skip: Channel | None = None) -> None:
        """Deliver to every subscriber of the message's topic but `skip`."""
        outgoing = [(message, private)] if self.faults is None else self.faults.passing(message, private)
        for each, is_private in outgoing:
            self._deliver(each, is_private, skip)

    def _deliver(self, message: Broadcast, private: bool, skip: Channel | None) -> None:
        subscribers = self._subscribers.get((message.topic, private), {})
        if self._messages.exceeded(1 + len(subscribers)):
            for channel in tuple(subscribers):
                self.shut(channel, "Too many messages per second")
            return
        id_ = message.id
        for channel in subscribers:
            if channel is skip or (id_ is not None and id_ in channel.replayed):
                continue
            if channel.private and not channel.policies.read_broadcast:
                continue
            frame = message.encode(channel.connection.version)
            if frame is not None:
                channel.connection.write(frame)

    # --- presence

    def present(self, channel: Channel) -> None:
        """Send one channel who is tracked."""
        if channel.hears_presence:
            found = self._presences.get(channel.address)
            channel.push("presence_state", found.state() if found else {})

    def track(self, channel: Channel, payload: dict[str, Any]) -> None:
        """Track one channel under its key, and tell everybody."""
        presence = self._presences.setdefault(channel.address, Presence())
        diff = presence.track(channel, channel.presence_key, payload)
        if not channel.presence_enabled:
            # It never got the state that a join with presence brings.
            channel.presence_enabled = True
            self.present(channel)
        self._tell(channel.address, diff)

    def untrack(self, channel: Channel) -> None:
        presence = self._presences.get(channel.address)
        if presence is None:
            return
        self._tell(channel.address, presence.untrack(channel))
        if not presence:
            del self._presences[channel.address]

    def _tell(self, address: Address, diff: dict[str, Metas] | None) -> None:
        if diff is None:
            return
        for channel in self._subscribers.get(address, {}):
            if channel.hears_presence:
                channel.push("presence_diff", diff)
