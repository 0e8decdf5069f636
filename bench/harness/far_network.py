"""Makes a network of 100 Mbit/s and 20 ms for the programs of one measurement: a namespace behind shaped interfaces.

What runs in it reaches this machine at `Far.here`, and what is beyond by the way of this machine. Nothing else is
slowed. Needs root, `ip`, `tc` and `iptables`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.harness.results import Unmeasurable

RATE: Final = "100mbit"
DELAY: Final = "10ms"
"""Each way."""
FORWARD: Final = Path("/proc/sys/net/ipv4/ip_forward")


@dataclass(frozen=True, slots=True)
class Far:
    """The namespace. `here`: this machine's address; `there`: the namespace's; `prefix`: runs a program in it.

    `what`: what slows it.
    """

    here: str
    there: str
    prefix: tuple[str, ...]
    what: str = "100 Mbit/s and 20 ms"
    note: str = ""
    """What is missing, and why."""


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unmeasurable(f"{' '.join(command)}: {done.stderr.strip()}")


def _shape(ours: str, theirs: str, within: tuple[str, ...]) -> tuple[str, str]:
    """Slow both ends. Returns `Far.what` and `Far.note`: a kernel without netem has the rate alone."""
    netem = ("root", "netem", "delay", DELAY, "rate", RATE, "limit", "2000")
    tbf = ("root", "tbf", "rate", RATE, "burst", "64kb", "latency", "100ms")
    has_netem = (
        subprocess.run(["tc", "qdisc", "add", "dev", ours, *netem], capture_output=True).returncode == 0
    )
    if not has_netem:
        _call("tc", "qdisc", "add", "dev", ours, *tbf)
    _call(*within, "tc", "qdisc", "add", "dev", theirs, *(netem if has_netem else tbf))
    if has_netem:
        return "100 Mbit/s and 20 ms", ""
    return "100 Mbit/s", "without the 20 ms, of which npm has more: the kernel has no netem"


@contextmanager
def far_network() -> Iterator[Far]:
    """Make it, and remove it with all that it took. Raises `Unmeasurable` where that cannot be."""
    for tool in ("ip", "tc", "iptables"):
        if shutil.which(tool) is None or os.geteuid() != 0:
            raise Unmeasurable(f"a slow network needs root and `{tool}`")
    name, number = f"bench-{os.getpid()}", os.getpid() % 200 + 20
    ours, theirs = f"b{os.getpid()}h", f"b{os.getpid()}n"
    here, there, whole = (f"10.213.{number}.{host}" for host in ("1", "2", "0/30"))
    nat = ("POSTROUTING", "-s", whole, "!", "-o", ours, "-j", "MASQUERADE")
    forwarded = FORWARD.read_text()
    within = ("ip", "netns", "exec", name)
    try:
        _call("ip", "netns", "add", name)
        _call("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs)
        _call("ip", "link", "set", theirs, "netns", name)
        _call("ip", "addr", "add", f"{here}/30", "dev", ours)
        _call("ip", "link", "set", ours, "up")
        _call(*within, "ip", "addr", "add", f"{there}/30", "dev", theirs)
        _call(*within, "ip", "link", "set", theirs, "up")
        _call(*within, "ip", "link", "set", "lo", "up")
        _call(*within, "ip", "route", "add", "default", "via", here)
        what, note = _shape(ours, theirs, within)
        FORWARD.write_text("1")
        _call("iptables", "-t", "nat", "-A", *nat)
        yield Far(here, there, within, what, note)
    finally:
        # Whoever still waits for an answer there would wait for minutes.
        left = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
        for pid in left.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for command in (
            ("iptables", "-t", "nat", "-D", *nat),
            ("ip", "netns", "del", name),
            ("ip", "link", "del", ours),
        ):
            with suppress(Unmeasurable):
                _call(*command)
        FORWARD.write_text(forwarded)
