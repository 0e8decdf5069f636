"""Questions to the machine that the dev server's keeper and `check` both ask."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from pathlib import Path


def listening_host(wanted: str) -> str:
    """`wanted`, or the IPv4 form of "everywhere" where the kernel has no IPv6."""
    if wanted != "::":
        return wanted
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return "0.0.0.0"  # noqa: S104 - the container's network decides who reaches it
    return wanted


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now. An address that cannot be used at all counts as free:
    the server's own message says more."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
        return True


def out_of_memory_kills() -> int:
    """How often the kernel killed for memory: in our control group, else on the whole machine; 0 if unknown."""
    if sys.platform != "linux":
        return 0
    for file in (*_own_group(), Path("/proc/vmstat")):
        with contextlib.suppress(OSError, ValueError):
            for line in file.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def _own_group() -> list[Path]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                return [Path("/sys/fs/cgroup", line[3:].lstrip("/"), "memory.events")]
    return []
