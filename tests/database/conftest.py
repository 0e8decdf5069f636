from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.database.db import Project, connect, make_project

CLEAN = b"""
    delete from public.projects;
    delete from preview.deleted_projects;
    delete from public.user_profiles;
    delete from auth.users;
    delete from realtime.messages;
    delete from storage.objects;
    delete from preview.settings;
    insert into preview.settings default values;
"""


@pytest.fixture(scope="session")
def shared_database(postgres_dsn: str, template_database: str) -> Iterator[str]:
    name = f"preview_shared_{uuid.uuid4().hex[:8]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        server.execute(
            sql.SQL("create database {} template {}").format(
                sql.Identifier(name), sql.Identifier(template_database)
            )
        )
        yield make_conninfo(postgres_dsn, dbname=name)
        server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def database(shared_database: str) -> Iterator[str]:
    """One database for all of these tests, emptied after each: many times cheaper than one for each."""
    yield shared_database
    with connect(shared_database) as db:
        db.execute(CLEAN)


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection[Any]]:
    """The owner's connection, each statement its own transaction."""
    with connect(database) as connection:
        yield connection


@pytest.fixture
def project(db: psycopg.Connection[Any]) -> Project:
    return make_project(db)
