"""PURE: reads and writes the server's half of the Phoenix channel protocol, as Supabase Realtime speaks it.

    vsn 1.0.0   objects  {topic, event, payload, ref}          (the server sends exactly these four)
    vsn 2.0.0   arrays   [join_ref, ref, topic, event, payload]
                binary   3 (client to server) and 4 (server to client) for broadcasts

Frames leave here as finished WebSocket frames: a broadcast to a thousand sockets is encoded once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import orjson

TEXT, BINARY = 0x81, 0x82
"""First byte of an unfragmented WebSocket frame (RFC 6455, 5.2)."""

USER_BROADCAST_PUSH, USER_BROADCAST = 3, 4


class Version(IntEnum):
    """The serializer a client asks for in `vsn`."""

    V1 = 1
    V2 = 2

    @classmethod
    def asked(cls, vsn: str) -> Version:
        """Phoenix takes `2.x` to the second serializer and everything else, or nothing, to the first."""
        return cls.V2 if vsn.startswith("2.") else cls.V1


class BadFrame(Exception):
    """A frame that is not of the protocol. The real server's socket process crashes on one and so closes."""


@dataclass(frozen=True, slots=True)
class Push:
    """What a client sent. `raw` is set for a binary broadcast: its payload's bytes, `payload` then being
    `{"event": …}`; `raw_json` says whether those bytes are JSON."""

    topic: str
    event: str
    payload: Any
    ref: str | None = None
    join_ref: str | None = None
    raw: bytes | None = None
    raw_json: bool = True


def websocket_frame(first: int, body: bytes) -> bytes:
    """`body` as one unmasked frame."""
    size = len(body)
    if size < 126:
        return bytes((first, size)) + body
    if size < 1 << 16:
        return bytes((first, 126)) + size.to_bytes(2) + body
    return bytes((first, 127)) + size.to_bytes(8) + body


def read_text(version: Version, text: str | bytes) -> Push:
    """One text frame of a client. Raises `BadFrame`."""
    try:
        data = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadFrame(f"not JSON: {error}") from None
    if version is Version.V1:
        if not isinstance(data, dict):
            raise BadFrame("a v1 frame is an object")
        parts = [data.get(k) for k in ("join_ref", "ref", "topic", "event", "payload")]
    else:
        if not isinstance(data, list) or len(data) != 5:
            raise BadFrame("a v2 frame is an array of five")
        parts = data
    join_ref, ref, topic, event, payload = parts
    if not isinstance(topic, str) or not isinstance(event, str):
        raise BadFrame("topic and event are strings")
    return Push(topic, event, payload, _ref(ref), _ref(join_ref))


def read_binary(version: Version, body: bytes) -> Push:
    """One binary frame of a client, which can only be a broadcast. Raises `BadFrame`."""
    if version is Version.V1:
        raise BadFrame("vsn 1 has no binary frames")
    if len(body) < 7 or body[0] != USER_BROADCAST_PUSH:
        raise BadFrame("not a broadcast push")
    sizes, encoding = body[1:6], body[6]
    fields, at = [], 7
    for size in sizes:
        fields.append(body[at : at + size])
        at += size
    if at > len(body):
        raise BadFrame("truncated")
    try:
        join_ref, ref, topic, event, _meta = (part.decode() for part in fields)
    except UnicodeDecodeError:
        raise BadFrame("not UTF-8") from None
    raw, is_json = body[at:], encoding == 1
    if is_json:
        try:
            orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise BadFrame("payload says JSON and is not") from None
    return Push(topic, "broadcast", {"event": event}, ref or None, join_ref or None, raw, is_json)


def message(
    version: Version, topic: str, event: str, payload: Any, *, ref: str | None, join_ref: str | None
) -> bytes:
    """Any frame but a database broadcast, ready for the wire."""
    whole = (
        {"topic": topic, "event": event, "payload": payload, "ref": ref}
        if version is Version.V1
        else [join_ref, ref, topic, event, payload]
    )
    return websocket_frame(TEXT, orjson.dumps(whole))


@dataclass(slots=True)
class Broadcast:
    """One message on its way to the subscribers of one topic; each form is encoded at most once.

    `payload` is the user's JSON, or raw bytes when `is_json` is false. `meta` is what the server adds (`id`,
    `replayed`). `as_text`: vsn 2 gets a text frame too, as it does for a text push of another client; `extra`
    then holds the rest of that push's payload.
    """

    topic: str
    event: str
    payload: bytes
    is_json: bool = True
    meta: dict[str, Any] | None = None
    as_text: bool = False
    extra: dict[str, Any] | None = None
    _encoded: dict[Version, bytes | None] = field(default_factory=dict)

    @property
    def id(self) -> str | None:
        return None if self.meta is None else self.meta.get("id")

    def encode(self, version: Version) -> bytes | None:
        """The finished frame, or None where this version cannot say it (raw bytes to vsn 1, a name over 255
        bytes in a binary header): the real server leaves that subscriber out as well."""
        if version not in self._encoded:
            self._encoded[version] = self._encode(version)
        return self._encoded[version]

    def _encode(self, version: Version) -> bytes | None:
        wire_topic = f"realtime:{self.topic}"
        if version is Version.V2 and not self.as_text:
            topic, event = wire_topic.encode(), self.event.encode()
            meta = b"" if self.meta is None else orjson.dumps(self.meta)
            if max(len(topic), len(event), len(meta)) > 255:
                return None
            head = bytes((USER_BROADCAST, len(topic), len(event), len(meta), int(self.is_json)))
            return websocket_frame(BINARY, b"".join((head, topic, event, meta, self.payload)))
        if not self.is_json:
            return None
        body: dict[str, Any] = {"type": "broadcast", "event": self.event} | (self.extra or {})
        body["payload"] = orjson.Fragment(self.payload)
        if self.meta is not None:
            body["meta"] = self.meta
        return message(version, wire_topic, "broadcast", body, ref=None, join_ref=None)


def _ref(value: object) -> str | None:
    """Refs are strings; old clients send numbers, and Phoenix echoes whatever came."""
    return None if value is None else str(value)
