from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.system.scrape import Scraped, scrape
from tests.system.stack import Stack, copy_example


@pytest.fixture(scope="session")
def scraped(postgres_dsn: str, template_database: str) -> Iterator[Scraped]:
    """Both sides' metrics, scraped once for all that look at them."""
    name = "preview_scraped"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        made = sql.SQL("create database {} template {}")
        server.execute(made.format(sql.Identifier(name), sql.Identifier(template_database)))
        yield scrape(make_conninfo(postgres_dsn, dbname=name))
        server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One running stack for the tests of a module; each works on files of its own."""
    place = tmp_path_factory.mktemp("stack")
    running = Stack(copy_example(place / "app"), place / "state")
    try:
        yield running.start()
    finally:
        running.kill()


@pytest.fixture
def idle_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack that the test itself starts."""
    waiting = Stack(copy_example(tmp_path / "app"), tmp_path / "state")
    try:
        yield waiting
    finally:
        waiting.kill()
