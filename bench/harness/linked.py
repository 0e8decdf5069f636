"""Prints the memory, in MB, of a process with the whole agent imported and one link of it connected.

python -m bench.harness.linked nats|realtime URL KEY TOKEN PROJECT
"""

from __future__ import annotations

import asyncio
import sys

import psutil
import structlog


async def main(which: str, url: str, key: str, token: str, project: str) -> None:
    import agent.daemon  # noqa: F401
    from agent.link.source import Resync
    from agent.link.types import LinkState
    from agent.tokens import Tokens

    tokens = Tokens(token, nats_jwt=token if which == "nats" else None)
    if which == "nats":
        from agent.link.nats import nats_link

        link = nats_link(url, project, tokens)
    else:
        from agent.link.realtime import realtime_link

        link = realtime_link(url, key, f"realtime:project:{project}", tokens)
    running = asyncio.create_task(link.run())
    while link.state is not LinkState.LIVE:
        if isinstance(await link.receive(), Resync):
            link.caught_up()
    print(psutil.Process().memory_info().rss / 2**20)
    running.cancel()


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    asyncio.run(main(*sys.argv[1:6]))
