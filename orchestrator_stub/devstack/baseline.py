"""Keeps what of a directory was sent last, so that the next start sends only what changed meanwhile.

Before a save is sent its paths are written down beside the baseline. A process that is killed between the save and the
note of it finds them there: nobody knows then what the project holds, and whatever stands in the directory is sent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from uuid import UUID

from orchestrator_stub.devstack.three_way import UNCERTAIN
from orchestrator_stub.platform.source_files import LocalFile


class Baseline:
    """The file at `path`, of one project. `files` is what was sent: change it, then `keep` it.

    Raises `OSError` when there is a file that cannot be read: without it the directory would go over what others have
    saved.
    """

    def __init__(self, path: Path, project_id: UUID) -> None:
        self._path = path
        self._under_way = path.with_name(path.name + ".under-way")
        self._project_id = project_id
        self.is_new = not path.exists()
        """Whether nothing was ever sent from here, as far as anybody knows."""
        self.files = self._read()
        for name in self._read_under_way():
            self.files[name] = UNCERTAIN
        self.unkept: str | None = None
        """Why what is on the disk is not what was sent."""

    def begin(self, paths: Iterable[str]) -> None:
        """Write down which paths are about to be sent. Where that cannot be written, `unkept` says so."""
        self._write(self._under_way, json.dumps([str(self._project_id), sorted(paths)]))

    def keep(self) -> None:
        """Write what was sent, and that nothing is under way. Where it cannot be written now, a later call does."""
        kept = {
            "project_id": str(self._project_id),
            "files": {name: [file.digest, file.executable] for name, file in self.files.items()},
        }
        if self._write(self._path, json.dumps(kept)):
            self._under_way.unlink(missing_ok=True)

    def _write(self, path: Path, text: str) -> bool:
        draft = path.with_name(path.name + ".new")
        try:
            draft.write_text(text)
            draft.rename(path)
        except OSError as error:
            self.unkept = f"cannot be written now ({error.strerror}); tried again until it can"
            return False
        self.unkept = None
        return True

    def _read(self) -> dict[str, LocalFile]:
        """Empty when nothing was sent before, or to another project."""
        try:
            kept = json.loads(self._path.read_text())
            if kept["project_id"] != str(self._project_id):
                return {}
            files: Mapping[str, tuple[str, bool]] = kept["files"]
            return {name: LocalFile(digest, executable) for name, (digest, executable) in files.items()}
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    def _read_under_way(self) -> list[str]:
        try:
            project, paths = json.loads(self._under_way.read_text())
            return [str(path) for path in paths] if project == str(self._project_id) else []
        except (FileNotFoundError, ValueError, TypeError):
            return []
