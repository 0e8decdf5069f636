"""Holds a room's text as a CRDT: applies Yjs updates of browsers and merges what others saved.

The text's root is named by the room's generation. So the updates of a browser that outlived an earlier room of the file
find another root, and cannot double what is in this one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pycrdt import (
    Decoder,
    Doc,
    Snapshot,
    Text,
    YMessageType,
    create_sync_message,
    create_update_message,
    handle_sync_message,
    write_message,
    write_var_uint,
)

from orchestrator_stub.rooms.merge import Splice

MOST_TEXT_BYTES: Final = 1_000_000
"""Of a file in a room: what a person edits. Every save sends all of it."""
MOST_STATE_BYTES: Final = 8_000_000
"""Of the document with what was deleted; above it the room begins anew."""
MOST_CURSOR_BYTES: Final = 1_000
MOST_NAME: Final = 64
COLOR: Final = re.compile(r"#[0-9a-f]{6}(?:[0-9a-f]{2})?")
"""Nothing else goes into the styles of other people's pages."""


class BadMessage(Exception):
    """What a browser sent is no message of the protocol."""


@dataclass(slots=True)
class Handled:
    """What a message comes to: what its sender is told, what everybody else is, and whether the text changed."""

    reply: bytes | None = None
    others: bytes | None = None
    changed: bool = False


@dataclass(slots=True)
class Cursor:
    """What a browser says of its cursor. `state` None: it is gone."""

    client_id: int
    clock: int
    state: dict[str, Any] | None = field(default=None)

    def message(self) -> bytes:
        """As it travels."""
        text = json.dumps(self.state, separators=(",", ":")).encode()
        body = write_var_uint(1) + write_var_uint(self.client_id) + write_var_uint(self.clock)
        return bytes([YMessageType.AWARENESS]) + write_message(body + write_message(text))


class Document:
    """The text of one room, and beside it the text that was last saved, as the common ancestor of merges."""

    def __init__(self, generation: int, text: str) -> None:
        self.root = f"g{generation}"
        self._live: Doc[Text] = Doc()
        self._text = self._live.get(self.root, type=Text)
        self._text += text
        self._saved: Doc[Text] = Doc()
        self._saved.apply_update(self._live.get_update())
        self._base = self._saved.get(self.root, type=Text)
        self._news: list[bytes] = []
        self._changed = False
        self._subscriptions = (
            self._live.observe(lambda event: self._news.append(event.update)),
            self._text.observe(self._note),
        )

    def _note(self, _: object) -> None:
        self._changed = True

    @property
    def base(self) -> str:
        """As it was last loaded, saved or merged."""
        return str(self._base)

    @property
    def text(self) -> str:
        """As it is now."""
        return str(self._text)

    @property
    def text_bytes(self) -> int:
        """Its size in UTF-8."""
        return len(self._text)

    @property
    def state_bytes(self) -> int:
        """Of the document with what was deleted."""
        return len(self._live.get_update())

    def greeting(self) -> bytes:
        """What asks a browser for what it has."""
        return create_sync_message(self._live)

    def handle(self, message: bytes) -> Handled:
        """Take one message of the sync protocol. Raises `BadMessage`; the document is as before then."""
        if len(message) < 2 or message[0] != YMessageType.SYNC:
            raise BadMessage
        self._changed = False
        try:
            reply = handle_sync_message(message[1:], self._live)
        except BaseException as error:  # pyo3's PanicException is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            raise BadMessage from None
        return Handled(reply, self._take_news(), self._changed)

    def pending(self) -> tuple[str, bytes]:
        """The text to be saved, and what makes the ancestor of it once it is."""
        return self.text, self._live.get_update(self._saved.get_state())

    def snapshot(self) -> bytes:
        """Names the text that was last loaded, saved or merged, for browsers: theirs may have gone on."""
        return Snapshot.from_doc(self._saved).encode()

    def was_saved(self, update: bytes) -> None:
        """What `pending` gave is the file's version."""
        self._saved.apply_update(update)

    def merge(self, splices: Sequence[Splice]) -> bytes | None:
        """Merge what somebody else made of `base`; the message that tells browsers, None where nothing changed.

        Their change is made in the text that both began with, and joins what was typed since as another person's keys
        would: nothing is searched for, so nothing can fail to fit.
        """
        with self._saved.transaction():
            for at, size, come in reversed(splices):
                if size:
                    del self._base[at : at + size]
                if come:
                    self._base.insert(at, come)
        self._live.apply_update(self._saved.get_update(self._live.get_state()))
        return self._take_news()

    def _take_news(self) -> bytes | None:
        news, self._news = self._news, []
        if not news:
            return None
        assert len(news) == 1
        return create_update_message(news[0]) if news[0] != b"\x00\x00" else None


def cursor_of(message: bytes, user: Mapping[str, str]) -> Cursor:
    """Read what a browser says of its own cursor; whose it is, is ours to say. Raises `BadMessage`."""
    try:
        body = Decoder(message[1:]).read_message() or b""
        if len(body) > MOST_CURSOR_BYTES:
            raise BadMessage
        decoder = Decoder(body)
        if decoder.read_var_uint() != 1:
            raise BadMessage
        client_id, clock = decoder.read_var_uint(), decoder.read_var_uint()
        state = json.loads(decoder.read_var_string())
    except (IndexError, RuntimeError, ValueError, RecursionError):
        raise BadMessage from None
    if not (0 <= client_id < 2**53 and 0 <= clock < 2**53) or not isinstance(state, dict | None):
        raise BadMessage
    if state is not None:
        said = state.get("user")
        state = {
            "user": looks(said if isinstance(said, dict) else {}) | dict(user),
            "cursor": state.get("cursor"),
        }
    return Cursor(client_id, clock, state)


def looks(said: Mapping[str, object]) -> dict[str, str]:
    """What a person's cursor looks like for others: a name, and colours that are nothing else."""
    found = {}
    name = said.get("name")
    if isinstance(name, str):
        found["name"] = name[:MOST_NAME]
    for key in ("color", "colorLight"):
        color = said.get(key)
        if isinstance(color, str) and COLOR.fullmatch(color):
            found[key] = color
    return found
