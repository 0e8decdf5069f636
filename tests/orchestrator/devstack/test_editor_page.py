"""The editor page's files on their way to a browser: compressed once, told apart by caches, not sent twice."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from orchestrator_stub.devstack.editor_page import EditorPage, compress, takes_gzip

SCRIPT = b"export const answer = 42\n" * 200


@pytest.fixture
async def browser(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Asks for a page as a build leaves it."""
    built = tmp_path / "page"
    (built / "assets").mkdir(parents=True)
    (built / "index.html").write_text(f"<!doctype html><div id=root></div>{' ' * 500}")
    (built / "worker.js").write_bytes(SCRIPT)
    (built / "assets" / "index-1.js").write_bytes(SCRIPT)
    (built / "assets" / "dot.png").write_bytes(bytes(200))
    (built / "assets" / "tiny.css").write_text("a{}")
    compress(built)
    page = EditorPage(built, tmp_path / "no-sources")
    page.publish({"project_id": "x"})
    await page.build(print)
    transport = httpx.ASGITransport(Starlette(routes=page.routes()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:1") as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/worker.js", "/assets/index-1.js"])
async def test_what_is_text_comes_compressed_to_who_takes_it(browser: httpx.AsyncClient, path: str) -> None:
    plain = await browser.get(path, headers={"accept-encoding": "identity"})
    packed = await browser.get(path, headers={"accept-encoding": "gzip, deflate, br"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content
    assert int(packed.headers["content-length"]) < int(plain.headers["content-length"])
    for answer in (plain, packed):
        assert answer.headers["vary"] == "Accept-Encoding"
        assert answer.headers["content-type"] == plain.headers["content-type"]
        assert answer.headers["cache-control"] == plain.headers["cache-control"]
    assert plain.headers["etag"] != packed.headers["etag"], "a cache may not give one for the other"
    again = await browser.get(
        path, headers={"accept-encoding": "gzip", "if-none-match": f'"other", {packed.headers["etag"]}'}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == packed.headers["etag"]
    assert again.headers["vary"] == "Accept-Encoding"
    other = await browser.get(
        path, headers={"accept-encoding": "gzip", "if-none-match": plain.headers["etag"]}
    )
    assert other.status_code == 200


@pytest.mark.parametrize("name", ["dot.png", "tiny.css"])
async def test_what_gzip_makes_no_smaller_comes_as_it_is(browser: httpx.AsyncClient, name: str) -> None:
    answer = await browser.get(f"/assets/{name}", headers={"accept-encoding": "gzip"})
    assert answer.status_code == 200
    assert not {"content-encoding", "vary"} & set(answer.headers)


async def test_a_page_of_an_older_build_comes_as_it_is(browser: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path / "page" / "worker.js.gz").unlink()
    answer = await browser.get("/worker.js", headers={"accept-encoding": "gzip"})
    assert (answer.content, answer.headers.get("content-encoding")) == (SCRIPT, None)


@pytest.mark.parametrize(
    ("accepted", "takes"),
    [
        ("gzip", True), ("br, GZIP;q=0.5", True), ("*", True), ("", False), ("br", False), ("identity", False),
        ("gzip;q=0", False), ("gzip; q=0.000", False), ("gzip;q=0, *", False), ("*;q=0", False), ("gzip;q=0.001", True),
    ],
)  # fmt: skip
def test_who_takes_gzip(accepted: str, takes: bool) -> None:
    assert takes_gzip(accepted) is takes


def test_the_same_page_compressed_twice_is_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.js").write_bytes(SCRIPT)
        compress(tmp_path / name)
        found.append((tmp_path / name / "a.js.gz").read_bytes())
    assert found[0] == found[1]
    assert gzip.decompress(found[0]) == SCRIPT
