"""`python -m soak.supabase`: the local stand-in for Supabase as a process of its own, to be watched and killed.

In `make dev` it shares the orchestrator's process. Apart, the two can fail apart, as the hosted parts do. Settings from
the environment: DATABASE_URL, JWT_KEYS_FILE, STORAGE_DIR, PORT. Ends in order on SIGTERM.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import uvicorn

from orchestrator_stub.http.application import application
from orchestrator_stub.local_supabase.app import stand_in
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
from orchestrator_stub.platform.redaction import Redactor
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.process import Server, configure_logs


async def _serve() -> None:
    configure_logs("warning", "json", Redactor())
    keys = ProjectKeys.of(Keyring.open(Path(os.environ["JWT_KEYS_FILE"])))
    local = stand_in(os.environ["DATABASE_URL"], keys, Path(os.environ["STORAGE_DIR"]), faults=True)
    config = uvicorn.Config(
        application(local.routes, lifespan=local.lifespan),
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=2,
        **uvicorn_options(),
    )
    server = Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    await server.serve()


if __name__ == "__main__":
    asyncio.run(_serve())
