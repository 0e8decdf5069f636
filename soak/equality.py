"""Equality, looked at while nobody works: editor's directory = database = agent's disk = what the agent reports.

saved      the editor's directory, file by file, SHA-256 of the bytes and the executable bit
kept       the database's current tree: its rows' hashes, and its texts hashed here
on disk    the agent's PROJECT_DIR, less node_modules and what drift put there
reported   epoch, revision and tree hash as the agent's `/status` has them, held against the database's own
told       the same in its last heartbeat, as the orchestrator keeps it (only after a last event may be lost: it
           takes as long as a heartbeat is apart)
served     the last save, as the dev server answers it
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

from agent.core.model import Digest, RelPath, tree_hash
from orchestrator_stub.platform.source_files import scan
from soak.stack import Stack
from soak.writing import MARKER

Tree = Mapping[str, tuple[str, bool]]
"""Path to SHA-256 and executable bit."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a project's agents are to hold."""

    tree: Tree
    epoch: str
    revision: int
    hash: str
    marker: str | None
    """What the preview is to serve; None: it is not asked."""


@dataclass
class Check:
    """One look. Times in seconds; `took` by agent, from the last save to its being equal."""

    at: float
    spoken: bool
    took: dict[int, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    waiting: dict[int, str] = field(default_factory=dict)
    """By agent: why it is not equal yet."""


MOST_READ = 64 << 20
"""Bytes of a file that is hashed; no project here has a larger one, and a hostile one makes 1 TB."""


def read_tree(root: Path) -> Tree:
    """Every file below `root` that is not in node_modules."""
    found: dict[str, tuple[str, bool]] = {}
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name != "node_modules"]
        for name in files:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_size > MOST_READ:
                found[os.path.relpath(path, root)] = (f"{status.st_size} bytes", False)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[os.path.relpath(path, root)] = (digest, bool(status.st_mode & stat.S_IXUSR))
            else:
                found[os.path.relpath(path, root)] = ("not a regular file", False)
    return found


def read_saved(root: Path) -> Tree:
    """The editor's directory."""
    whole = read_tree(root)
    return {path: whole[path] for path in scan(root)}


def differences(one: Tree, other: Tree) -> list[str]:
    """The paths at which two trees differ, with how."""
    said = []
    for path in sorted(one.keys() | other.keys()):
        if path not in other:
            said.append(f"{path} is missing")
        elif path not in one:
            said.append(f"{path} is too many")
        elif one[path] != other[path]:
            said.append(f"{path} has {'another mode' if one[path][0] == other[path][0] else 'other bytes'}")
    return said


async def wanted(stack: Stack, project_id: UUID, saved: Path, marker: str | None) -> tuple[Wanted, list[str]]:
    """What the database holds, and how that differs from what was saved."""
    rows = await stack.rows("select * from public.list_current_files(%s)", project_id)
    head = (
        await stack.rows(
            "select epoch::text, revision, public.project_tree_hash(project_id) as hash"
            " from public.project_heads where project_id = %s",
            project_id,
        )
    )[0]
    kept: dict[str, tuple[str, bool]] = {}
    wrong = []
    for row in rows:
        kept[row["file_path"]] = (row["content_hash"], row["executable"])
        content = row["content"]
        if content is not None and hashlib.sha256(content.encode()).hexdigest() != row["content_hash"]:
            wrong.append(f"the database's {row['file_path']} is not what its hash says")
    lost = differences(await asyncio.to_thread(read_saved, saved), kept)
    wrong += [f"database against editor: {each}" for each in lost]
    return Wanted(kept, head["epoch"], head["revision"], head["hash"], marker), wrong


async def difference(
    stack: Stack, number: int, want: Wanted, strays: set[str], http: httpx.AsyncClient
) -> str | None:
    """Why an agent is not equal yet; None when it is."""
    record = stack.record(number)
    if record is None or stack.process(number) is None:
        return "its process does not run"
    try:
        here = dict(await asyncio.to_thread(read_tree, stack.tree(number)))
    except OSError as error:
        return f"its tree cannot be read: {error}"
    for stray in strays:
        if here.pop(stray, None) is None:
            return f"{stray}, which is not the project's, was removed"
    if unlike := differences(want.tree, here):
        return f"disk: {'; '.join(unlike[:5])}" + (f" and {len(unlike) - 5} more" if len(unlike) > 5 else "")
    if tree_hash({RelPath(path): Digest(digest) for path, (digest, _) in here.items()}) != want.hash:
        return "the hash of the disk is not the database's tree hash"
    reported = await _reported(f"http://127.0.0.1:{record.health_port}/status", http)
    if reported is None:
        return "it does not answer"
    if (unlike_said := _unlike(reported, want)) is not None:
        return f"it says {unlike_said}"
    if want.marker is not None:
        return await _served(f"http://127.0.0.1:{record.dev_port}/{MARKER}", want.marker, http)
    if (unlike_said := _unlike(await _told(stack, number) or {}, want)) is not None:
        return f"its last heartbeat said {unlike_said}"
    return None


def _unlike(said: Mapping[str, Any], want: Wanted) -> str | None:
    if said.get("epoch") != want.epoch:
        return f"epoch {said.get('epoch')}; the database's is {want.epoch}"
    if said.get("revision") != want.revision:
        return f"revision {said.get('revision')}; the database is at {want.revision}"
    if said.get("tree_hash") != want.hash:
        return "another tree hash than the database"
    return None


async def _reported(url: str, http: httpx.AsyncClient) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = (await http.get(url)).json()
    except (httpx.HTTPError, ValueError):
        return None
    return report


async def _told(stack: Stack, number: int) -> dict[str, Any] | None:
    rows = await stack.rows("select status from preview.sessions where id = %s", stack.sessions[number].id)
    told: dict[str, Any] | None = rows[0]["status"] if rows else None
    return told


async def _served(url: str, text: str, http: httpx.AsyncClient) -> str | None:
    with suppress(httpx.HTTPError):
        answer = await http.get(url, headers={"accept": "*/*"})
        if answer.status_code == 200 and text in answer.text:
            return None
        return f"its preview answers {answer.status_code} and not the last save"
    return "its preview does not answer"


async def settle(
    stack: Stack,
    check: Check,
    want: Mapping[int, Wanted],
    strays: Mapping[int, set[str]],
    patience: float,
) -> None:
    """Wait until every agent is equal; what is not after `patience` seconds is written into `check`."""
    began = time.monotonic()
    check.waiting = dict.fromkeys(stack.sessions, "not looked at yet")
    async with httpx.AsyncClient(timeout=10, trust_env=False) as http:
        while check.waiting:
            for number in list(check.waiting):
                found = await difference(stack, number, want[number], strays.get(number, set()), http)
                if found is None:
                    del check.waiting[number]
                    check.took[number] = round(time.monotonic() - began, 2)
                else:
                    check.waiting[number] = found
            if time.monotonic() - began > patience:
                break
            await asyncio.sleep(0.5)
    check.wrong += [
        f"agent {number} is not equal after {patience:.0f} s: {why}" for number, why in check.waiting.items()
    ]
