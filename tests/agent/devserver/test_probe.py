"""What an inspection of a server makes of answers that are written to mislead, to cost, or to last."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from agent.devserver.probe import MOST_SEARCHED, Inspection, Outcome, inspect, module_scripts
from tests.agent.loops import STALL, longest_turn

Answer = tuple[bytes, str, dict[str, str]]
SCRIPT = b'<script type="module" src="/main.js"></script>'


@asynccontextmanager
async def serving(answers: Callable[[str], Answer]) -> AsyncIterator[tuple[str, list[str]]]:
    """A server of nothing but what `answers` says for a path; its base, and the heads of what it was asked."""
    heads: list[str] = []

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        heads.append(head)
        body, kind, more = answers(head.split()[1])
        lines = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **more}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body)
        writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heads


async def inspected(answers: Callable[[str], Answer]) -> Inspection:
    async with serving(answers) as (base, _), httpx.AsyncClient(trust_env=False) as http:
        return await inspect(http, base, timeout=10)


def page(html: bytes, module: bytes = b"export {}") -> Callable[[str], Answer]:
    return lambda path: (html, "text/html", {}) if path == "/" else (module, "text/javascript", {})


async def test_a_page_and_its_module_are_served() -> None:
    found = await inspected(page(SCRIPT))
    assert (found.outcome, found.entry) == (Outcome.SERVED, "/main.js")


async def test_a_page_that_no_parser_takes_is_read_up_to_there() -> None:
    found = await inspected(page(SCRIPT + b"<![<![<!["))
    assert (found.outcome, found.entry) == (Outcome.SERVED, "/main.js")
    assert module_scripts("<![ <script type=module src=/late.js>") == []


PAGES = {
    "angle": "<", "tag": "<a ", "end": "</", "comment": "<!--", "declaration": "<!", "cdata": "<![", "question": "<?",
    "script": "<script", "script tag": "<script>", "attributes": "<script a=", "quotes": "<script a='>", "null": "\0",
    "entity": "&#x", "real": "<script type=module src=/x.js>", "spaces": "<script" + " " * 3000,
}  # fmt: skip


@pytest.mark.parametrize("piece", PAGES.values(), ids=PAGES)
def test_a_page_of_anything_keeps_the_loop_for_a_moment(piece: str) -> None:
    text = piece * (MOST_SEARCHED // len(piece) + 1)

    async def search() -> None:
        module_scripts(text)

    assert longest_turn(search) < STALL / 5


def test_the_scripts_of_a_page_are_found_where_a_browser_finds_them() -> None:
    page = """<!doctype html><HTML><!-- <script type="module" src="/commented.js"></script> --><head>
    <script>if (1 < 2) { x = "<!--" }</script> --> <SCRIPT TYPE="module"
      SRC='/a.js' data-x="y"></SCRIPT><script type=module src=/b.js></script><script src="/classic.js"></script>
    <scripture type="module" src="/no.js"><script type="module">import "/inline.js"</script>"""
    assert module_scripts(page) == ["/a.js", "/b.js"]


@pytest.mark.parametrize(
    "source", ["http://[::1", "//x:99999999/y.js", "http://\x01/", "/\u2028.js", "http:///"]
)
async def test_an_address_that_is_none_is_the_pages_fault_and_no_silence(source: str) -> None:
    """A server that is silent is ended and started again; one that answers wrongly is left running."""
    found = await inspected(page(f'<script type="module" src="{source}"></script>'.encode()))
    assert found.outcome in (Outcome.BROKEN, Outcome.SERVED)


@pytest.mark.parametrize("address", ["localhost:99999999/", "[::1/", ":/", "localhost:0/"])
async def test_a_hot_update_socket_that_has_no_address_is_not_silence_either(address: str) -> None:
    client = f"const directSocketHost = '{address}'".encode()
    html = SCRIPT + b'<script type="module" src="/@vite/client"></script>'
    found = await inspected(page(html, client))
    assert found.outcome in (Outcome.BROKEN, Outcome.SOCKETLESS)


@pytest.mark.parametrize(
    "module",
    ["from'/" + "/deps/" * 300_000, ("import" + " " * 1000) * 2000, ("from'/" + "/deps/" * 40) * 8000],
    ids=["one string", "spaces", "many strings"],
)
async def test_a_module_written_to_be_searched_for_ever_is_searched_for_a_moment(module: str) -> None:
    """Where the search goes back on itself, the first of these takes hours; the loop would stand still."""
    async with asyncio.timeout(30):
        found = await inspected(page(SCRIPT, module.encode()))
    assert found.outcome is Outcome.SERVED


async def test_an_answer_that_would_unpack_to_far_more_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(512 * 2**20), compresslevel=1)

    def answers(path: str) -> Answer:
        return bomb, "text/html", {"Content-Encoding": "gzip"}

    async with serving(answers) as (base, heads), httpx.AsyncClient(trust_env=False) as http:
        tracemalloc.start()
        await inspect(http, base, timeout=10)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 16 * 2**20
    assert all("accept-encoding: identity" in head.lower() for head in heads)


async def test_an_outdated_dependency_of_the_entry_module_is_seen() -> None:
    """As Vite writes the import; the answer for the dependency itself is what counts."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).decode().split()[1]
        asked.append(path)
        status, kind, body = "200 OK", "text/html", SCRIPT
        if path == "/main.js":
            kind = "text/javascript"
            body = b'import __vite__cjsImport0_react from "/node_modules/.vite/deps/react.js?v=1a2b3c4d";'
        elif path != "/":
            status, body = "504 Outdated Optimize Dep", b""
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        writer.close()

    asked: list[str] = []
    async with await asyncio.start_server(one, "127.0.0.1", 0) as server, httpx.AsyncClient() as http:
        port = server.sockets[0].getsockname()[1]
        found = await inspect(http, f"http://127.0.0.1:{port}", timeout=10)
    assert found.outcome is Outcome.OUTDATED
    assert asked == ["/", "/main.js", "/node_modules/.vite/deps/react.js?v=1a2b3c4d"]
