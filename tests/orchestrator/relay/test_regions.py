"""Regions and a cluster of three, as docs/scale/README.md sets them up: what is published arrives everywhere, once.

Each server is on a machine of its own, with the configuration that an operator copies. Agents are the real link.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from nats.errors import Error as NatsError

from agent.link.nats import nats_link
from agent.tokens import Tokens
from orchestrator_stub.relay import publisher
from orchestrator_stub.relay.accounts import HUB, IN, OUT, STREAM, NatsKeys
from orchestrator_stub.relay.publisher import Event, Lanes, NatsStream
from orchestrator_stub.relay.regions import RegionError, checked, mirror, write_region
from tests.agent.link.one_link import Link, running
from tests.fakes.realtime import jwt
from tests.orchestrator.relay.nats_world import client, settled, until
from tests.orchestrator.relay.regions_world import Network, Server, network, routes, why_not
from tests.orchestrator.relay.test_process import run

FAR = 60.0
"""Seconds within which servers find each other again: they try every second, and a busy machine is slow."""


@pytest_asyncio.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Network]:
    """A network, and the keys of `nats-keys` on every machine of it."""
    if reason := why_not():
        pytest.skip(reason)
    made = await asyncio.to_thread(run, "nats-keys", str(tmp_path / "keys"))
    assert made.returncode == 0, made.stderr
    async with network(tmp_path) as machines:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "keys" / "ca.pem"))
        monkeypatch.setenv("NATS_KEYS_FILE", str(tmp_path / "keys" / "nats-keys.json"))
        monkeypatch.setenv("DATABASE_URL", "postgresql://localhost/unused")
        yield machines


def keys_of(world: Path) -> NatsKeys:
    return NatsKeys.read(world / "keys" / "nats-keys.json")


class Publishing:
    """The relay's publisher, without a database behind it."""

    def __init__(self, stream: NatsStream, projects: list[UUID]) -> None:
        self.projects = projects
        self.revision = 0
        self.stored = 0
        self.outcomes: dict[str, int] = {}
        self._lanes = Lanes(stream, may_publish=lambda: True, done=self._done, count=self._count)

    def _done(self, _: Event) -> None:
        self.stored += 1

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def put(self, number: int) -> None:
        """So many saves of each project."""
        for _ in range(number):
            self.revision += 1
            for project in self.projects:
                self._lanes.put(
                    Event(
                        0,
                        0,
                        str(project),
                        "file:update",
                        f"{project}:e:{self.revision}",
                        f'{{"revision": {self.revision}}}',
                    )
                )

    async def all_stored(self, within: float = FAR) -> None:
        await until(lambda: self.stored == self.revision * len(self.projects), "all to be stored", within)

    async def close(self) -> None:
        await self._lanes.close()


@asynccontextmanager
async def publishing(url: str, keys: NatsKeys, replicas: int = 1) -> AsyncIterator[Publishing]:
    stream = NatsStream(url, keys, replicas=replicas)
    made = Publishing(stream, [uuid4() for _ in range(3)])
    try:
        await prepared(stream)
        yield made
    finally:
        await made.close()
        await stream.close()


async def prepared(stream: NatsStream) -> None:
    """A cluster that has just started has no leader yet."""
    ends = time.monotonic() + FAR
    while True:
        try:
            return await stream.prepare()
        except OSError:
            assert time.monotonic() < ends
            await asyncio.sleep(0.2)


@asynccontextmanager
async def agents(server: Server, keys: NatsKeys, projects: list[UUID]) -> AsyncIterator[list[Link]]:
    """One agent of each project, live."""
    async with AsyncExitStack() as stack:
        links = []
        for project in projects:
            token = keys.machine_token(project, uuid4(), time.time() + 600)
            tokens = Tokens(jwt(time.time() + 600), nats_jwt=token)
            link = await stack.enter_async_context(running(nats_link(server.url, str(project), tokens)))
            links.append(link)
        for link in links:
            await link.live()
        yield links


def revisions(link: Link) -> list[int]:
    return [payload["revision"] for _, payload in link.events]  # type: ignore[index]


def everything(published: Publishing) -> list[int]:
    return list(range(1, published.revision + 1))


async def hear_all(links: list[Link], published: Publishing) -> None:
    """Every agent hears every revision: none missing, none doubled, none out of order."""
    await until(lambda: all(len(link.events) >= published.revision for link in links), "all revisions", FAR)
    for link in links:
        assert revisions(link) == everything(published)


async def started_region(world: Network, hub: Server, name: str, addresses: str = "") -> Server:
    """A region set up by the commands and the configuration of docs/scale/README.md."""
    region = world.machine(name)
    made = await asyncio.to_thread(run, "nats-region", name, str(region.directory), NATS_URL=hub.url)
    assert made.returncode == 0, made.stderr
    await region.start("region.conf", NATS_HUB=addresses or f"tls://{hub.address}:7422")
    ends = time.monotonic() + FAR
    while True:
        mirrored = await asyncio.to_thread(run, "nats-mirror", name, NATS_URL=hub.url)
        if mirrored.returncode == 0:
            break
        assert time.monotonic() < ends, mirrored.stderr  # its server looks for the hub every second
    assert mirrored.stdout == f"{name} follows the stream, 0 messages behind\n"
    return region


def given_up(server: Server) -> int:
    """How often its connection to the hub, or the hub's to it, ended."""
    return server.log().count("Leafnode connection closed")


@pytest.mark.nightly
async def test_what_was_published_during_a_cut_arrives_after_it(world: Network, tmp_path: Path) -> None:
    """A cut that TCP outlives, then one that both sides give up: everything, once, in order, and no agent notices."""
    keys = keys_of(tmp_path)
    hub = world.machine("hub")
    await hub.start("hub.conf")
    async with publishing(hub.url, keys) as published:
        region = await started_region(world, hub, "b")
        async with (
            agents(hub, keys, published.projects) as near,
            agents(region, keys, published.projects) as far,
        ):
            published.put(20)
            await hear_all(near + far, published)
            for outlived in (True, False):
                before, ends = published.revision, given_up(region)
                world.cut(hub, region)
                published.put(200)
                await hear_all(near, published)
                assert all(len(link.events) == before for link in far)
                if not outlived:
                    await until(lambda ends=ends: given_up(region) > ends, "the region to notice", FAR)  # type: ignore[misc]
                world.heal(hub, region)
                published.put(20)
                await hear_all(near + far, published)
                assert outlived == (given_up(region) == ends)
            assert all(link.stream.report()["losses"] == {} for link in near + far)
        assert published.outcomes == {"new": published.revision * 3}


@pytest.mark.nightly
async def test_a_leader_that_is_killed_loses_doubles_and_reorders_nothing(
    world: Network, tmp_path: Path
) -> None:
    """The stream's leader, of three, in the midst of publishing; a region follows the whole time."""
    keys = keys_of(tmp_path)
    three = [world.machine(f"n{number}") for number in range(3)]
    for server in three:
        await server.start("hub-of-three.conf", NATS_ROUTES=routes(three))
    async with publishing(",".join(server.url for server in three), keys, replicas=3) as published:
        leader = three[await leading(three, keys)]
        others = [server for server in three if server is not leader]
        leaves = json.dumps([f"tls://{server.address}:7422" for server in three])
        region = await started_region(world, others[0], "b", leaves)
        async with (
            agents(others[0], keys, published.projects) as near,
            agents(others[1], keys, published.projects) as beside,
            agents(region, keys, published.projects) as far,
        ):
            published.put(20)
            await hear_all(near + beside + far, published)
            published.put(300)
            await until(lambda: published.stored > 200, "some of them to be stored", FAR)
            await leader.kill()
            await published.all_stored()
            published.put(1)
            await hear_all(far, published)
            assert await stored(others[0], keys, published.projects) == {
                str(project): everything(published) for project in published.projects
            }
            # The leader may have died between storing and publishing again. Then the relay was told that it is there,
            # and the agents of the hub see the hole; a mirror has no such moment.
            for links in (near, beside):
                for link in links:
                    await until(lambda link=link: revisions(link)[-1] == published.revision, "the last", FAR)  # type: ignore[misc]
                    assert revisions(link) == sorted(set(revisions(link)))
                missing = sum(published.revision - len(link.events) for link in links)
                assert missing <= published.outcomes.get("duplicate", 0)


async def leading(servers: list[Server], keys: NatsKeys) -> int:
    """Which of them leads the stream."""
    async with client(servers[0].url, owner(keys)) as connected:
        ends = time.monotonic() + FAR
        while True:
            with suppress(NatsError, TimeoutError):
                cluster = (await connected.jetstream(timeout=5).stream_info(STREAM)).cluster
                assert cluster is not None
                names = [server.name for server in servers]
                if cluster.leader in names:
                    return names.index(cluster.leader)
            assert time.monotonic() < ends, "no leader"
            await asyncio.sleep(0.2)


async def stored(server: Server, keys: NatsKeys, projects: list[UUID]) -> dict[str, list[int]]:
    """Every revision in the stream, by project, in the order in which it stored them."""
    found: dict[str, list[int]] = {str(project): [] for project in projects}
    async with client(server.url, owner(keys)) as connected:
        streams = connected.jetstream(timeout=10)
        last = (await streams.stream_info(STREAM)).state.last_seq
        reader = await streams.pull_subscribe(f"{IN}*", stream=STREAM)
        seen = 0
        while seen < last:
            for message in await reader.fetch(500, timeout=10):
                seen = message.metadata.sequence.stream
                found[message.subject.removeprefix(IN)].append(json.loads(message.data)["revision"])
    return found


def owner(keys: NatsKeys) -> str:
    """Somebody of PREVIEW who may do anything there: what a test looks with."""
    everywhere = {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}}
    return keys.preview.user("all", everywhere, time.time() + 600)


async def test_a_region_hears_once_and_may_publish_nothing(world: Network, tmp_path: Path) -> None:
    """Neither with what its servers show the hub, nor through them."""
    keys = keys_of(tmp_path)
    hub, region = world.machine("hub"), world.machine("b")
    write_region(keys, "b", region.directory)
    await asyncio.gather(
        hub.start("hub.conf"), region.start("region.conf", NATS_HUB=f"tls://{hub.address}:7422")
    )
    async with publishing(hub.url, keys) as published:
        await mirrored(hub, keys, "b")
        project = published.projects[0]
        credentials = {"user_credentials": str(region.directory / "leaf.creds")}
        async with (
            agents(region, keys, published.projects) as far,
            client(hub.url, None, **credentials) as shown,
            client(region.url, owner(keys)) as inside,
        ):
            published.put(20)
            await hear_all(far, published)
            attacks = [
                f"{IN}{project}", f"{OUT}{project}", f"$JS.API.STREAM.PURGE.{STREAM}",
                f"$JS.{HUB}.API.STREAM.DELETE.{STREAM}", f"$JS.API.STREAM.INFO.{STREAM}",
            ]  # fmt: skip
            for attack in attacks:
                await shown.publish(attack, b"{}")
                await inside.publish(attack, b"{}")
            await shown.subscribe(f"{OUT}*")
            await settled(shown)
            await settled(inside)
            refused = [said for said in shown.said if "permissions violation" in said]  # type: ignore[attr-defined]
            assert len(refused) == len(attacks) + 1, shown.said  # type: ignore[attr-defined]
            published.put(20)
            await hear_all(far, published)
            assert (await stored(hub, keys, published.projects))[str(project)] == everything(published)


@pytest.mark.nightly
async def test_a_mirror_is_given_what_the_next_release_wants_and_says_that_it_is_cut_off(
    world: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(tmp_path)
    hub, region = world.machine("hub"), world.machine("b")
    write_region(keys, "b", region.directory)
    await hub.start("hub.conf")
    with pytest.raises(RegionError, match=r"no server of b is connected to the hub; they need region\.conf"):
        await mirror(hub.url, keys, "b")
    with pytest.raises(RegionError, match="NATS_URL cannot be used"):
        await mirror(region.url, keys, "b")
    await region.start("region.conf", NATS_HUB=f"tls://{hub.address}:7422")
    async with publishing(hub.url, keys), client(region.url, owner(keys)) as inside:
        await mirrored(hub, keys, "b")
        monkeypatch.setattr(publisher, "KEPT_EACH", 7)
        await asyncio.sleep(12)  # with nothing to hear but that there is nothing
        assert await mirror(hub.url, keys, "b") == 0
        found = await inside.jetstream().stream_info(STREAM)
        assert found.config.max_msgs_per_subject == 7
        world.cut(hub, region)
        with pytest.raises(RegionError, match="b does not answer; is it cut off from the hub"):
            await mirror(hub.url, keys, "b")
        world.heal(hub, region)
        await mirrored(hub, keys, "b")


async def mirrored(hub: Server, keys: NatsKeys, name: str) -> None:
    """The mirror is made, once the region's server has found the hub."""
    ends = time.monotonic() + FAR
    while True:
        with suppress(RegionError):
            assert await mirror(hub.url, keys, name) == 0
            return
        assert time.monotonic() < ends, "the region's server has not found the hub"


@pytest.mark.parametrize("name", ["hub", "", "a.b", "*", "B", "-b", "x" * 33])
def test_a_name_that_would_be_more_than_a_name_is_refused(name: str) -> None:
    with pytest.raises(RegionError, match="is no name of a region"):
        checked(name)
