"""Ports for the servers of tests that are told theirs by number."""

from __future__ import annotations

import random
import socket
from pathlib import Path

LOWEST = 20_000
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""The ports that Linux deals out by itself; https://docs.kernel.org/networking/ip-sysctl.html"""

_given: set[int] = set()


def free_port() -> int:
    """A port nobody listens on now, and that nobody is given by chance before it is used.

    It lies below the ports that the kernel deals out to sockets bound to port 0 and to clients: of those, one that was
    free a moment ago may be dealt to the next socket of any test beside this one. No port is given twice.
    """
    end = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32_768
    while True:
        port = random.randrange(LOWEST, max(end, LOWEST + 1000))
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
