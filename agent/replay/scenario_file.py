"""A scenario on disk: its lines, and the snapshot beside them, read whole or refused with file, line and reason."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from agent.core.errors import MalformedMessage, PathRefused
from agent.core.messages import MANIFEST_PATH, read_manifest
from agent.core.model import RelPath, digest_of
from agent.replay.scenario import Log, Scenario, read_scenario


@dataclass(frozen=True, slots=True)
class Loaded:
    """A scenario that can be run: `files` to begin with, and the `archive` they came in, if it was one."""

    scenario: Scenario
    files: Mapping[RelPath, bytes]
    archive: bytes | None = None


def load(path: Path) -> Loaded:
    """The scenario at `path` with the snapshot beside it. Raises `MalformedMessage` naming file and line."""
    try:
        scenario = read_scenario(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise MalformedMessage(str(path), reason or str(error)) from None
    if isinstance(scenario.snapshot, str):
        archive = _read_archive(path, scenario.snapshot)
        loaded = Loaded(scenario, files_of(archive, f"{path}, line 1: {scenario.snapshot}"), archive)
    else:
        loaded = Loaded(scenario, scenario.snapshot)
    log = Log(scenario.project_id, scenario.epoch, scenario.revision, loaded.files)
    for step in scenario.steps:
        if step.event is not None:
            log.commit(step, str(path))
    return loaded


def _read_archive(path: Path, name: str) -> bytes:
    try:
        return (path.parent / name).read_bytes()
    except FileNotFoundError:
        raise MalformedMessage(f"{path}, line 1", f"its snapshot {name} is not beside it") from None
    except OSError as error:
        reason = f"its snapshot {name} cannot be read: {error.strerror}"
        raise MalformedMessage(f"{path}, line 1", reason) from None


def manifest_of(archive: bytes) -> dict[str, Any] | None:
    """The manifest inside a snapshot, unverified; None: a plain zip. Raises `MalformedMessage`."""
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as whole:
            manifest: dict[str, Any] = orjson.loads(whole.read(MANIFEST_PATH))
            return manifest
    except KeyError:
        return None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError) as error:
        raise MalformedMessage("the snapshot", f"no zip with a manifest: {error}") from None


def files_of(archive: bytes, name: str = "the snapshot") -> dict[RelPath, bytes]:
    """The files a snapshot is about: those its manifest lists, or all of a plain zip.

    What else is in the archive is for the agent to refuse. Raises `MalformedMessage`, called `name`, when a listed file
    is not there as listed: then nobody knows what the scenario begins with.
    """
    try:
        raw = manifest_of(archive)
        listed = None if raw is None else read_manifest(raw).files
        with zipfile.ZipFile(io.BytesIO(archive)) as whole:
            names = [name for name in whole.namelist() if name[-1] != "/"] if listed is None else list(listed)
            files = {RelPath(each): whole.read(each) for each in names}
    except (MalformedMessage, PathRefused) as error:
        raise MalformedMessage(name, str(error)) from None
    except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise MalformedMessage(name, f"a listed file is not in it whole: {error}") from None
    for path, file in (listed or {}).items():
        if digest_of(files[path]) != file.digest:
            raise MalformedMessage(name, f"{path} does not have the hash that the manifest lists")
    return files
