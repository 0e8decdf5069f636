"""Reads the body of an upload into a file: raw bytes, or a multipart form as browsers and storage3 send it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from orchestrator_stub.local_supabase.storage.errors import StorageError, bad_type, too_large

FORM = "multipart/form-data"
DEFAULT_TYPE = "application/octet-stream"

FIELD_BYTES = 1024 * 1024
"""Of all fields of a form beside its file, together: what the original's form parser takes for one of them."""


@dataclass(slots=True)
class Incoming:
    """What came: how it is to be served, and what of it is in the file."""

    kind: str = DEFAULT_TYPE
    cache_control: str = "no-cache"
    metadata: dict[str, Any] | None = None
    """The client's own."""
    md5: str = ""
    size: int = 0


def refuse_type(kind: str | None, types: Sequence[str]) -> None:
    """Raise `StorageError` when `types` (none: all) do not have `kind`, which a form says only in its body."""
    kind = (kind or DEFAULT_TYPE).partition(";")[0].strip().lower()
    if kind == FORM or not types:
        return
    family = kind.partition("/")[0]
    if not any(each.partition(";")[0].strip().lower() in (kind, f"{family}/*", "*/*") for each in types):
        raise bad_type(kind)


async def receive(request: Request, part: Path, limit: int, types: Sequence[str]) -> Incoming:
    """The body into `part`, at most `limit` bytes. Raises `StorageError`."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    declared = request.headers.get("content-length", "")
    if kind.decode("latin-1") != FORM and declared.isdecimal() and int(declared) > limit:
        raise too_large()
    with part.open("xb") as file:
        sink = _Sink(file, limit)
        if kind.decode("latin-1") == FORM:
            return await _form(request, sink, options.get(b"boundary", b""), types)
        await _read(request, sink.write)
    incoming = Incoming(
        kind=request.headers.get("content-type", DEFAULT_TYPE),
        cache_control=request.headers.get("cache-control", "no-cache"),
    )
    with suppress(binascii.Error):
        incoming.metadata = _metadata(base64.b64decode(request.headers.get("x-metadata", ""), validate=True))
    return sink.finish(incoming)


async def _read(request: Request, write: Any) -> None:
    try:
        async for chunk in request.stream():
            if chunk:
                await asyncio.to_thread(write, chunk)
    except ClientDisconnect:
        raise StorageError(400, "Aborted", "the client went away") from None


async def _form(request: Request, sink: _Sink, boundary: bytes, types: Sequence[str]) -> Incoming:
    form = _Form(sink, types)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        await _read(request, parser.write)
        parser.finalize()
    except MultipartParseError as error:
        raise StorageError(400, "InvalidRequest", f"the form cannot be read: {error}", "Error") from None
    if not form.has_file or not form.is_whole:
        raise StorageError(400, "InvalidRequest", "Unexpected empty file received", "empty_file")
    return sink.finish(form.incoming())


@dataclass(slots=True)
class _Sink:
    """The file, with its size and its MD5, which is its ETag."""

    file: BinaryIO
    limit: int
    size: int = 0
    digest: Any = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))

    def write(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.size > self.limit:
            raise too_large()
        self.digest.update(chunk)
        self.file.write(chunk)

    def finish(self, incoming: Incoming) -> Incoming:
        incoming.md5, incoming.size = self.digest.hexdigest(), self.size
        return incoming


class _Form:
    """Takes the parser's calls: the first part with a file name is the object, the fields say how it is kept."""

    def __init__(self, sink: _Sink, types: Sequence[str]) -> None:
        self._sink = sink
        self._types = types
        self._headers: dict[str, bytes] = {}
        self._header = [b"", b""]
        self._fields: dict[str, bytes] = {}
        self._bytes = 0
        self._name: str | None = None
        self._to_file = False
        self._kind = DEFAULT_TYPE
        self.has_file = False
        self.is_whole = False

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._add(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._add(1, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._part,
            "on_part_data": self._data,
            "on_end": self._end,
        }

    def incoming(self) -> Incoming:
        seconds = self._fields.get("cacheControl", b"").decode("utf-8", "replace")
        return Incoming(
            kind=self._kind,
            cache_control=f"max-age={seconds}" if seconds else "no-cache",
            metadata=_metadata(self._fields.get("metadata", b"")),
        )

    def _begin(self) -> None:
        self._headers, self._header = {}, [b"", b""]

    def _add(self, which: int, data: bytes) -> None:
        self._header[which] += data

    def _header_end(self) -> None:
        self._headers[self._header[0].decode("latin-1").lower()] = self._header[1]
        self._header = [b"", b""]

    def _part(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition"))
        self._to_file = b"filename" in options and not self.has_file
        self._name = None
        if self._to_file:
            self.has_file = True
            self._kind = self._headers.get("content-type", b"").decode("latin-1") or DEFAULT_TYPE
            refuse_type(self._kind, self._types)
        elif b"filename" not in options:
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
            self._fields[self._name] = b""

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._to_file:
            self._sink.write(data[start:end])
        elif self._name is not None:
            self._bytes += end - start
            if self._bytes > FIELD_BYTES:
                raise too_large()
            self._fields[self._name] += data[start:end]

    def _end(self) -> None:
        self.is_whole = True


def _metadata(raw: bytes) -> dict[str, Any] | None:
    """The client's own metadata; what cannot be read is none, as with the original."""
    with suppress(orjson.JSONDecodeError):
        found = orjson.loads(raw)
        if isinstance(found, dict):
            return found
    return None
