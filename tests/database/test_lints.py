"""The rules of Supabase's database linter (splinter) that apply, on our schemas, by our own queries.

Each rule is also shown something that breaks it: a rule that finds nothing anywhere proves nothing.
"""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.database.db import Project

Db = psycopg.Connection[Any]

OURS = "('public'::regnamespace, 'preview'::regnamespace)"

POLICIES = """
  select format('%s: %s', p.polrelid::regclass, p.polname) as policy, p.polrelid, p.polroles, p.polcmd, p.polpermissive,
         pg_get_expr(p.polqual, p.polrelid) as qual, pg_get_expr(p.polwithcheck, p.polrelid) as checked
  from pg_policy p
  join pg_class c on c.oid = p.polrelid
  where c.relnamespace in (
    'public'::regnamespace, 'preview'::regnamespace, 'realtime'::regnamespace, 'storage'::regnamespace)
"""

RULES = {
    "0001 foreign key without an index": f"""
        select conrelid::regclass::text || '.' || conname from pg_constraint k
        where contype = 'f' and connamespace in {OURS} and not exists (
          select from pg_index i where i.indrelid = k.conrelid and i.indisvalid and i.indpred is null
            and (i.indkey::int2[])[0:cardinality(k.conkey) - 1] @> k.conkey
            and (i.indkey::int2[])[0:cardinality(k.conkey) - 1] <@ k.conkey)""",
    "0003 auth function called for each row": rf"""
        select policy from ({POLICIES}) p
        where regexp_replace(concat_ws(' ', qual, checked), '\( SELECT (auth|realtime)\.\w+\(\)', '', 'g')
              ~ '(auth\.\w+|realtime\.topic|current_setting)\('""",
    "0004 no primary key": f"""
        select c.oid::regclass::text from pg_class c where c.relkind = 'r' and c.relnamespace in {OURS}
          and not exists (select from pg_index i where i.indrelid = c.oid and i.indisprimary)""",
    "0006 several permissive policies for the same": f"""
        select a.policy || ' / ' || b.policy from ({POLICIES}) a join ({POLICIES}) b
          on a.polrelid = b.polrelid and a.policy < b.policy and a.polpermissive and b.polpermissive
         and (a.polcmd = b.polcmd or '*' in (a.polcmd, b.polcmd))
         and (a.polroles && b.polroles or '{{0}}' in (a.polroles::text, b.polroles::text))""",
    "0009 the same index twice": f"""
        select a.indexrelid::regclass || ' / ' || b.indexrelid::regclass from pg_index a
        join pg_index b on a.indrelid = b.indrelid and a.indexrelid < b.indexrelid and a.indkey::text = b.indkey::text
          and a.indclass::text = b.indclass::text and a.indoption::text = b.indoption::text
          and pg_get_expr(a.indpred, a.indrelid) is not distinct from pg_get_expr(b.indpred, b.indrelid)
        join pg_class c on c.oid = a.indrelid where c.relnamespace in {OURS}""",
    "0010 view with its owner's rights": f"""
        select oid::regclass::text from pg_class where relkind = 'v' and relnamespace in {OURS}
          and not coalesce(reloptions @> '{{security_invoker=true}}', false)""",
    "0011 function with a search_path of the caller's": f"""
        select oid::regprocedure::text from pg_proc where pronamespace in {OURS}
          and not coalesce(proconfig && array['search_path=""', 'search_path='], false)""",
    "0013 row level security off": f"""
        select oid::regclass::text from pg_class where relkind in ('r', 'p') and relnamespace in {OURS}
          and not relrowsecurity""",
    "0024 policy that is always true": rf"""
        select policy from ({POLICIES}) p where polpermissive and (
          trim(qual, '() ') in ('true', '1 = 1') or trim(checked, '() ') in ('true', '1 = 1')
          or (qual is null and polcmd <> 'a') or (checked is null and polcmd = 'a'))""",
    "0025 public bucket that can be listed": """
        select b.id from storage.buckets b where b.public and exists (
          select from pg_policies p
          where p.schemaname = 'storage' and p.tablename = 'objects' and p.permissive = 'PERMISSIVE'
            and p.cmd in ('SELECT', 'ALL') and (
              p.qual ~ format('bucket_id = ''%s''', b.id)
              or p.qual in ('true', '(1 = 1)')))""",
    "0026 table that anon can see": f"""
        select oid::regclass::text from pg_class where relkind in ('r', 'v', 'm', 'f') and relnamespace in {OURS}
          and has_any_column_privilege('anon', oid, 'select')""",
    "0027 table that a signed-up user can see without a row of its own": f"""
        select c.oid::regclass::text from pg_class c
        where c.relkind = 'r' and c.relnamespace in {OURS}
          and has_any_column_privilege('authenticated', c.oid, 'select')
          and not exists (select from pg_policy p where p.polrelid = c.oid and p.polpermissive
                          and p.polcmd in ('r', '*') and 'authenticated'::regrole = any (p.polroles))""",
    "0028 definer function for anon": f"""
        select oid::regprocedure::text from pg_proc where prosecdef and pronamespace in {OURS}
          and has_function_privilege('anon', oid, 'execute')""",
    # As splinter has it, in the schema that the API exposes; test_access names those of the other, which policies ask.
    "0029 definer function for users": """
        select oid::regprocedure::text from pg_proc where prosecdef and pronamespace = 'public'::regnamespace
          and has_function_privilege('authenticated', oid, 'execute')""",
}

OFFENDERS = {
    "0001": "create table public.bad (id int primary key, other uuid references public.projects (id))",
    "0003": "create policy bad on public.projects for update to anon using (owner_id = auth.uid())",
    "0004": "create table public.bad (id int)",
    "0006": "create policy bad on public.project_files for select to authenticated using (false)",
    "0009": "create index bad on public.project_files (project_id)",
    "0010": "create view public.bad as select 1 as one",
    "0011": "create function public.bad() returns int language sql as 'select 1'",
    "0013": "create table public.bad (id int primary key)",
    "0024": "create policy bad on public.project_files for delete to authenticated using (true)",
    "0025": "update storage.buckets set public = true",
    "0026": "grant select on public.projects to anon",
    "0027": "grant select on preview.settings to authenticated",
    "0028": "create function public.bad() returns int language sql security definer as 'select 1'",
    "0029": "create function public.bad() returns int language sql security definer as 'select 1'",
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_finds_nothing_of_ours_and_finds_an_offender(db: Db, project: Project, rule: str) -> None:
    assert db.execute(RULES[rule].encode()).fetchall() == []
    with db.transaction(force_rollback=True):
        db.execute(OFFENDERS[rule[:4]].encode())
        assert db.execute(RULES[rule].encode()).fetchall() != []
