"""docs/scale/nginx.conf, as a test runs it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

CONF: Final = (Path(__file__).parents[3] / "docs" / "scale" / "nginx.conf").read_text()
[PATTERN] = re.findall(r'"~\*(\S+)"\s+shard_1;', CONF)


def shard_by_front(id: str) -> int:
    """Which of its two databases the front takes an id for."""
    return 1 if re.match(PATTERN, id, re.IGNORECASE) else 0


def front(directory: Path, port: int, shards: list[int]) -> list[str]:
    """The command that runs nginx on `port` before orchestrators on the ports `shards`."""
    text = CONF
    for before, after in (
        ("listen 443 ssl http2", f"listen 127.0.0.1:{port}"),
        *((f"control-{n}.internal:54321", f"127.0.0.1:{shard}") for n, shard in enumerate(shards)),
    ):
        assert before in text
        text = text.replace(before, after)
    text = re.sub(r"\n *ssl_certificate.*;", "", text)
    temporary = "".join(
        f"{name}_temp_path {directory}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/error.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}{text}}}\n"
    )
    return ["nginx", "-c", str(directory / "nginx.conf"), "-g", f"user {os.environ.get('USER', 'root')};"]
