"""What Vite bundles ahead goes from one machine of a project to the next, and to nobody whom it does not fit."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.devserver.install import InstallOutcome
from agent.modules import archive, bundles
from agent.modules.tar import BUNDLE, LayerRefused
from agent.project.imports import MOST_FILE_BYTES, MOST_FILES, imported, imports
from agent.project.install_key import bundle_key
from tests.agent.devserver.installs import Bench, needs_npm, write
from tests.agent.modules.archives import Service, entry, link, listing, made_of, serving, tree
from tests.agent.modules.test_layers import World, ended
from tests.agent.processes import until

DEPS = {
    "node_modules/.vite/deps/_metadata.json": '{"browserHash": "1"}',
    "node_modules/.vite/deps/react.js": "export default 1",
    "node_modules/.vite/deps/react.js.map": "{}",
}
APP = {"src/main.js": 'import React from "react";', "vite.config.js": "export default {}"}


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as it:
        yield it


@pytest.fixture
async def world(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(bundles, "QUIET_SECONDS", 0.02)
    async with httpx.AsyncClient() as http:
        yield World(tmp_path, service, http)


def opened(world: World, **files: str) -> Bench:
    """A new machine of the project: nothing of an earlier one is on its disk."""
    shutil.rmtree(world.tmp_path / "machine", ignore_errors=True)
    bench = world.machine("machine")
    tree(bench.root, {**APP, **files})
    return bench


async def installed(bench: Bench) -> InstallOutcome:
    return (await bench.install(write(bench.root, dependencies={"dep": "1.0.0"}))).outcome


def bundle(bench: Bench, metadata: str = '{"browserHash": "1"}') -> None:
    """What Vite does: the metadata are put there last, at once."""
    tree(bench.root, {name: content for name, content in DEPS.items() if "metadata" not in name})
    draft = bench.root / "draft"
    draft.write_text(metadata)
    draft.rename(bench.root / bundles.METADATA)


@asynccontextmanager
async def watched(bench: Bench) -> AsyncIterator[None]:
    task = asyncio.create_task(bench.installer.served())
    try:
        yield
    finally:
        await ended(task)


async def first_session(world: World) -> None:
    bench = opened(world)
    await installed(bench)
    bundle(bench)
    async with watched(bench):
        await until(lambda: world.count("bundle_sent") == 1, 20)


async def test_what_vite_bundled_on_one_machine_the_next_one_has(world: World) -> None:
    await first_session(world)
    assert world.service.behind & set(world.service.layers), "the next machine is not told of it ahead"
    again = opened(world)
    assert await installed(again) is InstallOutcome.LAYER
    found = {
        f"node_modules/{name}": content.decode()
        for name, (_, content) in listing(again.root / "node_modules").items()
    }
    assert {name: found.get(name) for name in DEPS} == DEPS
    assert (world.count("bundle_unpacked"), again.leftovers) == (1, [])
    async with watched(again):
        await asyncio.sleep(0.2)
    assert world.count("bundle_sent") == 1, "it is the one that is kept"


@pytest.mark.parametrize("other", ["import", "directory"])
async def test_what_vite_would_throw_away_is_not_fetched(world: World, other: str) -> None:
    await first_session(world)
    if other == "directory":
        again = world.machine("elsewhere")
        tree(again.root, APP)
    else:
        again = opened(world, **{"src/more.ts": "import 'zod'"})
    assert await installed(again) is InstallOutcome.LAYER
    assert not (again.root / bundles.DEPS).exists()
    assert world.count("bundle_unpacked") == 0


async def test_a_bundle_that_vite_made_anew_takes_the_place_of_the_first(world: World) -> None:
    """Its scan had missed what the first visitor's page imports, or the settings' own imports have changed."""
    await first_session(world)
    again = opened(world)
    await installed(again)
    bundle(again, '{"browserHash": "2"}')
    async with watched(again):
        await until(lambda: world.count("bundle_sent") == 2, 20)
    assert len(world.service.refused) == 1
    third = opened(world)
    await installed(third)
    assert json.loads((third.root / bundles.METADATA).read_text()) == {"browserHash": "2"}


async def test_what_is_there_is_left_alone(world: World) -> None:
    await first_session(world)
    again = opened(world)
    await installed(again)
    (again.root / bundles.DEPS / "react.js").write_text("mine")
    assert await installed(again) is InstallOutcome.CURRENT
    assert (again.root / bundles.DEPS / "react.js").read_text() == "mine"


@pytest.mark.parametrize("fault", ["hostile", "slow"])
async def test_a_bundle_that_is_no_good_is_none(
    world: World, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await first_session(world)
    (key,) = world.service.behind & set(world.service.layers)
    if fault == "hostile":
        world.service.keep(key, made_of(entry("node_modules/dep/index.js", b"evil")))
    else:
        monkeypatch.setattr("agent.devserver.install.WAIT_SECONDS", 0.05)
        world.service.slow.add(f"/objects/{key}.0")
    again = opened(world)
    assert await installed(again) is InstallOutcome.LAYER
    assert (again.root / "node_modules/dep/index.js").read_text() == "module.exports = 1\n"
    assert not (again.root / bundles.DEPS).exists()
    assert world.service.refused == ([] if fault == "slow" else [key])
    assert (again.leftovers, world.programs()) == ([], [])


async def test_a_session_sends_a_bounded_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "MOST_SENT", 2)
    bench = opened(world)
    await installed(bench)
    task = asyncio.create_task(bench.installer.served())
    for number in range(2):
        bundle(bench, json.dumps({"browserHash": number}))
        await until(lambda number=number: world.count("bundle_sent") == number + 1, 20)  # type: ignore[misc]
    await until(task.done, 20)
    bundle(bench, "{}")
    await asyncio.wait_for(bench.installer.served(), 20)
    assert world.count("bundle_sent") == 2, "however often its dev server starts"


HOSTILE = {
    "a file of a package": entry("node_modules/react/index.js", b"evil"),
    "a link": link("node_modules/.vite/deps/x", "../../react"),
    "a directory with a like name": entry("node_modules/.vite/deps2/x", b""),
    "a path up": entry("node_modules/.vite/deps/../../../x", b""),
    "another place": entry("packages/a/node_modules/.vite/deps/x", b""),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bundle_has_files_of_its_directory_alone(what: str, tmp_path: Path) -> None:
    with pytest.raises(LayerRefused):
        archive.unpack(io.BytesIO(made_of(HOSTILE[what])), str(tmp_path), bundle=True)
    assert not any(path.is_file() or path.is_symlink() for path in tmp_path.rglob("*"))


@pytest.mark.parametrize("what", ["a link", "too many", "too large", "a pipe", "changed"])
def test_what_the_project_wrote_is_bounded_when_it_is_packed(what: str, tmp_path: Path) -> None:
    root = tree(tmp_path, DEPS)
    not_after = None
    match what:
        case "a link":
            (root / bundles.DEPS / "x").symlink_to("/etc/passwd")
        case "too many":
            for number in range(BUNDLE.entries + 1):
                os.link(root / bundles.DEPS / "react.js", root / bundles.DEPS / f"{number}")
        case "too large":
            os.truncate(root / bundles.DEPS / "react.js", BUNDLE.file_bytes + 1)
        case "a pipe":
            os.mkfifo(root / bundles.DEPS / "x")
        case "changed":
            not_after = 0
    with pytest.raises(LayerRefused):
        archive.pack(str(root), io.BytesIO(), not_after, bundle=True)


def test_only_the_bundle_is_packed(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "a", {**DEPS, "node_modules/react/index.js": "", "node_modules/.vite/vitest/x": ""}
    )
    target = io.BytesIO()
    assert archive.pack(str(root), target, bundle=True) == len(DEPS)
    (tmp_path / "b").mkdir()
    archive.unpack(io.BytesIO(target.getvalue()), str(tmp_path / "b"), bundle=True)
    assert set(listing(tmp_path / "b")) == set(DEPS)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('import React, { useState } from "react";', {"react"}),
        ("export * from '@scope/name/sub';", {"@scope/name/sub"}),
        ('const a = await import("lazy"); require("cjs")', {"lazy", "cjs"}),
        ('import "./own.css"; import x from "/src/x"; import y from "../y"', set()),
        ('import fs from "node:fs"', set()),
        ('import {\n  a,\n  b,\n} from "many";import"side"', {"many", "side"}),
    ],
)
def test_what_a_source_imports(source: str, names: set[str]) -> None:
    assert imported(source.encode()) == {name.encode() for name in names}


@pytest.mark.parametrize("what", [b"from", b"import(", b'from "', b"from ", b"import '@"])
def test_no_source_takes_long_to_read(what: bytes) -> None:
    """A search that went back over each space would take hours."""
    for content in (
        what + b" " * MOST_FILE_BYTES,
        what * (MOST_FILE_BYTES // len(what)),
        what + b"a" * MOST_FILE_BYTES,
    ):
        assert len(imported(content)) <= 1


@given(st.binary(max_size=2000))
def test_any_source_is_read(content: bytes) -> None:
    assert all(0 < len(name) <= 201 for name in imported(content))


def test_which_sources_are_read(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "src/a.tsx": 'import "a"', "node_modules/x/b.js": 'import "b"', ".cache/c.js": 'import "c"',
            "dist/d.js": 'import "d"', "e.md": 'import "e"', "vite.config.ts": 'import "f"',
            "src/other.config.js": 'import "g"',
        },
    )  # fmt: skip
    (root / "link.js").symlink_to("/etc/passwd")
    assert imports(root) == (["a", "f", "g"], [("vite.config.ts", b'import "f"')])
    tree(root, {f"many/{number}.js": "" for number in range(MOST_FILES)})
    assert imports(root) is None, "more is not read"


def test_a_key_is_of_all_that_vite_looks_at() -> None:
    one = ("a" * 40, "/app", ["react"], [("vite.config.js", b"x")])
    others = [
        ("b" * 40, *one[1:]), (one[0], "/b", *one[2:]), (*one[:2], ["react", "zod"], one[3]),
        (*one[:3], [("vite.config.js", b"y")]), (*one[:3], [("vite.config.ts", b"x")]), (*one[:3], []),
    ]  # fmt: skip
    keys = {bundle_key(*each) for each in (one, *others)}
    assert len(keys) == 1 + len(others)
    assert all(len(key) == 40 for key in keys)


pytestmark = needs_npm
