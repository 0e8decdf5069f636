"""Packs node_modules into a layer and unpacks one: a program that is run as the project's user.

    unpack DIRECTORY [bundle]  from its standard input into a directory that is empty
    pack DIRECTORY STAMP       a directory's node_modules into what its standard input is, at the lowest priority
    pack DIRECTORY bundle      what Vite bundled ahead in it, likewise

The agent, which may be root, writes nothing itself into what that user owns, and reads nothing there by name: it gives
the program a descriptor. That ends with 0, or with 1 and one line that says why. A layer is a tar in zstd.

A packed file must not have changed after STAMP, a file made when the install was complete: the project's node_modules
are hard links to what is packed, and what the project wrote into one is no part of a layer. The kernel keeps the time
of the last change (ctime), which no program can set. What Vite bundled ahead must not change while it is packed.
"""

from __future__ import annotations

import os
import stat
import sys
import tarfile
import time
from collections.abc import Iterator
from typing import BinaryIO, Final

from agent.modules.tar import (
    BUNDLE,
    MODULES,
    Bounds,
    File,
    LayerRefused,
    Link,
    check_path,
    check_target,
    members,
    shown,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

READ: Final = 256 * 1024
LEVEL: Final = 3
"""Of zstd: 35 MB for 257 MB of node_modules, in 2.0 s of processor time; level 1 makes 42 MB in 1.6, level 6 31 MB in
2.8, and all are unpacked in the same 0.4 s."""
WINDOW_LOG: Final = 23
"""At most 8 MB of what was unpacked are kept to look back at, whatever an archive asks for."""
RATIO: Final = 100
"""Bytes unpacked for each byte read: node_modules come to 7 to 12, and a file of zeros to thousands."""
RATIO_FLOOR: Final = 32 * 2**20
MODES: Final = {False: 0o644, True: 0o755}
PRUNED: Final = (".cache", ".vite")
"""Directories of a node_modules that a dev server fills, and an install does not."""
BUNDLED: Final = b"node_modules/.vite/deps"
"""Where Vite has what it bundled ahead."""


def unpack(source: BinaryIO, directory: str, bounds: Bounds | None = None, *, bundle: bool = False) -> int:
    """Unpack a layer into a directory that is empty. Returns the number of its files and links.

    `bundle`: it is what Vite bundled ahead: files in its directory and nothing else.

    Raises:
        LayerRefused: The archive broke a rule; the directory has a part of it and is to be removed.
        OSError: The disk did not take it.
    """
    made = {b""}
    links: list[Link] = []
    bounds = bounds or (BUNDLE if bundle else Bounds())
    root = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    count = 0
    try:
        pending: tuple[int, int] | None = None
        for found in members(_inflated(source), bounds):
            if isinstance(found, memoryview):
                assert pending is not None
                descriptor, left = pending
                _write(descriptor, found)
                pending = (descriptor, left - len(found))
                continue
            if pending is not None:
                os.close(pending[0])
                pending = None
            count += 1
            if bundle and (isinstance(found, Link) or not found.path.startswith(BUNDLED + b"/")):
                raise LayerRefused("bundle", f"{shown(found.path)} is no file of a bundle")
            if len(made) > bounds.entries:
                raise LayerRefused("entries", f"more than {bounds.entries} directories")
            if isinstance(found, Link):
                _make_parent(found.path, made, root)
                links.append(found)
            else:
                pending = (_create(found, made, root), found.size)
        if pending is not None:
            os.close(pending[0])
        # Only when every directory is made: none of them can then be reached through a link.
        for link in links:
            _symlink(link, root)
    finally:
        os.close(root)
    return count


def _create(file: File, made: set[bytes], root: int) -> int:
    _make_parent(file.path, made, root)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(file.path, flags, MODES[file.executable], dir_fd=root)
    except (FileExistsError, IsADirectoryError):
        raise LayerRefused("duplicate", f"{shown(file.path)} is there twice") from None


def _make_parent(path: bytes, made: set[bytes], root: int) -> None:
    parent = os.path.dirname(path)
    if parent in made:
        return
    _make_parent(parent, made, root)
    try:
        os.mkdir(parent, 0o755, dir_fd=root)
    except (FileExistsError, NotADirectoryError):
        raise LayerRefused("duplicate", f"{shown(parent)} is there twice") from None
    made.add(parent)


def _symlink(link: Link, root: int) -> None:
    try:
        os.symlink(link.target, link.path, dir_fd=root)
    except FileExistsError:
        raise LayerRefused("duplicate", f"{shown(link.path)} is there twice") from None


def _write(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _inflated(source: BinaryIO) -> Iterator[bytes]:
    inflater = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
    taken = given = 0
    while not inflater.eof:
        read = b""
        if inflater.needs_input:
            read = source.read(READ)
            if not read:
                raise LayerRefused("truncated", f"the archive stops after {taken} bytes")
            taken += len(read)
        try:
            piece = inflater.decompress(read, READ)
        except zstd.ZstdError as error:
            raise LayerRefused("damaged", str(error)) from None
        given += len(piece)
        if given > RATIO_FLOOR and given > taken * RATIO:
            raise LayerRefused("ratio", f"{taken} bytes come to more than {RATIO} times as many")
        if piece:
            yield piece
    if inflater.unused_data or source.read(1):
        raise LayerRefused("trailing", "something follows the archive")


def pack(directory: str, target: BinaryIO, not_after: int | None = None, *, bundle: bool = False) -> int:
    """Pack the node_modules of a directory, its packages' own included. Returns how many files and links they have.

    Args:
        directory: Of the package.json; whatever of it is not in a node_modules is left out.
        target: Where the archive goes.
        not_after: The `st_ctime_ns` that no file's may be above; None: any.
        bundle: Pack what Vite bundled ahead, and nothing else: the project's code has written it, so it is bounded.

    Raises:
        LayerRefused: There is what no layer may have.
        OSError: It cannot be read or written.
    """
    files, links = _found(os.fsencode(directory), BUNDLED if bundle else b"")
    if bundle:
        sizes = [info.st_size for _, info in files]
        if (
            links
            or len(files) > BUNDLE.entries
            or sum(sizes) > BUNDLE.bytes
            or max(sizes, default=0) > BUNDLE.file_bytes
        ):
            raise LayerRefused("bytes", f"{len(files)} files of {sum(sizes)} bytes, {len(links)} links")
    # A layer that is refused where it is read would be fetched, and refused, at each start.
    for path, _ in [*files, *links]:
        check_path(path)
    for path, to in links:
        check_target(path, to)
    with zstd.ZstdFile(target, "w", level=LEVEL) as packed:
        for path, info in files:
            _pack_file(os.fsencode(directory), path, info, packed, not_after)
        for path, to in links:
            packed.write(_header(path, tarfile.SYMTYPE, 0o777, 0, to))
        packed.write(bytes(2 * tarfile.BLOCKSIZE))
    return len(files) + len(links)


def _pack_file(
    directory: bytes, path: bytes, info: os.stat_result, packed: zstd.ZstdFile, not_after: int | None
) -> None:
    if info.st_mode & 0o7000:
        raise LayerRefused("rights", f"{shown(path)} has special bits")
    with open(os.open(b"%s/%s" % (directory, path), os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        content = file.read(READ + 1) if info.st_size <= READ else None
        size = info.st_size if content is None else len(content)
        packed.write(_header(path, tarfile.REGTYPE, MODES[bool(info.st_mode & 0o100)], size))
        if content is not None:
            packed.write(content)
        else:
            left = size
            while left and (piece := file.read(min(READ, left))):
                packed.write(piece)
                left -= len(piece)
            if left or file.read(1):
                raise LayerRefused("changed", f"{shown(path)} changed while it was read")
        packed.write(bytes(-size % tarfile.BLOCKSIZE))
        after = os.fstat(file.fileno())
    if size != info.st_size or (not_after is not None and after.st_ctime_ns > not_after):
        raise LayerRefused("changed", f"{shown(path)} changed after the install")


def _header(path: bytes, kind: bytes, mode: int, size: int, target: bytes = b"") -> bytes:
    entry = tarfile.TarInfo(os.fsdecode(path))
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, size, os.fsdecode(target)
    return entry.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _found(
    directory: bytes, within: bytes
) -> tuple[list[tuple[bytes, os.stat_result]], list[tuple[bytes, bytes]]]:
    """Return the files and the links of every node_modules below a directory, in the order of their names.

    `within`: a directory in a node_modules; those in it alone.
    """
    files: list[tuple[bytes, os.stat_result]] = []
    links: list[tuple[bytes, bytes]] = []
    ahead = [(within, bool(within))]
    while ahead:
        place, inside = ahead.pop()
        for entry in os.scandir(os.path.join(directory, place) if place else directory):
            path = b"%s/%s" % (place, entry.name) if place else entry.name
            if entry.is_dir(follow_symlinks=False):
                pruned = os.path.basename(place) == MODULES and os.fsdecode(entry.name) in PRUNED
                if not pruned and entry.name != b".git":
                    ahead.append((path, inside or entry.name == MODULES))
            elif not inside:
                continue
            elif entry.is_symlink():
                links.append((path, os.readlink(entry.path)))
            else:
                info = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(info.st_mode):
                    raise LayerRefused("kind", f"{shown(path)} is neither a file nor a link")
                files.append((path, info))
    return sorted(files, key=lambda found: found[0]), sorted(links)


def main(argv: list[str]) -> int:
    """Run the program; return its exit code."""
    try:
        if argv[0] == "unpack":
            with open(0, "rb", buffering=0, closefd=False) as source:
                unpack(source, argv[1], bundle=argv[2:] == ["bundle"])
        else:
            os.nice(19)
            if hasattr(os, "sched_setscheduler"):
                # The kernel gives the disk to this class, too, when nobody else wants it.
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
            with open(0, "wb", closefd=False) as target:
                is_bundle = argv[2] == "bundle"
                not_after = time.time_ns() if is_bundle else os.lstat(argv[2]).st_ctime_ns
                pack(argv[1], target, not_after, bundle=is_bundle)
    except LayerRefused as refused:
        print(f"refused: {refused}")  # noqa: T201 - the agent reads it
    except (OSError, MemoryError) as error:
        print(f"failed: {error}")  # noqa: T201
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
