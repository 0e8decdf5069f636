"""Examines a deployment of several databases: each project on the one that its id says, and all of one opinion."""

from __future__ import annotations

from uuid import uuid4

import httpx
import psycopg

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.database import CONNECT_SECONDS
from orchestrator_stub.doctor.findings import Report
from orchestrator_stub.shards.placement import Shards, id_of_shard, shards_of


async def examine_shards(settings: Settings, http: httpx.AsyncClient, report: Report) -> None:
    """Ask our database for what does not belong there, and each other orchestrator whom it takes itself and us for."""
    try:
        shards = shards_of(settings.shards, settings.agent_facing_url)
    except ValueError as error:
        report.bad(str(error), "see SHARDS and PUBLIC_URL")
        return
    if shards is None:
        report.ok("one database has all projects")
        return
    await _projects(settings, shards, report)
    for number, url in enumerate(shards.urls):
        if number != shards.own:
            await _other(number, url, shards, http, report)


async def _projects(settings: Settings, shards: Shards, report: Report) -> None:
    query = "select project_id from public.project_heads where preview.shard_of(project_id) <> %s limit 1"
    try:
        async with await psycopg.AsyncConnection.connect(
            settings.database_url.get_secret_value(), autocommit=True, connect_timeout=CONNECT_SECONDS
        ) as connection:
            strange = await (await connection.execute(query, (shards.own,))).fetchone()
    except psycopg.Error as error:
        report.skip(f"the database cannot be asked for its projects: {type(error).__name__}")
        return
    if strange is None:
        report.ok(f"this is database {shards.own} of {len(shards.urls)}, and every project's id says so")
    else:
        report.bad(
            f"project {strange[0]} is on database {shards.own}, and its id is another's: nobody is sent here for it",
            "make ids with preview.id_of_shard, and have the table check them (docs/scale)",
        )


async def _other(number: int, url: str, shards: Shards, http: httpx.AsyncClient, report: Report) -> None:
    """Whether it takes an id of its own for its own (401, nobody is shown), and sends one of ours to us (421)."""
    theirs, ours = (id_of_shard(each, uuid4()) for each in (number, shards.own))
    try:
        own, sent = [await http.get(f"{url}/v1/sessions/{id}", timeout=8) for id in (theirs, ours)]
    except httpx.HTTPError as error:
        report.bad(f"{url} does not answer: {type(error).__name__}", "see SHARDS, and whether it runs")
        return
    if own.status_code == 401 and sent.status_code == 421 and _url_of(sent) == shards.urls[shards.own]:
        report.ok(f"{url} is database {number}, and knows us")
    else:
        report.bad(
            f"{url} is not database {number}, or does not know this one",
            "give all orchestrators the same SHARDS, in the same order",
        )


def _url_of(answer: httpx.Response) -> object:
    try:
        said = answer.json()
    except ValueError:
        return None
    return said.get("url") if isinstance(said, dict) else None
