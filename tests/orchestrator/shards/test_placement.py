"""Which database an id is on: the same in Python, SQL and the front's configuration, and never another one later."""

from __future__ import annotations

from uuid import RFC_4122, UUID

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.shards.placement import id_of_shard, shard_of, shards_of
from tests.docs.reading import ROOT, blocks
from tests.orchestrator.shards.front import shard_by_front

DOC = ROOT / "docs" / "scale" / "README.md"

IDS = (
    st.uuids()
    | st.uuids(version=4)
    | st.uuids(version=1)
    | st.builds(id_of_shard, st.integers(0, 255), st.uuids())
)


@given(st.integers(0, 255), st.uuids())
def test_an_id_that_is_made_for_a_database_is_on_it(shard: int, random: UUID) -> None:
    made = id_of_shard(shard, random)
    assert shard_of(made) == shard
    assert made.version == (8 if random.variant == RFC_4122 else None)
    # What is left of it is as random as it was.
    assert [at for at in range(32) if made.hex[at] != random.hex[at] and at not in (12, 30, 31)] == []


@given(st.uuids(version=4) | st.uuids(version=1) | st.uuids(version=5))
def test_whatever_was_there_before_is_on_the_first(id: UUID) -> None:
    assert shard_of(id) == 0


def test_sql_and_the_front_say_the_same(module_database: str) -> None:
    with psycopg.connect(module_database, autocommit=True) as connection:

        @given(IDS)
        def same(id: UUID) -> None:
            row = connection.execute("select preview.shard_of(%s)", [id]).fetchone()
            assert row == (shard_of(id),)
            assert shard_by_front(str(id)) == (shard_of(id) if shard_of(id) == 1 else 0)
            assert shard_by_front(str(id).upper()) == shard_by_front(str(id))

        same()
        made = connection.execute("select preview.id_of_shard(n) from generate_series(0, 255) n").fetchall()
        assert [shard_of(id) for (id,) in made] == [*range(256)]
        for wrong in (-1, 256):
            with pytest.raises(psycopg.errors.DataError):
                connection.execute("select preview.id_of_shard(%s)", [wrong])


def test_the_products_table_makes_ids_of_its_database_and_takes_no_others(database: str) -> None:
    """The SQL of the page, then what a user may do by it, and the id of a session of what was made."""
    [statement] = [block.text for block in blocks(DOC) if block.lang == "pgsql"]
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(statement.encode())
        [(user,)] = connection.execute("insert into auth.users (id) values (gen_random_uuid()) returning id")
        connection.execute("insert into public.user_profiles (id, display_name) values (%s, 'u')", [user])
        with connection.transaction():
            connection.execute("select set_config('request.jwt.claims', %s, true)", [f'{{"sub": "{user}"}}'])
            connection.execute("set local role authenticated")
            insert = "insert into public.projects (owner_id, name) values (%s, 'p')"
            connection.execute(insert, [user])
        [(project,)] = connection.execute("select id from public.projects")
        assert shard_of(project) == 1
        connection.execute("select preview.give_head(%s)", [project])
        made = connection.execute(
            "insert into preview.sessions (project_id, expires_at) values (%s, now()) returning id", [project]
        )
        assert [shard_of(id) for (id,) in made] == [1]
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(
                "insert into public.projects (id, owner_id) values (gen_random_uuid(), %s)", [user]
            )


@pytest.mark.parametrize(
    ("urls", "own", "says"),
    [
        (["http://a", "http://b"], "http://c", "PUBLIC_URL"),
        (["http://a", "http://a/"], "http://a", "twice"),
        ([f"http://a{n}" for n in range(257)], "http://a0", "256"),
    ],
)
def test_what_cannot_be_meant_is_refused(urls: list[str], own: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        shards_of(urls, own)


def test_the_place_in_the_list_is_the_number() -> None:
    shards = shards_of(["http://a/", "http://b"], "http://b/")
    assert shards is not None
    assert (shards.own, shards.url_of(0), shards.url_of(2)) == (1, "http://a", None)
    assert shards_of([], "http://a") is None
