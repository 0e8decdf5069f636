"""Regions: each has a mirror of the stream, which publishes there what the hub's servers stored.

A mirror reads the stream as a consumer does, from where it was: what was published while a region was cut off arrives
when it is not any more, once and in order. Machines of a region connect to its own servers and notice nothing of this.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path
from typing import Final

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import ExternalStream, StreamConfig, StreamSource, StreamSourceInfo
from nats.js.errors import APIError, ServiceUnavailableError

from orchestrator_stub.relay.accounts import HUB, MIRROR_INBOX, STREAM, NatsKeys
from orchestrator_stub.relay.publisher import ACK_WITHIN, close, connect, ensure, stream_config

FOLLOWS_WITHIN: Final = 10.0
"""Seconds until a new mirror has heard of the stream; it takes half a second."""

HEARD_WITHIN: Final = 10e9
"""Nanoseconds. A stream that has nothing to say tells its mirrors so every second."""

TOKEN_SECONDS: Final = 60.0


class RegionError(Exception):
    """A region cannot be set up; the message says why in one line."""


def checked(region: str) -> str:
    """A region's name, which is a JetStream domain and a part of subjects. Raises `RegionError`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", region) or region == HUB:
        raise RegionError(
            f"{region!r} is no name of a region: take up to 32 of a-z, 0-9 and -, and not {HUB!r}"
        )
    return region


def write_region(keys: NatsKeys, region: str, directory: Path) -> list[Path]:
    """Write leaf.conf, which a region's servers include, and leaf.creds, which they show the hub.

    Raises `RegionError`, and `OSError`, `FileExistsError` where one of them is there.
    """
    names = {
        "leaf.creds": keys.region_credentials(checked(region)),
        "leaf.conf": f'REGION: "{region}"\nPREVIEW_ACCOUNT: "{keys.preview.public}"\n',
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in names.items():
        with os.fdopen(os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    return [directory / name for name in names]


async def mirror(servers: str, keys: NatsKeys, region: str) -> int:
    """Make the mirror in a region, or give it the configuration of this release.

    Args:
        servers: Of the hub, separated by commas.
        keys: Sign the token for it.
        region: The region's name.

    Returns:
        How many messages it is behind the stream.

    Raises:
        RegionError: It could not be, or it does not follow the stream.
    """
    inbox = f"{MIRROR_INBOX}.{time.time_ns():x}"
    token = keys.mirror_token(checked(region), inbox, time.time() + TOKEN_SECONDS)
    wanted = stream_config(
        1,
        mirror=StreamSource(name=STREAM, external=ExternalStream(api=f"$JS.{HUB}.API", deliver="")),
    )
    client = Client()
    try:
        try:
            await connect(client, [server.strip() for server in servers.split(",")], "mirror", token, inbox)
        except (NatsError, OSError, TimeoutError) as error:
            raise RegionError(f"NATS_URL cannot be used: {error or type(error).__name__}") from None
        return await _mirrored(client.jetstream(domain=region, timeout=ACK_WITHIN), wanted, region)
    except ServiceUnavailableError:
        raise RegionError(f"no server of {region} is connected to the hub; {_remedy(region)}") from None
    except APIError as error:
        raise RegionError(f"JetStream of {region}: {error.description}") from None
    except (NatsError, OSError, TimeoutError):
        raise RegionError(f"{region} does not answer; is it cut off from the hub, or the hub gone?") from None
    finally:
        await close(client)


async def _mirrored(streams: JetStreamContext, wanted: StreamConfig, region: str) -> int:
    """Make the mirror, and wait until it hears of the stream; return how many messages it is behind."""
    await ensure(streams, wanted)
    until = time.monotonic() + FOLLOWS_WITHIN
    while True:
        state = (await streams.stream_info(STREAM)).mirror
        if state is not None and _follows(state):
            return state.lag or 0
        if time.monotonic() > until:
            raise RegionError(f"the mirror in {region} does not follow the stream; {_remedy(region)}")
        await asyncio.sleep(0.1)


def _follows(state: StreamSourceInfo) -> bool:
    """Whether a mirror hears of the stream; -1: it never did."""
    return state.active is not None and 0 <= state.active < HEARD_WITHIN


def _remedy(region: str) -> str:
    return (
        f"they need region.conf, the hub's accounts.conf, leaf.conf and leaf.creds of `nats-region {region}`"
    )
