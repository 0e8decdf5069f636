"""Fixtures that more than one directory of tests uses."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import structlog
from psycopg import sql
from psycopg.conninfo import make_conninfo

from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.migrations import bootstrap, migrate
from tests.profiles import examples

examples(100, 1_000).register_profile("project", examples(100, 1_000))
examples(100, 1_000).load_profile("project")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # Started in the background of a script, where shells ignore Ctrl-C. What is started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def log_configuration_of_before() -> Iterator[None]:
    """What a command that a test runs in this process says of logging ends with the test."""
    before = dict(structlog.get_config())
    yield
    if structlog.get_config() != before:
        structlog.configure(**before)


@pytest.fixture(scope="session")
def postgres_dsn() -> Iterator[str]:
    """One PostgreSQL for the test session, as superuser; `database` gives migrated databases on it.

    Embedded, unless PREVIEW_TEST_DATABASE_URL names another server (PostgreSQL 15 or newer, a superuser).
    Nothing it keeps is worth a disk flush, so it makes none.
    """
    given = os.environ.get("PREVIEW_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="preview-test-pg-") as directory, asyncio.Runner() as runner:
        server = EmbeddedPostgres(
            Path(directory) / "data",
            options={"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"},
        )
        dsn = runner.run(server.start())
        try:
            yield dsn
        finally:
            runner.run(server.stop())


@pytest.fixture(scope="session")
def template_database(postgres_dsn: str) -> Iterator[str]:
    """The name of a migrated database that nobody connects to."""
    name = f"preview_template_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        server.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        dsn = make_conninfo(postgres_dsn, dbname=name)

        async def prepare() -> None:
            await bootstrap(dsn)
            await migrate(dsn)

        asyncio.run(prepare())
        yield name
        server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@contextmanager
def fresh(postgres_dsn: str, template: str) -> Iterator[str]:
    """The DSN of a copy of `template`, dropped afterwards; like every copy that runs, with an id of its own."""
    name = f"preview_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        made = sql.SQL("create database {} template {}")
        server.execute(made.format(sql.Identifier(name), sql.Identifier(template)))
        dsn = make_conninfo(postgres_dsn, dbname=name)
        with psycopg.connect(dsn, autocommit=True) as copy:
            copy.execute("update preview.installation set id = gen_random_uuid()")
        yield dsn
        drop(server, name)


def drop(server: psycopg.Connection, name: str) -> None:
    """Drop a database, whoever is still connected to it.

    PostgreSQL sleeps for 100 ms when it meets a backend there, also one that is just ending, as those of the
    connections that a test closed last do. They are given a moment to end first: 25 ms a drop instead of 120.
    """
    connected = "select from pg_stat_activity where datname = %s"
    deadline = time.monotonic() + 0.05
    while server.execute(connected, (name,)).rowcount and time.monotonic() < deadline:
        time.sleep(0.002)
    server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def database(postgres_dsn: str, template_database: str) -> Iterator[str]:
    """The DSN of a fresh, migrated database."""
    with fresh(postgres_dsn, template_database) as dsn:
        yield dsn


@pytest.fixture
def other_database(postgres_dsn: str, template_database: str) -> Iterator[str]:
    """The DSN of another one."""
    with fresh(postgres_dsn, template_database) as dsn:
        yield dsn


@pytest.fixture
def blank(postgres_dsn: str) -> Iterator[str]:
    """A database that Supabase has just made: its parts, none of ours."""
    name = f"preview_blank_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        server.execute(f"create database {name}".encode())
        dsn = make_conninfo(postgres_dsn, dbname=name)
        assert asyncio.run(bootstrap(dsn))
        yield dsn
        drop(server, name)


@pytest.fixture(scope="module")
def module_database(postgres_dsn: str, template_database: str) -> Iterator[str]:
    """The DSN of a database that was fresh when the module's first test began."""
    with fresh(postgres_dsn, template_database) as dsn:
        yield dsn
