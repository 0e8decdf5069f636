"""A file system that is blind to case, kept in memory and mounted through /dev/fuse: what macOS and Windows disks do.

Linux has such directories too (`casefold`), but not every kernel is built with them; FUSE is nearly everywhere. Names
keep the spelling they were made with, and any spelling finds them. It does what the disk's tests do and no more.

    python -m tests.fakes.case_blind MOUNTPOINT      prints "mounted", serves until unmounted; needs root

Structures: linux/fuse.h, protocol 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import stat
import struct
import sys
import time
from collections.abc import Callable

IN = struct.Struct("<IIQQIIII")
OUT = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
ROOT = 1


class Node:
    """A file or a directory. `names`: folded name → (name as made, node)."""

    def __init__(self, number: int, mode: int, uid: int, gid: int) -> None:
        self.number = number
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.links = 1
        self.content = bytearray()
        self.names: dict[str, tuple[str, Node]] = {}
        self.modified = self.changed = time.time_ns()

    def attributes(self) -> bytes:
        seconds = [self.modified // 10**9, self.modified // 10**9, self.changed // 10**9]
        rest = [self.modified % 10**9, self.modified % 10**9, self.changed % 10**9]
        size = len(self.content)
        return ATTR.pack(
            self.number, size, (size + 511) // 512, *seconds, *rest,
            self.mode, self.links, self.uid, self.gid, 0, 4096, 0,
        )  # fmt: skip

    def entry(self) -> bytes:
        return struct.pack("<4Q2I", self.number, 0, 0, 0, 0, 0) + self.attributes()

    def touch(self) -> None:
        self.modified = self.changed = time.time_ns()


class Refused(Exception):
    """The answer is an error number."""


def named(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()


class CaseBlind:
    """The tree and its operations: request body in, answer body out."""

    def __init__(self) -> None:
        self.numbers = itertools.count(ROOT)
        self.nodes: dict[int, Node] = {}
        self.new(stat.S_IFDIR | 0o755, 0, 0)
        self.operations: dict[int, Callable[[Node, bytes, int, int], bytes]] = {
            1: self.lookup, 3: self.getattr, 4: self.setattr, 9: self.mkdir, 10: self.unlink, 11: self.rmdir,
            12: self.rename, 13: self.link, 14: self.open, 15: self.read, 16: self.write, 17: self.statfs,
            18: self.nothing, 25: self.nothing, 26: self.init, 27: self.open, 28: self.readdir, 29: self.nothing,
            35: self.create, 45: self.rename2,
        }  # fmt: skip

    def new(self, mode: int, uid: int, gid: int) -> Node:
        node = Node(next(self.numbers), mode, uid, gid)
        self.nodes[node.number] = node
        return node

    def child(self, node: Node, name: str) -> Node:
        found = node.names.get(name.casefold())
        if found is None:
            raise Refused(errno.ENOENT)
        return found[1]

    def put(self, node: Node, name: str, child: Node) -> None:
        """Under the spelling that is there already, if one is (as ext4 does)."""
        key = name.casefold()
        node.names[key] = (node.names[key][0] if key in node.names else name, child)
        node.touch()

    def init(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        readahead = struct.unpack_from("<4I", body)[2]
        return struct.pack("<4I2H2I2H8I", 7, 31, readahead, 0, 16, 12, 1 << 17, 1, 32, 0, *[0] * 8)

    def nothing(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        return b""

    def lookup(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        return self.child(node, named(body)).entry()

    def getattr(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0) + node.attributes()

    def setattr(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        valid, _, _, size, *rest = struct.unpack_from("<2I6Q8I", body)
        mode, owner, group = rest[-5], rest[-3], rest[-2]
        if valid & 1:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        if valid & 2:
            node.uid = owner
        if valid & 4:
            node.gid = group
        if valid & 8:
            del node.content[size:]
            node.content.extend(bytes(size - len(node.content)))
        node.changed = time.time_ns()
        return self.getattr(node, body, uid, gid)

    def mkdir(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        mode, _ = struct.unpack_from("<2I", body)
        return self.make(node, named(body[8:]), stat.S_IFDIR | stat.S_IMODE(mode), uid, gid)

    def make(self, node: Node, name: str, mode: int, uid: int, gid: int) -> bytes:
        if name.casefold() in node.names:
            raise Refused(errno.EEXIST)
        child = self.new(mode, uid, gid)
        self.put(node, name, child)
        return child.entry()

    def create(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        _, mode, _, _ = struct.unpack_from("<4I", body)
        entry = self.make(node, named(body[16:]), stat.S_IFREG | stat.S_IMODE(mode), uid, gid)
        return entry + self.open(node, body, uid, gid)

    def open(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0)

    def read(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", body)
        return bytes(node.content[offset : offset + size])

    def write(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", body)
        node.content[offset : offset + size] = body[40 : 40 + size]
        node.touch()
        return struct.pack("<2I", size, 0)

    def unlink(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        child = self.child(node, named(body))
        del node.names[named(body).casefold()]
        child.links -= 1
        node.touch()
        return b""

    def rmdir(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        if self.child(node, named(body)).names:
            raise Refused(errno.ENOTEMPTY)
        return self.unlink(node, body, uid, gid)

    def rename(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        return self.move(node, struct.unpack_from("<Q", body)[0], body[8:])

    def rename2(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        target, flags = struct.unpack_from("<QI", body)
        if flags:
            raise Refused(errno.EINVAL)
        return self.move(node, target, body[16:])

    def move(self, node: Node, target: int, names: bytes) -> bytes:
        old, new = (part.decode() for part in names.split(b"\0")[:2])
        child = self.child(node, old)
        there = self.nodes[target]
        replaced = there.names.get(new.casefold())
        if replaced is not None and replaced[1] is not child:
            if replaced[1].names:
                raise Refused(errno.ENOTEMPTY)
            replaced[1].links -= 1
        del node.names[old.casefold()]
        self.put(there, new, child)
        child.changed = time.time_ns()
        return b""

    def link(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        child = self.nodes[struct.unpack_from("<Q", body)[0]]
        name = named(body[8:])
        if name.casefold() in node.names:
            raise Refused(errno.EEXIST)
        self.put(node, name, child)
        child.links += 1
        child.changed = time.time_ns()
        return child.entry()

    def readdir(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", body)
        out = b""
        for position, (name, child) in enumerate(list(node.names.values())[offset:], start=offset + 1):
            raw = name.encode()
            entry = struct.pack("<2Q2I", child.number, position, len(raw), child.mode >> 12) + raw
            entry += bytes(-len(entry) % 8)
            if len(out) + len(entry) > size:
                break
            out += entry
        return out

    def statfs(self, node: Node, body: bytes, uid: int, gid: int) -> bytes:
        return struct.pack(
            "<5Q4I6I", 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096, 0, *[0] * 6
        )

    def answer(self, request: bytes) -> bytes | None:
        """The reply, None for what must not be answered (forget)."""
        _, opcode, unique, number, uid, gid, _, _ = IN.unpack_from(request)
        if opcode in (2, 36, 42):
            return None
        operation = self.operations.get(opcode)
        try:
            if operation is None:
                raise Refused(errno.ENOSYS)
            body = operation(self.nodes.get(number, self.nodes[ROOT]), request[IN.size :], uid, gid)
        except Refused as refused:
            return OUT.pack(OUT.size, -refused.args[0], unique)
        return OUT.pack(OUT.size + len(body), 0, unique) + body


def main(place: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"case_blind", place.encode(), b"fuse", 0, options.encode()):
        raise SystemExit(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    print("mounted", flush=True)
    system = CaseBlind()
    while True:
        try:
            request = os.read(device, (1 << 17) + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            if error.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                continue
            raise
        reply = system.answer(request)
        if reply is not None:
            os.write(device, reply)


if __name__ == "__main__":
    main(sys.argv[1])
