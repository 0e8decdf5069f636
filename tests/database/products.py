"""Databases of products that were there before us (`existing/`), and how `pg_dump` writes them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from orchestrator_stub.local_supabase.postgres import binary
from tests.database.db import connect

PRODUCTS = Path(__file__).with_name("existing")


def make(dsn: str, name: str) -> list[str]:
    """A product's database; its tables and views, by name."""
    with connect(dsn) as db:
        db.execute((PRODUCTS / f"{name}.sql").read_bytes())
        found = db.execute(
            "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'v')"
            " order by relname"
        ).fetchall()
    return [relation for (relation,) in found]


def dump(dsn: str, relations: Sequence[str]) -> str:
    """What `pg_dump` writes of these, with owners, grants, policies, triggers and indexes."""
    chosen = [argument for name in relations for argument in ("--table", f"public.{name}")]
    return _pg_dump("--schema-only", *chosen, dsn)


def everything(dsn: str, *but: str) -> str:
    """The whole database, rows included, but for the schemas named."""
    return _pg_dump(*(f"--exclude-schema={schema}" for schema in but), dsn)


def _pg_dump(*arguments: str) -> str:
    done = subprocess.run([binary("pg_dump"), *arguments], check=True, capture_output=True, text=True)
    drawn_anew = ("\\restrict", "\\unrestrict")
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith(drawn_anew))
