from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.database.db import Project, connect, make_project


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection[Any]]:
    """The owner's connection to a fresh database, each statement its own transaction."""
    with connect(database) as connection:
        yield connection


@pytest.fixture
def project(db: psycopg.Connection[Any]) -> Project:
    return make_project(db)
