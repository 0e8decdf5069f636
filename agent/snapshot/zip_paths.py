"""Which paths the entries of an archive may have: each may be written, none comes twice, no file is a directory too.

Pure. Grows with the archive by its directories, and by those files that no manifest listed.
"""

from __future__ import annotations

from collections.abc import Mapping

from agent.core.errors import PathRefused, SnapshotRejected
from agent.core.model import Entry, RelPath, parents, parse_path
from agent.snapshot.zip_records import shown


class EntryPaths:
    """`reserved`: the one name that is admitted although `parse_path` refuses it, and only as the first entry's."""

    def __init__(self, reserved: str | None) -> None:
        self._reserved = reserved
        self._files: set[RelPath] = set()
        self._directories: set[RelPath] = set()
        self._listed: Mapping[RelPath, Entry] = {}

    def expect(self, listed: Mapping[RelPath, Entry]) -> None:
        """Files that a manifest names: examined already, and not kept a second time here.

        So that one of them does not come twice is, from here on, for the caller to see.
        """
        self._listed = listed

    def vouched_for(self, name: str, size: int) -> bool:
        """Whether the manifest says that the file `name` has so many bytes, or more."""
        entry = self._listed.get(RelPath(name))
        return entry is not None and size <= entry.size

    def admit(self, name: str, *, is_directory: bool, first: bool) -> RelPath:
        """The path of the entry `name`, when nothing before it stands in its way. Raises `SnapshotRejected`."""
        if name == self._reserved:
            if not first:
                raise SnapshotRejected("manifest_position", f"{shown(name)} is not the first entry")
            return RelPath(name)
        listed = name in self._listed
        if listed:
            path = RelPath(name)
        else:
            try:
                path = parse_path(name[:-1] if is_directory else name)
            except PathRefused as refused:
                raise SnapshotRejected(refused.rule, str(refused)) from None
        if listed and path.rpartition("/")[0] in self._directories and path not in self._directories:
            # Most of them: a listed file beside another one, below no file.
            return path
        # A known directory's own parents are known: no path is ever in both sets.
        if path.rpartition("/")[0] not in self._directories:
            for parent in parents(path):
                if parent in self._files or parent in self._listed:
                    raise SnapshotRejected("path_clash", f"{shown(parent)} is a file and a directory")
                self._directories.add(parent)
        if path in self._files or (is_directory and path in self._listed):
            rule = "path_clash" if is_directory else "duplicate"
            raise SnapshotRejected(rule, f"{shown(name)} is there twice")
        if is_directory:
            self._directories.add(path)
        elif path in self._directories:
            raise SnapshotRejected("path_clash", f"{shown(name)} is a file and a directory")
        elif not listed:
            self._files.add(path)
        return path
