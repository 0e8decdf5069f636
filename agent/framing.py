"""A client websocket that hands over each message in the very call that reads it from the network.

`websockets` does the handshake, the closing, the control frames and every rare form. Only the common case is cut
short: a whole, unfragmented, unmasked data frame goes to the receiver without the library's parser, queue and
wake-up, which cost four times what decoding its JSON does (`bench/link.py`). The library sees whole control frames
in between, so it stands at a frame's boundary whenever the short way is taken. The first frame of any other kind
ends the short way for good: the rest of the connection is the library's, and it fails it as it always would.
`tests/agent/test_framing.py` holds the two ways equal on arbitrary streams cut in arbitrary places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import CONNECTING, OPEN

WHOLE: Final = frozenset({0x81, 0x82})
"""First bytes of a text or binary frame that is a message by itself: FIN, no extension, the opcode."""

CONTROL: Final = frozenset({0x88, 0x89, 0x8A})
"""First bytes of a close, ping or pong; none is longer than 125 bytes."""

MAX_HEAD_BYTES: Final = 64 * 1024
"""An answer to the handshake whose head is longer is the library's to refuse."""

FRAGMENT: Final = frozenset({Opcode.TEXT, Opcode.BINARY, Opcode.CONT})


class DirectConnect(connect):
    """`websockets.connect` with a `DirectConnection`, and without redirects: what comes after the handshake is a
    credential, and it goes to the host of the settings or to nobody.
    """

    def __init__(self, uri: str, *, max_size: int, **kwargs: Any) -> None:
        made: Any = partial(DirectConnection, max_size=max_size)
        super().__init__(uri, create_connection=made, max_size=max_size, **kwargs)

    def process_redirect(self, exc: Exception) -> Exception | str:
        """A redirect is an answer like any other that is not 101."""
        return exc


class DirectConnection(ClientConnection):
    """One open connection. `recv()` is not to be used. `max_size`: as the protocol's, in bytes.

    Text arrives as its bytes, not checked for UTF-8: that is for whoever decodes it.
    """

    def __init__(self, *args: Any, max_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_size = max_size
        self._deliver: Callable[[bytes], None] | None = None
        self._ended: Callable[[], None] = _nobody
        self._early: list[bytes] = []
        self._head = b""
        self._rest = bytearray()
        """The beginning of a frame whose end has not come yet."""
        self._need = 0
        """How many bytes `_rest` must have before it is worth looking at again."""
        self._fragments: list[bytes] = []
        self._given_up = False

    def attach(self, deliver: Callable[[bytes], None], ended: Callable[[], None]) -> None:
        """Deliver messages from here on, those that came since the handshake first; tell the end once it shows."""
        self._deliver, self._ended = deliver, ended
        early, self._early = self._early, []
        for message in early:
            deliver(message)

    @property
    def end(self) -> tuple[Close | None, Close | None] | None:
        """None while the connection is open; else the close frames received and sent, None for what there was not."""
        if self.protocol.state in (CONNECTING, OPEN):
            return None
        return self.protocol.close_rcvd, self.protocol.close_sent

    # --- asyncio's protocol

    def data_received(self, data: bytes) -> None:
        """Bytes from the network, in whatever pieces."""
        at = 0
        while self._rest and at < len(data):
            # Only the frame that was cut is put together; the rest of the piece is read where it lies.
            missing = self._need - len(self._rest)
            self._rest += data[at : at + missing]
            at += missing
            if len(self._rest) >= self._need:
                whole, self._rest = bytes(self._rest), bytearray()
                self._split(whole, 0)
        if at < len(data):
            if self._given_up or self.protocol.state is not OPEN:
                self._open(data[at:])
            else:
                self._split(data, at)
        if self.end is not None:
            self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        super().connection_lost(exc)
        self._ended()

    def process_event(self, event: Any) -> None:
        """What the library parsed: control frames, and the parts of fragmented messages."""
        if not isinstance(event, Frame) or event.opcode not in FRAGMENT:
            super().process_event(event)
            return
        self._fragments.append(bytes(event.data))
        if event.fin:
            message, self._fragments = b"".join(self._fragments), []
            self._hand_over(message)

    def _open(self, data: bytes) -> None:
        """The handshake's answer is the library's; frames may follow it in the same piece, and are ours.

        Also the way for everything once the connection is closing, or was given up.
        """
        if self._given_up or self.protocol.state is not CONNECTING:
            super().data_received(data)
            return
        self._head += data
        blank = self._head.find(b"\r\n\r\n")
        if blank == -1:
            if len(self._head) > MAX_HEAD_BYTES:
                self._given_up = True
                super().data_received(self._head)
            return
        head, rest, self._head = self._head[: blank + 4], self._head[blank + 4 :], b""
        super().data_received(head)
        if self.protocol.state is OPEN:
            self._split(rest, 0)
        else:
            self._given_up = True
            super().data_received(rest)

    # --- the short way

    def _split(self, data: bytes, at: int) -> None:
        """Take whole frames off `data` from `at` on; keep what is left of the last."""
        size = len(data)
        deliver = self._deliver or self._hand_over
        most = self._max_size
        while size - at >= 2:
            first, length = data[at], data[at + 1]
            body = at + 2
            if length == 126:
                body = at + 4
                length = int.from_bytes(data[at + 2 : body])
            elif length == 127:
                body = at + 10
                length = int.from_bytes(data[at + 2 : body])
            elif length > 127:
                length = most + 1  # masked, which a server's frame must not be
            if length > most or (first not in WHOLE and (first not in CONTROL or length > 125)):
                # Fragments, which this server never sends, and whatever is wrong: all the library's from here on.
                self._given_up = True
                super().data_received(data[at:])
                return
            end = body + length
            if body > size or end > size:
                self._need = end - at if body <= size else body - at
                break
            if first in WHOLE:
                deliver(data[body:end])
            else:
                super().data_received(data[at:end])
                if self.protocol.state is not OPEN:
                    if end < size:
                        super().data_received(data[end:])
                    return
            at = end
        else:
            self._need = 2
        self._rest += data[at:]

    def _hand_over(self, message: bytes) -> None:
        if self._deliver is None:
            self._early.append(message)
        else:
            self._deliver(message)


def _nobody() -> None:
    """Nobody is attached yet."""
