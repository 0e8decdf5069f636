"""The tests' callers: the owner of everything, and the API's roles with a token's claims, as PostgREST does it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from agent.core.model import Digest, RelPath, tree_hash

Json = dict[str, Any]


def connect(dsn: str) -> psycopg.Connection[tuple[Any, ...]]:
    return psycopg.connect(dsn, autocommit=True)


@dataclass(frozen=True)
class Project:
    """A project and its people, made for one test."""

    id: uuid.UUID
    owner: uuid.UUID
    collaborator: uuid.UUID
    stranger: uuid.UUID


def make_project(db: psycopg.Connection[Any]) -> Project:
    owner, collaborator, stranger = (make_user(db) for _ in range(3))
    row = db.execute("insert into public.projects (owner_id) values (%s) returning id", [owner]).fetchone()
    assert row
    db.execute(
        "insert into public.project_collaborators (project_id, user_id, added_by) values (%s, %s, %s)",
        [row[0], collaborator, owner],
    )
    return Project(row[0], owner, collaborator, stranger)


def make_user(db: psycopg.Connection[Any]) -> uuid.UUID:
    user = uuid.uuid4()
    db.execute("insert into auth.users (id, email) values (%s, %s)", [user, f"{user}@example.com"])
    db.execute("insert into public.user_profiles (id, display_name) values (%s, 'somebody')", [user])
    return user


@contextmanager
def acting_as(db: psycopg.Connection[Any], role: str, **claims: object) -> Iterator[psycopg.Connection[Any]]:
    """One transaction as `role` with these claims, reached through `authenticator` as PostgREST does."""
    with db.transaction():
        db.execute("set local session authorization authenticator")
        db.execute(
            "select set_config('role', %s, true), set_config('request.jwt.claims', %s, true)",
            [role, json.dumps({"role": role, **claims}, default=str)],
        )
        yield db


@contextmanager
def user(db: psycopg.Connection[Any], sub: uuid.UUID) -> Iterator[psycopg.Connection[Any]]:
    """A signed-in person, with the claims that Supabase Auth gives (`session_id` among them)."""
    with acting_as(db, "authenticated", sub=sub, session_id=uuid.uuid4(), aal="aal1") as connection:
        yield connection


def one(db: psycopg.Connection[Any], query: str, parameters: Sequence[object] = ()) -> Any:
    """The only value of the only row."""
    row = db.execute(query.encode(), parameters).fetchone()
    assert row is not None, query
    return row[0]


def upsert(
    db: psycopg.Connection[Any],
    project: uuid.UUID,
    path: str,
    content: str,
    *,
    file_type: str | None = None,
    expected: int | None = None,
    correlation: str | None = None,
    turn: str | None = None,
) -> Json:
    answer: Json = one(
        db,
        "select public.upsert_project_file(%s, %s, %s, %s, %s, %s, %s)",
        [project, path, content, file_type, expected, correlation, turn],
    )
    return answer


def delete(
    db: psycopg.Connection[Any],
    project: uuid.UUID,
    path: str,
    *,
    expected: int | None = None,
    correlation: str | None = None,
    turn: str | None = None,
) -> Json:
    answer: Json = one(
        db,
        "select public.delete_project_file(%s, %s, %s, %s, %s)",
        [project, path, expected, correlation, turn],
    )
    return answer


def apply(
    db: psycopg.Connection[Any],
    project: uuid.UUID,
    changes: object,
    *,
    correlation: str | None = None,
    turn: str | None = None,
) -> Json:
    answer: Json = one(
        db,
        "select public.apply_project_files(%s, %s::jsonb, %s, %s)",
        [project, json.dumps(changes), correlation, turn],
    )
    return answer


def begin(db: psycopg.Connection[Any], project: uuid.UUID, label: str | None = None, lease: int = 60) -> str:
    """A new turn's id."""
    answer: Json = one(db, "select public.begin_turn(%s, %s, %s)", [project, label, lease])
    assert set(answer) == {"turn_id", "expires_at"}
    return str(answer["turn_id"])


def end(
    db: psycopg.Connection[Any],
    project: uuid.UUID,
    turn: str,
    *,
    force: bool = False,
    correlation: str | None = None,
) -> Json:
    answer: Json = one(db, "select public.end_turn(%s, %s, %s, %s)", [project, turn, force, correlation])
    return answer


def abandon(db: psycopg.Connection[Any], project: uuid.UUID, turn: str) -> Json:
    answer: Json = one(db, "select public.abandon_turn(%s, %s)", [project, turn])
    return answer


def changes_since(
    db: psycopg.Connection[Any],
    project: uuid.UUID,
    epoch: str,
    revision: int,
    paths: list[str] | None = None,
    max_bytes: int | None = None,
) -> Json:
    answer: Json = one(
        db, "select public.changes_since(%s, %s, %s, %s, %s)", [project, epoch, revision, paths, max_bytes]
    )
    return answer


def head(db: psycopg.Connection[Any], project: uuid.UUID) -> tuple[str, int]:
    row = db.execute(
        "select epoch::text, revision from public.project_heads where project_id = %s", [project]
    ).fetchone()
    assert row
    return row[0], row[1]


def files(db: psycopg.Connection[Any], project: uuid.UUID) -> dict[str, str]:
    """The current tree: path → hash."""
    return dict(
        db.execute(
            "select file_path, content_hash from public.project_files_current where project_id = %s",
            [project],
        ).fetchall()
    )


def hash_of(tree: Mapping[str, str]) -> str:
    """The agent's hash of a path → hash tree."""
    return tree_hash({RelPath(path): Digest(digest) for path, digest in tree.items()})


def messages(db: psycopg.Connection[Any], project: uuid.UUID) -> list[tuple[str, Json]]:
    """What was broadcast on the project's topic, by revision."""
    rows = db.execute(
        "select event, payload, private from realtime.messages where topic = %s and extension = 'broadcast'"
        " order by (payload->>'revision')::bigint",
        [f"project:{project}"],
    ).fetchall()
    assert all(private for _, _, private in rows)
    return [(event, payload) for event, payload, _ in rows]


def shape(dsn: str) -> list[str]:
    """Everything that `public` and `preview` are made of, as text that can be compared."""
    queries = {
        "column": "select table_schema, table_name, column_name, data_type, is_nullable, column_default, collation_name"
        " from information_schema.columns where table_schema in ('public', 'preview')",
        "constraint": "select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint"
        " where connamespace in ('public'::regnamespace, 'preview'::regnamespace)"
        " and contype <> 'n'",  # the name of a not-null constraint, from PostgreSQL 18 on; columns say it anyway
        "index": "select schemaname, indexname, indexdef from pg_indexes where schemaname in ('public', 'preview')",
        "function": "select oid::regprocedure::text, pg_get_functiondef(oid), proacl::text from pg_proc"
        " where pronamespace in ('public'::regnamespace, 'preview'::regnamespace)",
        "policy": "select schemaname, tablename, policyname, permissive, roles::text, cmd, qual, with_check"
        " from pg_policies",
        "trigger": "select tgrelid::regclass::text, tgname, pg_get_triggerdef(oid) from pg_trigger"
        " where not tgisinternal",
        "view": "select schemaname, viewname, definition from pg_views where schemaname in ('public', 'preview')",
        "relation": "select oid::regclass::text, relkind::text, relacl::text, relrowsecurity, reloptions::text"
        " from pg_class where relnamespace in ('public'::regnamespace, 'preview'::regnamespace) "
        " and relkind in ('r', 'v', 'm', 'S')",
        "bucket": "select id, public, file_size_limit from storage.buckets",
    }
    with connect(dsn) as db:
        return sorted(
            f"{kind}: {row}"
            for kind, query in queries.items()
            for row in db.execute(query.encode()).fetchall()
        )
