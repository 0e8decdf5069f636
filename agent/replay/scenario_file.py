"""Reads a scenario from disk, and the snapshot beside it; whole, or refused with file, line and reason."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import MalformedMessage, PathRefused
from agent.core.messages import MANIFEST_PATH, decode_manifest
from agent.core.model import Manifest, RelPath, digest_of
from agent.replay.scenario import Log, Scenario, read_scenario


@dataclass(frozen=True, slots=True)
class Loaded:
    """A scenario that can be run: `files` to begin with, and the `archive` they came in, if it was one."""

    scenario: Scenario
    files: Mapping[RelPath, bytes]
    archive: bytes | None = None


def load(path: Path) -> Loaded:
    """Read the scenario at `path` with the snapshot beside it. Raises `MalformedMessage` naming file and line."""
    try:
        scenario = read_scenario(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise MalformedMessage(str(path), reason or str(error)) from None
    if isinstance(scenario.snapshot, str):
        archive = _read_archive(path, scenario.snapshot)
        loaded = Loaded(scenario, read_archive(archive, f"{path}, line 1: {scenario.snapshot}")[1], archive)
    else:
        loaded = Loaded(scenario, {path: text.encode() for path, text in scenario.snapshot.files.items()})
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


def read_archive(archive: bytes, name: str = "the snapshot") -> tuple[Manifest | None, dict[RelPath, bytes]]:
    """Read the manifest of a snapshot (None: a plain zip has none) and the files it is about.

    Those are the files that the manifest lists, or all of a plain zip; what else is in the archive is for the agent to
    refuse.

    Raises:
        MalformedMessage: a listed file is not there as listed, so nobody knows what the scenario begins with.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as whole:
            names = whole.namelist()
            manifest = decode_manifest(whole.read(MANIFEST_PATH)) if MANIFEST_PATH in names else None
            listed = [each for each in names if each[-1] != "/"] if manifest is None else manifest.files
            files = {RelPath(each): whole.read(each) for each in listed}
    except (MalformedMessage, PathRefused) as error:
        raise MalformedMessage(name, str(error)) from None
    except KeyError as error:
        raise MalformedMessage(name, f"a listed file is not in it whole: {error}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise MalformedMessage(name, f"it cannot be unpacked: {error}") from None
    for path, entry in manifest.files.items() if manifest else ():
        if digest_of(files[path]) != entry.digest:
            raise MalformedMessage(name, f"{path} does not have the hash that the manifest lists")
    return manifest, files
