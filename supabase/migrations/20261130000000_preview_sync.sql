-- All of preview-sync's schema, as one migration: it is there as a whole, or not at all, with `preview-orchestrator migrate` and
-- with the Supabase CLI, both of which run one file in one transaction. From here on: forward only, a file for each change.
--
-- What is there before is somebody's product. A table that is there is never altered, renamed, re-granted, or given a
-- trigger, a policy or an index: foreign keys of ours refer to `public.projects`, and what we need to know of it is asked through
-- functions (see "who may do what"). `projects` and `user_profiles` are made only where they are missing.
--
-- Sections: the check · people and projects · paths · heads · files · who may do what · settings · writing · reading · history and
-- snapshots · the control plane's state · deletion · row level security · realtime and storage · fitted to the product · adoption
--
-- On a live database: everything large here is new and empty, and the foreign keys to tables that are there come from empty
-- tables, which scan nothing. Should a long query hold one of them, the lock_timeout makes us the one who gives up.
set local lock_timeout = '2s';

-- ------------------------------------------------------------------------------------------------ the check
-- Everything that is needed, looked at before anything changes, and every problem said at once with its remedy. It reads
-- alone: `preview-orchestrator migrate --check` runs this statement, and no other, in a read-only transaction.
do $check$
declare
  problems text[] := '{}';
  missing text[];
  projects oid := to_regclass('public.projects');
  profiles oid := to_regclass('public.user_profiles');
  handed_over oid := to_regclass('preview.project_files');
  found record;
  columns text[];
begin
  if current_setting('server_version_num')::int < 150000 then
    problems := problems || format('PostgreSQL %s is too old: use 15 or newer', current_setting('server_version'));
  end if;
  if getdatabaseencoding() <> 'UTF8' then
    problems := problems || format('the database''s encoding is %s: make one with encoding UTF8', getdatabaseencoding());
  end if;

  -- Without this, nothing below can even be looked at.
  select problems || coalesce(array_agg(format('%s may not use the schema %I: grant usage on schema %2$I to %1$I;', current_user, name)
                                        order by name), '{}') into problems
  from unnest(array['auth', 'preview', 'public', 'realtime', 'storage', 'supabase_migrations']) name
  where to_regnamespace(name) is not null and not has_schema_privilege(name, 'usage');
  if cardinality(problems) > 0 then
    raise exception using errcode = '55000',
      message = E'preview-sync cannot be installed here yet, and nothing was changed:\n- ' || array_to_string(problems, E'\n- ');
  end if;

  -- The platform.
  select array_agg(needed order by n) into missing from unnest(array[
    'auth.users', 'realtime.messages', 'storage.buckets', 'storage.objects']) with ordinality t(needed, n)
  where to_regclass(needed) is null;
  select missing || array_agg(needed order by n) into missing from unnest(array[
    'auth.uid()', 'auth.jwt()', 'auth.role()', 'realtime.topic()', 'realtime.send(jsonb,text,text,boolean)',
    'storage.foldername(text)']) with ordinality t(needed, n)
  where to_regprocedure(needed) is null;
  select missing || array_agg('the role ' || needed order by n) into missing
  from unnest(array['anon', 'authenticated', 'service_role', 'authenticator']) with ordinality t(needed, n)
  where not exists (select from pg_roles where rolname = needed);
  if cardinality(missing) > 0 then
    problems := problems || format(
      'this is not Supabase''s database, %s missing: on a plain PostgreSQL run `preview-orchestrator migrate --bootstrap`',
      array_to_string(missing, ', ') || case cardinality(missing) when 1 then ' is' else ' are' end);
  end if;

  -- An earlier version's work, which did alter what it found.
  if to_regclass('supabase_migrations.schema_migrations') is not null then
    select string_agg(quote_literal(m.version), ', ' order by m.version) as versions into found
    from supabase_migrations.schema_migrations m
    where (m.version, m.name) in (
      ('20261120000000', 'project_files'), ('20261120000100', 'writing'), ('20261120000200', 'following'),
      ('20261120000300', 'access'), ('20261120000400', 'history'), ('20261120000500', 'adopt_legacy'),
      ('20261124000000', 'preview_sessions'), ('20261124000100', 'snapshot_offers'), ('20261128000000', 'traceparent'),
      ('20261128000100', 'idempotency_key_of_a_project'));
    if found.versions is not null then
      -- Everything else below would only be its consequence.
      raise exception using errcode = '55000', message = concat_ws(E'\n',
        'preview-sync cannot be installed here yet, and nothing was changed:',
        '- an unreleased earlier version migrated this database: a local state starts anew (delete its directory, .preview-sync); '
        'a product''s database is first put back with these statements, where `user_id` is what the column was called before:',
        (select string_agg('    ' || statement, E'\n' order by n) from (
          select 0 as n, 'alter schema preview rename to preview_before; create schema preview; alter table public.project_files '
            'set schema preview;  -- its files are adopted' as statement
          where to_regclass('public.project_files') is not null
          union all
          select 1, format('drop trigger %I on %s;', t.tgname, t.tgrelid::regclass) from pg_trigger t
          where t.tgrelid = projects and t.tgname = 'give_head'
          union all
          select 2, format('drop policy %I on %s;', p.polname, p.polrelid::regclass) from pg_policy p
          where p.polrelid in (projects, profiles, to_regclass('storage.objects'), to_regclass('realtime.messages')) and p.polname in (
            'a profile is its user''s', 'members see their projects', 'a project is made by its owner',
            'the owner changes the project', 'the owner deletes the project', 'a container''s token reads no table',
            'a container hears its project', 'members hear their projects', 'members read assets', 'members add assets')
          union all
          select 3, format('drop function %s cascade;', string_agg(p.oid::regprocedure::text, ', ')) from pg_proc p
          where p.pronamespace = 'public'::regnamespace and p.proname in (
            'upsert_project_file', 'delete_project_file', 'apply_project_files', 'restore_project_file', 'list_current_files',
            'project_tree_hash', 'changes_since', 'create_project_snapshot', 'prune_project_history', 'new_project_epoch')
          having count(*) > 0
          union all
          select 4, 'drop view if exists public.project_files_current, public.project_history; drop table if exists '
            'public.project_heads, public.project_snapshots cascade;'
          union all
          select 4, 'alter table public.project_collaborators set schema preview_before;  -- to be added again afterwards'
          where to_regclass('public.project_collaborators') is not null
          union all
          select 5, format('drop index public.%I;', 'projects_owner_id_idx') where to_regclass('public.projects_owner_id_idx') is not null
          union all
          select 6, 'alter table public.projects rename column owner_id to user_id;' where exists (
            select from pg_attribute a where a.attrelid = projects and a.attname = 'owner_id' and not a.attisdropped)
          union all
          select 7, 'alter table public.projects rename constraint projects_owner_id_fkey to projects_user_id_fkey;' where exists (
            select from pg_constraint c where c.conrelid = projects and c.conname = 'projects_owner_id_fkey')
          union all
          select 5, 'revoke insert (id, owner_id, name), update (name) on public.projects from authenticated;' where projects is not null
          union all
          select 8, 'revoke insert (id, display_name), update (display_name) on public.user_profiles from authenticated;' where exists (
            select from pg_attribute a where a.attrelid = profiles and a.attname = 'display_name' and not a.attisdropped)
          union all
          select 9, format('grant all on %s to anon, authenticated, service_role;  -- or what you had granted', t.relation::regclass)
          from unnest(array[projects, profiles]) t(relation) where t.relation is not null
          union all
          select 10, format('alter table %s disable row level security;  -- only if it was off', t.relation::regclass)
          from unnest(array[projects, profiles]) t(relation) where t.relation is not null
          union all
          select 11, 'alter table public.user_profiles drop column display_name;  -- only if you had none' where exists (
            select from pg_attribute a where a.attrelid = profiles and a.attname = 'display_name' and not a.attisdropped)
          union all
          select 12, format('delete from supabase_migrations.schema_migrations where version in (%s);', found.versions)
        ) back));
    end if;
  end if;

  -- The product's projects.
  if projects is not null then
    select a.attname as id, format_type(a.atttypid, null) as type, c.relkind into found
    from pg_class c left join pg_attribute a on a.attrelid = c.oid and a.attname = 'id' and a.attnum > 0 and not a.attisdropped
    where c.oid = projects;
    if found.relkind not in ('r', 'p') then
      problems := problems || 'public.projects is not a table, and foreign keys need one: rename it, or make it one'::text;
    elsif found.id is null then
      problems := problems || 'public.projects has no column id: it must have one, of type uuid'::text;
    elsif found.type <> 'uuid' then
      problems := problems || format('public.projects.id is %s, and must be uuid: preview-sync names projects by uuid in tokens, '
                                     'topics and paths', found.type);
    else
      if not exists (
        select from pg_index i where i.indrelid = projects and i.indisunique and i.indisvalid and i.indimmediate
          and i.indpred is null and i.indnkeyatts = 1
          and i.indkey[0] = (select attnum from pg_attribute where attrelid = projects and attname = 'id')
      ) then
        problems := problems || 'public.projects.id is not unique by itself: alter table public.projects add unique (id);'::text;
      end if;
      if not has_column_privilege(current_user, projects, 'id', 'references') then
        problems := problems || format('%s may not refer to public.projects: grant references on public.projects to %I;',
                                       current_user, current_user);
      end if;
      if not has_table_privilege(current_user, projects, 'select') then
        problems := problems || format('%s may not read public.projects: grant select on public.projects to %I;',
                                       current_user, current_user);
      elsif row_security_active(projects) then
        problems := problems || format('row level security hides public.projects from %s: migrate as its owner, or as a role '
                                       'with bypassrls (on Supabase: postgres)', current_user);
      end if;
    end if;
  end if;
  if to_regclass('auth.users') is not null and not has_column_privilege(current_user, 'auth.users', 'id', 'references') then
    problems := problems || format('%s may not refer to auth.users: grant references on auth.users to %I;', current_user, current_user);
  end if;

  -- What the product says itself.
  for found in
    select p.oid::regprocedure::text as is, s.wanted, s.answers from pg_proc p
    join (values
      ('owner_of', 'preview.owner_of(uuid)', 'uuid', false), ('may_access', 'preview.may_access(uuid,uuid,text)', 'boolean', false),
      ('projects_of', 'preview.projects_of(uuid)', 'uuid', true)) s(name, wanted, answers, is_set) on p.proname = s.name
    where p.pronamespace = to_regnamespace('preview')
      and (p.oid is distinct from to_regprocedure(s.wanted) or p.prorettype <> s.answers::regtype or p.proretset <> s.is_set)
  loop
    problems := problems || format('%s is not what is asked: make it %s returning %s', found.is, found.wanted,
      case found.wanted when 'preview.projects_of(uuid)' then 'setof uuid' else found.answers end);
  end loop;

  -- Names that are taken.
  if to_regclass('public.project_files') is not null then
    problems := problems || 'public.project_files is there already, and is not altered: `preview-orchestrator migrate --adopt-files` '
      'takes its rows over, or rename it (by hand, for the Supabase CLI: create schema if not exists preview; alter table '
      'public.project_files set schema preview;)'::text;
  end if;
  if to_regclass('public.project_collaborators') is not null and to_regprocedure('preview.may_access(uuid,uuid,text)') is null then
    problems := problems || 'public.project_collaborators is there already: say who may do what, with preview.may_access(project uuid, '
      'who uuid, what text) returning boolean, or rename it'::text;
  end if;
  for found in
    select format('public.%s', name) as name from unnest(array[
      'project_files_current', 'project_heads', 'project_history', 'project_snapshots']) name
    where to_regclass('public.' || name) is not null
    union all
    select format('preview.%s', name) from unnest(array[
      'answers', 'deleted_projects', 'installation', 'legacy_rejects', 'sessions', 'settings', 'snapshot_offers', 'write_gate']) name
    where to_regclass('preview.' || name) is not null
    union all
    select format('the index public.%s', c.relname) from pg_index i join pg_class c on c.oid = i.indexrelid
    where c.relnamespace = 'public'::regnamespace and c.relname in (
      'project_collaborators_user_id_idx', 'project_collaborators_added_by_idx', 'project_files_project_id_idx',
      'project_files_project_id_file_path_idx', 'project_files_project_id_is_current_version_idx',
      'project_files_current_path_idx', 'project_files_current_revision_idx', 'project_files_parent_version_id_idx',
      'project_files_created_by_idx', 'project_files_last_modified_by_idx', 'project_snapshots_project_id_idx',
      'project_snapshots_requested_by_idx', 'project_snapshots_open_idx')
      and i.indrelid not in (select oid from pg_class where relnamespace = 'public'::regnamespace
                             and relname in ('project_files', 'project_collaborators', 'project_snapshots'))
    union all
    select format('the policy "%s" on %s', p.polname, p.polrelid::regclass) from pg_policy p
    where p.polrelid in (to_regclass('storage.objects'), to_regclass('realtime.messages')) and p.polname in (
      'a container''s token reads no table', 'a container hears its project', 'members hear their projects',
      'members read assets', 'members add assets')
    union all
    select p.oid::regprocedure::text from pg_proc p
    where p.pronamespace = 'public'::regnamespace and p.proname in (
      'upsert_project_file', 'delete_project_file', 'apply_project_files', 'restore_project_file', 'list_current_files',
      'project_tree_hash', 'changes_since', 'create_project_snapshot', 'prune_project_history', 'new_project_epoch')
    union all
    select p.oid::regprocedure::text from pg_proc p
    where p.pronamespace = to_regnamespace('preview') and p.proname in (
      'allows', 'announce_deletion', 'announce_snapshot_request', 'broadcast', 'entry_of', 'file_type_of', 'give_head',
      'my_projects', 'new_head', 'no_file_is_a_directory', 'owns', 'parents', 'path_problem', 'remember_deletion', 'rfc3339',
      'submit', 'there_is', 'traceparent', 'visible', 'write')
  loop
    problems := problems || format('%s is there already, and preview-sync makes one of that name: rename it', found.name);
  end loop;
  if to_regclass('storage.buckets') is null then
    null;  -- said above
  elsif not has_table_privilege('storage.buckets', 'select') or not has_table_privilege('storage.buckets', 'insert') then
    problems := problems || format('%s may not make buckets: grant select, insert on storage.buckets to %I;', current_user, current_user);
  else
    for found in select b.id from storage.buckets b where b.id in ('project-assets', 'project-snapshots') and b.public loop
      problems := problems || format('the bucket %s is public, and will hold the files of projects: update storage.buckets set '
                                     'public = false where id = %L;', found.id, found.id);
    end loop;
  end if;

  -- An older table of files that was handed over.
  if handed_over is not null then
    select array_agg(a.attname::text) into columns from pg_attribute a
    where a.attrelid = handed_over and a.attnum > 0 and not a.attisdropped;
    if not columns && array['project_id'] then
      problems := problems || 'preview.project_files has no column project_id: it cannot be adopted, move it back'::text;
    end if;
    if not columns && array['file_path', 'path', 'filename', 'name'] then
      problems := problems || 'preview.project_files has no column file_path, path, filename or name: it cannot be adopted, move it '
        'back'::text;
    end if;
    if not columns && array['content', 'code', 'source'] then
      problems := problems || 'preview.project_files has no column content, code or source: it cannot be adopted, move it back'::text;
    end if;
    if not has_table_privilege(current_user, handed_over, 'select') then
      problems := problems || format('%s may not read preview.project_files: grant select on preview.project_files to %I;',
                                     current_user, current_user);
    elsif row_security_active(handed_over) then
      problems := problems || format('row level security hides preview.project_files from %s: migrate as its owner', current_user);
    end if;
  end if;

  -- What the role that migrates may do.
  if to_regnamespace('preview') is null and not has_database_privilege(current_database(), 'create') then
    problems := problems || format('%s may not make a schema: grant create on database %I to %I;', current_user, current_database(),
                                   current_user);
  elsif to_regnamespace('preview') is not null and not has_schema_privilege('preview', 'create') then
    problems := problems || format('%s may not make anything in the schema preview: grant all on schema preview to %I;',
                                   current_user, current_user);
  end if;
  if not has_schema_privilege('public', 'create') then
    problems := problems || format('%s may not make anything in the schema public: grant create on schema public to %I;',
                                   current_user, current_user);
  end if;
  if not exists (select from pg_roles where rolname = 'preview_agent')
     and not (select rolcreaterole or rolsuper from pg_roles where rolname = current_user) then
    problems := problems || format('%s may not make the role preview_agent: create role preview_agent nologin noinherit;', current_user);
  end if;

  if cardinality(problems) > 0 then
    raise exception using errcode = '55000',
      message = E'preview-sync cannot be installed here yet, and nothing was changed:\n- ' || array_to_string(problems, E'\n- ');
  end if;
end $check$;

create schema if not exists preview;
comment on schema preview is 'What the API does not expose: the write path, its settings, and the control plane''s state.';
revoke all on schema preview from public;
grant usage on schema preview to authenticated, service_role;

-- The role of a preview container: it may read one realtime topic, and nothing else.
do $$
begin
  if not exists (select from pg_roles where rolname = 'preview_agent') then
    create role preview_agent nologin noinherit;
  end if;
exception when duplicate_object or unique_violation then
  null;  -- made by another database of the same server at the same moment
end $$;

-- ------------------------------------------------------------------------------------------------ people and projects
-- Made where there are none, and then with all that they need; a table that is there keeps everything as it is. Which of the
-- two it was is said by the comment, for what follows here and for later migrations.
--
-- Users do not choose a project's id: who could, could make the id of somebody else's deleted one.
do $$
declare
  profiles boolean := exists (
    select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = to_regclass('public.user_profiles') and i.indisunique and i.indpred is null and i.indnkeyatts = 1
      and a.attname = 'id' and a.atttypid = 'uuid'::regtype);
begin
  if to_regclass('public.projects') is not null then
    return;
  end if;
  if to_regclass('public.user_profiles') is null then
    create table public.user_profiles (
      id uuid primary key references auth.users (id) on delete cascade,
      created_at timestamptz not null default now(),
      display_name text
    );
    comment on table public.user_profiles is 'Made by preview-sync: people, as whoever saw them.';
    revoke all on public.user_profiles from public, anon, authenticated, service_role;
    grant select, insert (id, display_name), update (display_name) on public.user_profiles to authenticated;
    grant all on public.user_profiles to service_role;
    alter table public.user_profiles enable row level security;
    create policy "a profile is its user's" on public.user_profiles for all to authenticated
      using (id = (select auth.uid())) with check (id = (select auth.uid()));
    create policy "a container's token reads no table" on public.user_profiles as restrictive for all to authenticated
      using (not coalesce((select auth.jwt()) ? 'project_id', false));
    profiles := true;
  end if;
  create table public.projects (
    id uuid primary key default gen_random_uuid(),
    owner_id uuid not null,
    name text not null default 'untitled',
    created_at timestamptz not null default now()
  );
  execute format('alter table public.projects add foreign key (owner_id) references %s (id) on delete cascade',
                 case when profiles then 'public.user_profiles' else 'auth.users' end);
  comment on table public.projects is 'Made by preview-sync: projects and their owners.';
  create index on public.projects (owner_id);
  revoke all on public.projects from public, anon, authenticated, service_role;
  grant select, insert (owner_id, name), update (name), delete on public.projects to authenticated;
  grant all on public.projects to service_role;
  alter table public.projects enable row level security;
  create policy "a project is made by its owner" on public.projects for insert to authenticated
    with check (owner_id = (select auth.uid()));
  create policy "the owner changes the project" on public.projects for update to authenticated
    using (owner_id = (select auth.uid())) with check (owner_id = (select auth.uid()));
  create policy "the owner deletes the project" on public.projects for delete to authenticated
    using (owner_id = (select auth.uid()));
  create policy "a container's token reads no table" on public.projects as restrictive for all to authenticated
    using (not coalesce((select auth.jwt()) ? 'project_id', false));
end $$;

-- Who, beside its owner, may use a project; a product that says `preview.may_access` itself keeps its own list.
do $$
begin
  if to_regprocedure('preview.may_access(uuid,uuid,text)') is not null then
    return;
  end if;
  create table public.project_collaborators (
    project_id uuid not null,
    user_id uuid not null,
    added_by uuid,
    created_at timestamptz not null default now(),
    primary key (project_id, user_id)
  );
  create index project_collaborators_user_id_idx on public.project_collaborators (user_id);
  create index project_collaborators_added_by_idx on public.project_collaborators (added_by);
  comment on table public.project_collaborators is 'Who, beside the owner, reads and writes a project.';
end $$;

-- ------------------------------------------------------------------------------------------------ paths
-- Why a path may not be used; null: it may. The rules and their names are the agent's (protocol: file_path).
create function preview.path_problem(path text) returns text
language plpgsql immutable strict parallel safe set search_path = '' as $$
begin
  return case
    when path = '' then 'empty'
    when octet_length(path) > 1024 then 'too_long'
    when path ~ '[\u0001-\u001f\u007f-\u009f]' then 'control'
    when strpos(path, '\') > 0 then 'backslash'
    when left(path, 1) = '/' then 'absolute'
    when right(path, 1) = '/' or strpos(path, '//') > 0 then 'empty_segment'
    when path ~ '(^|/)\.\.?(/|$)' then 'dot_segment'
    when path ~ '(^|/)(node_modules|\.git|\.preview-sync)(/|$)' then 'protected'
    when octet_length(path) > 255 and exists (
      select from string_to_table(path, '/') as segment where octet_length(segment) > 255
    ) then 'segment_too_long'
    when octet_length(path) - octet_length(replace(path, '/', '')) >= 64 then 'too_deep'
    when path is not nfc normalized then 'not_nfc'
  end;
end $$;

-- Every directory above a path: `a/b/c` gives `a` and `a/b`.
create function preview.parents(path text) returns setof text
language sql immutable strict parallel safe rows 4 set search_path = '' as $$
  select array_to_string(segments[:depth], '/')
  from string_to_array(path, '/') as segments, generate_series(1, cardinality(segments) - 1) as depth
$$;

-- The seed's file_type, for writers that do not say it.
create function preview.file_type_of(path text) returns text
language plpgsql immutable strict parallel safe set search_path = '' as $$
begin
  return case lower(substring(path from '\.([^./]+)$'))
    when 'ts' then 'typescript' when 'tsx' then 'typescript' when 'mts' then 'typescript' when 'cts' then 'typescript'
    when 'js' then 'javascript' when 'jsx' then 'javascript' when 'mjs' then 'javascript' when 'cjs' then 'javascript'
    when 'json' then 'json' when 'md' then 'markdown' when 'sql' then 'sql' when 'css' then 'css' when 'html' then 'html'
    when 'svg' then 'svg' when 'yml' then 'yaml' when 'yaml' then 'yaml' when 'py' then 'python' when 'sh' then 'shell'
    else 'text'
  end;
end $$;

-- ------------------------------------------------------------------------------------------------ heads
-- Where a project's history stands. A writer holds this row's lock from the moment it takes a revision until it commits:
-- so revisions have no holes, and none is visible before a lower one.
--
-- This table refers to `public.projects`, and (but for the list of collaborators) the others refer here. So whatever we hold of a
-- project goes with this row, its deletion is learnt from it, and a save locks nothing of the product's.
create table public.project_heads (
  project_id uuid primary key references public.projects (id) on delete cascade,
  epoch uuid not null default gen_random_uuid(),
  revision bigint not null default 0 check (revision >= 0),
  -- Tombstones up to this revision may be gone: whoever stands below it cannot be told what was deleted.
  pruned_revision bigint not null default 0,
  -- The rate limit's window: the minute it belongs to, and the writes in it.
  window_start timestamptz not null default '-infinity',
  window_writes integer not null default 0,
  updated_at timestamptz not null default now()
) with (fillfactor = 50);  -- updated by every write: leave room on the page, so that no index is touched
comment on table public.project_heads is 'Epoch and revision of each project; the epoch names the history and changes when it is replaced.';

-- Projects that are gone, and whether what they left in Storage and Realtime is cleared away. An id stays here for ever and is not
-- used again: old tokens, open channels and signed URLs name a project by nothing else.
create table preview.deleted_projects (
  project_id uuid primary key,
  deleted_at timestamptz not null default now(),
  cleaned_at timestamptz,
  -- One orchestrator's turn at cleaning; another may take over once it has passed.
  claimed_until timestamptz
);
create index deleted_projects_to_clean on preview.deleted_projects (deleted_at) where cleaned_at is null;
alter table preview.deleted_projects enable row level security;
comment on table preview.deleted_projects is 'Ids that are not used again; cleaned_at: nothing of it is left in Storage and Realtime.';

create function preview.remember_deletion() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  if tg_op = 'TRUNCATE' then
    insert into preview.deleted_projects (project_id) select h.project_id from public.project_heads h on conflict do nothing;
  else
    insert into preview.deleted_projects (project_id) values (old.project_id) on conflict do nothing;
  end if;
  perform pg_notify('deleted_projects', '');
  return null;
end $$;
create trigger remember_deletion after delete on public.project_heads
  for each row execute function preview.remember_deletion();
create trigger remember_truncation before truncate on public.project_heads
  for each statement execute function preview.remember_deletion();

-- The head of a project, made when it is first needed. False: there is no such project, or its id is a deleted one's.
create function preview.give_head(project uuid) returns boolean
language plpgsql security definer set search_path = '' as $$
begin
  if exists (select from public.project_heads h where h.project_id = project) then
    return true;
  elsif project is null or exists (select from preview.deleted_projects d where d.project_id = project) then
    return false;
  end if;
  insert into public.project_heads (project_id) values (project) on conflict do nothing;
  return true;
exception when foreign_key_violation then
  return false;
end $$;

-- Projects of ours have a head from the start. On a product's table there is no trigger of ours.
create function preview.new_head() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  perform preview.give_head(new.id);
  return null;
end $$;
do $$
begin
  if obj_description('public.projects'::regclass) like 'Made by preview-sync%' then
    create trigger new_head after insert on public.projects for each row execute function preview.new_head();
  end if;
end $$;

-- ------------------------------------------------------------------------------------------------ files
-- Each row is one version of one file; rows are added, and the older one is marked superseded. A deletion is a version
-- too: a tombstone, current until the path is written again.
create table public.project_files (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  -- "C": by bytes, as the tree hash sorts, and so that everything below a directory is one range of the index.
  file_path text collate "C" not null,
  file_type text not null,
  content text,
  content_hash text,
  version integer not null default 1,
  parent_version_id uuid references public.project_files (id) on delete set null,
  is_current_version boolean not null default true,
  -- Whose key this is follows from the product: see "fitted to the product".
  created_by uuid,
  last_modified_by uuid,
  created_at timestamptz default now(),
  updated_at timestamptz default now(),
  -- Ours, on top of the seed.
  revision bigint not null,
  is_deleted boolean not null default false,
  size_bytes bigint not null default 0,
  encoding text not null default 'utf-8',
  executable boolean not null default false,
  unique (project_id, file_path, version),
  constraint project_files_path check (preview.path_problem(file_path) is null),
  constraint project_files_counts check (version >= 1 and revision >= 1 and size_bytes >= 0),
  constraint project_files_hash check (content_hash ~ '^[0-9a-f]{64}$'),
  constraint project_files_tombstone check (
    case when is_deleted then content is null and content_hash is null and size_bytes = 0
         else content_hash is not null end
  ),
  constraint project_files_encoding check (
    encoding in ('utf-8', 'base64') and (is_deleted or (encoding = 'utf-8') = (content is not null))
  )
);
comment on table public.project_files is 'Every version of every file. Written by the RPCs alone.';
comment on column public.project_files.revision is 'The commit of the project that made this version.';
comment on column public.project_files.content is
  'Null for a tombstone, and for a binary file: its bytes are project-assets/{project_id}/{content_hash}.';
comment on column public.project_files.created_by is 'Who made this version; its last_modified_by, once superseded, who did that.';

-- The seed's three. (The unique constraint's index would serve the first two; they are the contract.)
create index project_files_project_id_idx on public.project_files (project_id);
create index project_files_project_id_file_path_idx on public.project_files (project_id, file_path);
create index project_files_project_id_is_current_version_idx on public.project_files (project_id, is_current_version);
-- One current version for each path: what every write looks up, and what stops two.
create unique index project_files_current_path_idx on public.project_files (project_id, file_path) where is_current_version;
-- What became of a project since a revision: the read that catch-up is made of.
create index project_files_current_revision_idx on public.project_files (project_id, revision) where is_current_version;
create index project_files_parent_version_id_idx on public.project_files (parent_version_id);
create index project_files_created_by_idx on public.project_files (created_by);
create index project_files_last_modified_by_idx on public.project_files (last_modified_by);

create view public.project_files_current with (security_invoker = true) as
  select * from public.project_files where is_current_version and not is_deleted;
comment on view public.project_files_current is 'The files of today, tombstones left out.';

-- No current file may be a directory of another. Looked at after the whole statement, so that a bulk may turn a file into
-- a directory; the write path holds the project's head meanwhile, so two writers cannot each make one half of it.
--
-- Here and in the write path, a look-up by path reads `file_path >= x order by file_path limit 1` with sorting and table
-- scans switched off. Any index that begins with project_id could serve an equality; where most projects are small, the
-- planner takes them for equal, and in a large project reads all of it for each file of a bulk. Only an index by path can
-- give the order.
create function preview.no_file_is_a_directory() returns trigger
language plpgsql set search_path = '' set enable_sort = off set enable_seqscan = off as $$
declare
  upper_path text;
  lower_path text;
begin
  select found.upper_path, found.lower_path into upper_path, lower_path
  from written w
  cross join lateral (
    (select w.file_path as upper_path, below.file_path as lower_path
     from public.project_files below
     where below.project_id = w.project_id and below.is_current_version and not below.is_deleted
       and below.file_path > w.file_path || '/' and below.file_path < w.file_path || '0'  -- '0' follows '/' in ASCII
     order by below.file_path limit 1)
    union all
    (select above.file_path, w.file_path
     from preview.parents(w.file_path) as parent
     cross join lateral (
       select f.file_path, f.is_deleted from public.project_files f
       where f.project_id = w.project_id and f.is_current_version and f.file_path >= parent
       order by f.file_path limit 1
     ) above
     where above.file_path = parent and not above.is_deleted
     limit 1)
  ) as found
  where w.is_current_version and not w.is_deleted
  limit 1;
  if found then
    raise exception 'file_path %: a file of that name would be a directory of %', upper_path, lower_path
      using errcode = 'PT409',
            detail = jsonb_build_object('file_path', upper_path, 'in_the_way_of', lower_path)::text,
            hint = 'Delete one of the two in the same or an earlier write.';
  end if;
  return null;
end $$;
create trigger no_file_is_a_directory after insert on public.project_files
  referencing new table as written
  for each statement execute function preview.no_file_is_a_directory();

revoke all on function preview.path_problem, preview.parents, preview.file_type_of, preview.no_file_is_a_directory,
  preview.give_head, preview.new_head, preview.remember_deletion from public;
grant execute on function preview.give_head to service_role;

-- ------------------------------------------------------------------------------------------------ who may do what
-- Three questions about the product, each made from what is found unless the product brought its own before the migration:
--
--   preview.owner_of(project uuid) returns uuid                       who owns it; null: nobody
--   preview.may_access(project uuid, who uuid, what text) returns boolean    `what`: 'read' or 'write'
--   preview.projects_of(who uuid) returns setof uuid                  optional: the same as may_access (…, 'read'), but all at once
--
-- From a column owner_id, user_id or created_by of type uuid; then the owner and the collaborators may read and write. Without
-- such a column, collaborators whom the service role adds. `projects_of` is made only where an index leads from an owner to the
-- projects; without it, policies ask about one project at a time.
do $$
declare
  owner_column text := (
    select a.attname from pg_attribute a
    where a.attrelid = 'public.projects'::regclass and a.attname in ('owner_id', 'user_id', 'created_by')
      and a.atttypid = 'uuid'::regtype and not a.attisdropped
    order by array_position(array['owner_id', 'user_id', 'created_by'], a.attname::text) limit 1);
  by_index boolean := exists (
    select from pg_index i join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = 'public.projects'::regclass and i.indisvalid and i.indpred is null and a.attname = owner_column);
begin
  if to_regprocedure('preview.owner_of(uuid)') is null then
    execute format($f$
      create function preview.owner_of(project uuid) returns uuid language plpgsql stable set search_path = '' as $body$
      begin
        return %s;
      end $body$ $f$,
      case when owner_column is null then 'null'
           else format('(select p.%I from public.projects p where p.id = project)', owner_column) end);
    revoke all on function preview.owner_of from public;
  else
    by_index := false;
  end if;
  if to_regprocedure('preview.may_access(uuid,uuid,text)') is null then
    create function preview.may_access(project uuid, who uuid, what text) returns boolean
    language plpgsql stable set search_path = '' as $body$
    begin
      return preview.owner_of(project) = who
        or exists (select from public.project_collaborators c where c.project_id = project and c.user_id = who);
    end $body$;
    revoke all on function preview.may_access from public;
  else
    by_index := false;
  end if;
  if to_regprocedure('preview.projects_of(uuid)') is null and by_index then
    execute format($f$
      create function preview.projects_of(who uuid) returns setof uuid language plpgsql stable set search_path = '' as $body$
      begin
        return query select p.id from public.projects p where p.%I = who
          union all select c.project_id from public.project_collaborators c where c.user_id = who;
      end $body$ $f$, owner_column);
    revoke all on function preview.projects_of from public;
  end if;
end $$;

-- What the caller may do, for policies. These, and `my_projects`, are all that runs with higher rights at a user's word: a
-- product's table may be closed to users, so they cannot look for themselves. They answer about the caller alone, in a schema that
-- the API does not expose. A container's token may do nothing, and nobody may do anything with a deleted project's id.
create function preview.allows(project uuid, what text) returns boolean
language plpgsql stable security definer set search_path = '' as $$
declare
  me uuid := auth.uid();
begin
  return me is not null and not coalesce(auth.jwt() ? 'project_id', false)
    and coalesce(preview.may_access(project, me, what), false)
    and not exists (select from preview.deleted_projects d where d.project_id = project);
end $$;
create function preview.owns(project uuid) returns boolean
language plpgsql stable security definer set search_path = '' as $$
begin
  return coalesce(preview.owner_of(project) = auth.uid(), false);
end $$;
create function preview.my_projects() returns setof uuid
language plpgsql stable security definer set search_path = '' as $$
begin
  if auth.uid() is not null and not coalesce(auth.jwt() ? 'project_id', false) then
    return query select m from preview.projects_of(auth.uid()) m
      where not exists (select from preview.deleted_projects d where d.project_id = m);
  end if;
end $$;

-- Whether the caller sees the project at all; whoever no policy holds sees what there is.
create function preview.there_is(project uuid) returns boolean
language sql stable security definer set search_path = '' as $$
  select exists (select from public.projects p where p.id = project)
    and not exists (select from preview.deleted_projects d where d.project_id = project)
$$;
create function preview.visible(project uuid) returns boolean
language plpgsql stable security invoker set search_path = '' as $$
begin
  if row_security_active('public.project_files'::regclass) then
    return preview.allows(project, 'read');
  end if;
  return preview.there_is(project);
end $$;

revoke all on function preview.allows, preview.owns, preview.my_projects, preview.there_is, preview.visible from public;
grant execute on function preview.allows, preview.owns, preview.my_projects to authenticated;
grant execute on function preview.there_is to service_role;
grant execute on function preview.visible to authenticated, service_role;

-- ------------------------------------------------------------------------------------------------ settings
create table preview.settings (
  only_row boolean primary key default true check (only_row),
  -- Each write is at least one Realtime message, and the smallest plan carries 100 a second.
  writes_per_minute integer not null default 6000 check (writes_per_minute > 0),
  -- Realtime drops a payload above 256 KB without a word; `send` and the envelope add to ours.
  broadcast_limit_bytes integer not null default 200000 check (broadcast_limit_bytes > 0),
  -- What an editor and a dev server take as source; larger things are assets.
  max_file_bytes integer not null default 10485760 check (max_file_bytes > 0),
  max_bulk_files integer not null default 5000 check (max_bulk_files > 0),
  max_bulk_bytes integer not null default 67108864 check (max_bulk_bytes > 0),
  -- No machine lives longer; a tombstone younger than this is somebody's only word of a deletion.
  longest_session interval not null default '24 hours' check (longest_session >= '1 hour')
);
insert into preview.settings default values;
alter table preview.settings enable row level security;
comment on table preview.settings is 'One row: the limits of the write path, changed with update.';

-- The first answer to each correlation id, for whoever did not hear it and asks again.
create table preview.answers (
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  correlation_id text not null,
  answer jsonb not null,
  created_at timestamptz not null default now(),
  primary key (project_id, correlation_id)
);
create index answers_created_at_idx on preview.answers (created_at);
alter table preview.answers enable row level security;

-- ------------------------------------------------------------------------------------------------ the nouns
create type preview.change as (
  action text,            -- update | delete
  file_path text,
  file_type text,         -- null: kept, or by the name; `binary` for what is none of the texts
  content text,           -- null with a hash: a binary file in the project-assets bucket
  content_hash text,
  executable boolean,     -- null: as it was
  expected_version integer
);

-- A change beside what it meets: `changed` false is a repeat that needs no version.
create type preview.step as (
  action text,
  file_path text,
  file_type text,
  content text,
  content_hash text,
  encoding text,
  size_bytes bigint,
  executable boolean,
  id uuid,
  version integer,
  was_id uuid,
  was_version integer,
  was_there boolean,
  changed boolean
);

create function preview.rfc3339(moment timestamptz) returns text
language sql immutable strict parallel safe set search_path = '' as $$
  select to_char(moment at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
$$;

-- ------------------------------------------------------------------------------------------------ the broadcast
-- One entry of bulk:apply, and of the answer to catch-up (protocol). In PL/pgSQL, which keeps the expression ready: a function
-- in SQL with a search_path of its own is started anew for each row, and costs ten times as much.
create function preview.entry_of(
  file_path text, is_deleted boolean, content text, content_hash text, version integer, encoding text, executable boolean
) returns jsonb language plpgsql immutable parallel safe set search_path = '' as $$
begin
  if is_deleted then
    return jsonb_build_object('action', 'delete', 'file_path', file_path, 'version', version);
  end if;
  return jsonb_build_object('action', 'update', 'file_path', file_path, 'content', content, 'content_hash', content_hash,
                            'version', version, 'encoding', encoding)
         || case when executable then '{"executable": true}'::jsonb else '{}'::jsonb end;
end $$;

-- The W3C `traceparent` of the request, as PostgREST hands its headers on, or what the session set in
-- `preview.traceparent`; null without a valid one. By pattern and not as JSON: a header must not be able to end a save, and
-- a quote inside one is escaped, so that it cannot pass for another header's name.
create function preview.traceparent() returns text language plpgsql stable set search_path = '' as $$
declare
  form constant text := '00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}';
  own text := current_setting('preview.traceparent', true);
  headers text := current_setting('request.headers', true);
begin
  if own ~ ('^' || form || '$') then
    return own;
  end if;
  if strpos(headers, '"traceparent"') > 0 then
    return substring(headers from '"traceparent"\s*:\s*"(' || form || ')"');
  end if;
  return null;
end $$;

revoke all on function preview.traceparent() from public;

-- Tells the project's topic about one commit, inside its transaction: what is rolled back was never said. Above the limit
-- the contents go by reference; a bulk whose references are still too many is a doorbell, and the log says the rest.
create function preview.broadcast(
  project_uuid uuid, bulk boolean, steps preview.step[], head_epoch uuid, head_revision bigint, moment timestamptz,
  sender text, limit_bytes integer
) returns void language plpgsql set search_path = '' as $$
declare
  common jsonb := jsonb_build_object('timestamp', preview.rfc3339(moment), 'sender', sender,
                                     'revision', head_revision, 'epoch', head_epoch);
  trace text := preview.traceparent();
  step preview.step := steps[1];
  event text;
  message jsonb;
  content_bytes bigint;
begin
  if trace is not null then
    common := common || jsonb_build_object('traceparent', trace);
  end if;
  select coalesce(sum(octet_length(s.content)), 0) into content_bytes from unnest(steps) s;
  if bulk then
    event := 'bulk:apply';
    for by_reference in 0..1 loop
      continue when by_reference = 0 and content_bytes > limit_bytes;
      select common || jsonb_build_object('files', jsonb_agg(preview.entry_of(
        s.file_path, s.action = 'delete', case when by_reference = 0 then s.content end, s.content_hash, s.version,
        s.encoding, s.executable))) into message
      from unnest(steps) s;
      exit when octet_length(message::text) <= limit_bytes;
    end loop;
    if octet_length(message::text) > limit_bytes then
      message := common || '{"files": [], "complete": false}'::jsonb;
    end if;
  elsif step.action = 'delete' then
    event := 'file:delete';
    message := common || jsonb_build_object('file_path', step.file_path, 'version', step.version);
  else
    event := 'file:update';
    message := common || jsonb_build_object(
      'file_path', step.file_path, 'content', case when content_bytes <= limit_bytes then step.content end,
      'content_hash', step.content_hash, 'version', step.version, 'file_type', step.file_type,
      'size', step.size_bytes, 'encoding', step.encoding);
    if step.executable then
      message := message || '{"executable": true}'::jsonb;
    end if;
    if octet_length(message::text) > limit_bytes then
      message := message || '{"content": null}'::jsonb;
    end if;
  end if;
  perform realtime.send(message, event, 'project:' || project_uuid, true);
end $$;

-- ------------------------------------------------------------------------------------------------ writing
-- Three RPCs, one door, one function behind it. The RPCs run with the caller's rights and own nothing but the reading of their
-- arguments. They UPDATE the one row of the view `preview.write_gate`; the trigger behind it runs as the tables' owner, asks whether
-- the caller may, and does the writing. So there is no function that writes with higher rights which anybody may call, no
-- privilege to write to the tables, and no way past the versions, the revision, the limits and the broadcast. Whether row level
-- security holds the caller is the view's to say, in the row that they cannot change: the trigger would see its owner.
create view preview.write_gate with (security_invoker = true) as
  select null::uuid as project_id, null::preview.change[] as changes, null::boolean as bulk, null::text as correlation_id,
         null::jsonb as answer, not row_security_active('public.project_files'::regclass) as unrestricted;
comment on view preview.write_gate is
  'The door: `update … set project_id = …, changes = … returning answer`; changes null only asks where the project stands.';

-- Its plans are kept: planned anew for each array of changes, they would cost more than the write. What a plan must not
-- depend on is how the table was when it was made; so a look-up by path leaves no choice (see no_file_is_a_directory).
create function preview.write() returns trigger
language plpgsql security definer set search_path = ''
  set plan_cache_mode = 'force_generic_plan' set enable_seqscan = off set enable_sort = off as $$
declare
  limits preview.settings;
  head public.project_heads;
  author uuid;
  moment timestamptz;
  steps preview.step[];
  fresh preview.step[];
  bad record;
begin
  if not old.unrestricted then
    if auth.uid() is null or coalesce(auth.jwt() ? 'project_id', false) or not coalesce(preview.may_access(
      new.project_id, auth.uid(), case when new.changes is null then 'read' else 'write' end), false)
    then
      return null;  -- no row: the RPC says what a project that is not there is told
    end if;
  end if;
  if new.changes is null and preview.give_head(new.project_id) then
    select jsonb_build_object('project_id', h.project_id, 'epoch', h.epoch, 'revision', h.revision) into new.answer
    from public.project_heads h where h.project_id = new.project_id;
    if found then
      return new;
    end if;
  end if;
  select * into strict limits from preview.settings;

  -- Arguments first: whatever is wrong with them is said before anything is locked.
  if cardinality(new.changes) > limits.max_bulk_files then
    raise exception 'changes: % files in one write, at most % are taken', cardinality(new.changes), limits.max_bulk_files
      using errcode = 'PT413';
  end if;
  select c.file_path, preview.path_problem(c.file_path) as rule into bad
  from unnest(new.changes) c where preview.path_problem(c.file_path) is not null limit 1;
  if found then
    raise exception 'file_path %: not a path that a project can hold (%)', to_json(left(bad.file_path, 200)), bad.rule
      using errcode = 'PT400', detail = jsonb_build_object('file_path', left(bad.file_path, 1024), 'rule', bad.rule)::text;
  end if;
  select c.file_path, octet_length(c.content) as size into bad
  from unnest(new.changes) c where octet_length(c.content) > limits.max_file_bytes limit 1;
  if found then
    raise exception 'content of %: % bytes, at most % are taken', bad.file_path, bad.size, limits.max_file_bytes
      using errcode = 'PT413';
  end if;
  if new.bulk then
    select sum(octet_length(c.content)) as size into bad from unnest(new.changes) c;
    if bad.size > limits.max_bulk_bytes then
      raise exception 'changes: % bytes in one write, at most % are taken', bad.size, limits.max_bulk_bytes
        using errcode = 'PT413';
    end if;
    select c.file_path into bad from unnest(new.changes) c group by c.file_path having count(*) > 1 limit 1;
    if found then
      raise exception 'changes: % is named twice', bad.file_path using errcode = 'PT400';
    end if;
  end if;
  if new.bulk or (new.changes[1]).content is null then
    -- A binary file is its hash here; the bytes must be where readers will look for them.
    select c.file_path, c.content_hash into bad
    from unnest(new.changes) c
    where c.action = 'update' and c.content is null and not exists (
      select from storage.objects o
      where o.bucket_id = 'project-assets' and o.name = new.project_id || '/' || c.content_hash
    ) limit 1;
    if found then
      raise exception 'content of %: there is no object project-assets/%/%', bad.file_path, new.project_id, bad.content_hash
        using errcode = 'PT400', hint = 'Upload the bytes under their SHA-256 first.';
    end if;
  end if;

  -- From here on this is the project's only writer, until the transaction ends.
  select * into head from public.project_heads where project_id = new.project_id for no key update;
  if not found then
    if not preview.give_head(new.project_id) then
      if exists (select from preview.deleted_projects d where d.project_id = new.project_id) then
        raise exception 'project_uuid %: a project of this id was deleted, and its id is not used again', new.project_id
          using errcode = 'PT410', hint = 'Make the project under a new id.';
      end if;
      raise exception 'project_uuid %: no such project', new.project_id using errcode = 'PT404';
    end if;
    select * into strict head from public.project_heads where project_id = new.project_id for no key update;
  end if;
  moment := clock_timestamp();

  if new.correlation_id is not null then
    select a.answer into new.answer from preview.answers a
    where a.project_id = new.project_id and a.correlation_id = new.correlation_id;
    if found then
      return new;
    end if;
  end if;

  select c.file_path, c.expected_version, f.version, f.content_hash, f.is_deleted into bad
  from unnest(new.changes) c
  left join lateral (
    select at.file_path, at.version, at.content_hash, at.is_deleted from public.project_files at
    where at.project_id = new.project_id and at.is_current_version and at.file_path >= c.file_path
    order by at.file_path limit 1
  ) f on f.file_path = c.file_path
  where c.expected_version <> coalesce(f.version, 0)
    and not (c.expected_version = 0 and f.is_deleted)
  limit 1;
  if found then
    raise exception 'expected_version %: % is at version %', bad.expected_version, bad.file_path, coalesce(bad.version, 0)
      using errcode = 'PT409',
            detail = jsonb_build_object(
              'file_path', bad.file_path, 'version', coalesce(bad.version, 0), 'content_hash', bad.content_hash,
              'is_deleted', coalesce(bad.is_deleted, true), 'revision', head.revision, 'epoch', head.epoch)::text,
            hint = 'Read the current version, merge, and write again with its number.';
  end if;

  select array_agg(row(
           s.action, s.file_path, case when s.changed then s.file_type else coalesce(s.was_type, s.file_type) end, s.content, s.content_hash, s.encoding, s.size_bytes, s.executable,
           gen_random_uuid(), coalesce(s.was_version, 0) + s.changed::int, s.was_id, s.was_version, s.was_there, s.changed
         )::preview.step order by s.file_path collate "C")
  into steps
  from (
    select n.*, case n.action
                  when 'delete' then n.was_there
                  else not n.was_there or n.content_hash <> n.was_hash or n.executable <> n.was_executable
                end as changed
    from (
      select c.action, c.file_path, c.content,
             coalesce(
               c.file_type,
               case when c.action = 'delete' or f.encoding = case when c.content is null then 'base64' else 'utf-8' end
                    then f.file_type end,
               case when c.content is null then 'binary' else preview.file_type_of(c.file_path) end
             ) as file_type, f.file_type as was_type,
             case when c.action = 'delete' then null
                  when c.content is null then c.content_hash
                  else encode(sha256(convert_to(c.content, 'UTF8')), 'hex') end as content_hash,
             case when c.action = 'delete' then coalesce(f.encoding, 'utf-8')
                  when c.content is null then 'base64' else 'utf-8' end as encoding,
             case when c.action = 'delete' then 0
                  when c.content is null then (
                    select coalesce((o.metadata ->> 'size')::bigint, 0) from storage.objects o
                    where o.bucket_id = 'project-assets' and o.name = new.project_id || '/' || c.content_hash)
                  else octet_length(c.content) end as size_bytes,
             c.action = 'update' and coalesce(c.executable, f.executable and not f.is_deleted, false) as executable,
             f.id as was_id, f.version as was_version, f.content_hash as was_hash, f.executable as was_executable,
             coalesce(not f.is_deleted, false) as was_there
      from unnest(new.changes) c
      left join lateral (
        select at.id, at.file_path, at.file_type, at.encoding, at.version, at.content_hash, at.is_deleted, at.executable
        from public.project_files at
        where at.project_id = new.project_id and at.is_current_version and at.file_path >= c.file_path
        order by at.file_path limit 1
      ) f on f.file_path = c.file_path
    ) n
  ) s;

  select array_agg(s order by s.file_path collate "C") into fresh from unnest(steps) s where s.changed;
  if fresh is not null then
    update public.project_heads h
    set revision = h.revision + 1, updated_at = moment,
        window_start = date_trunc('minute', moment),
        window_writes = case when h.window_start = date_trunc('minute', moment) then h.window_writes + 1 else 1 end
    where h.project_id = new.project_id
    returning * into head;
    if head.window_writes > limits.writes_per_minute then
      raise exception 'project_uuid %: more than % writes in this minute', new.project_id, limits.writes_per_minute
        using errcode = 'PT429',
              detail = jsonb_build_object('retry_after', ceil(extract(epoch from
                head.window_start + interval '1 minute' - moment)))::text,
              hint = 'Wait for the next minute, or put many files into one apply_project_files.';
    end if;
    author := coalesce((select auth.uid()), preview.owner_of(new.project_id));

    update public.project_files f
    set is_current_version = false, updated_at = moment, last_modified_by = author
    where f.id = any (array(select s.was_id from unnest(fresh) s));

    insert into public.project_files (
      id, project_id, file_path, file_type, content, content_hash, version, parent_version_id, is_current_version,
      created_by, last_modified_by, created_at, updated_at, revision, is_deleted, size_bytes, encoding, executable)
    select s.id, new.project_id, s.file_path, s.file_type, s.content, s.content_hash, s.version, s.was_id, true,
           author, author, moment, moment, head.revision, s.action = 'delete', s.size_bytes, s.encoding, s.executable
    from unnest(fresh) s;

    perform preview.broadcast(new.project_id, new.bulk, fresh, head.epoch, head.revision, moment,
      coalesce((select auth.uid())::text, (select auth.role()), session_user::text), limits.broadcast_limit_bytes);
  end if;

  select jsonb_build_object(
    'project_id', new.project_id, 'epoch', head.epoch, 'revision', head.revision, 'changed', coalesce(cardinality(fresh), 0),
    'files', coalesce(jsonb_agg(jsonb_build_object(
      'id', case when s.changed then s.id else s.was_id end, 'action', s.action, 'file_path', s.file_path,
      'file_type', s.file_type, 'content_hash', s.content_hash, 'size_bytes', s.size_bytes, 'version', s.version,
      'is_deleted', s.action = 'delete', 'executable', s.executable, 'changed', s.changed)), '[]'::jsonb))
  into new.answer
  from unnest(steps) s;

  if new.correlation_id is not null then
    insert into preview.answers (project_id, correlation_id, answer, created_at)
    values (new.project_id, new.correlation_id, new.answer, moment);
  end if;
  return new;
end $$;
create trigger write instead of update on preview.write_gate for each row execute function preview.write();

-- The caller's way to the door, shared by the RPCs: hides from strangers whether the project exists.
create function preview.submit(project_uuid uuid, changes preview.change[], bulk boolean, correlation_id text)
returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  end if;
  if correlation_id = '' or octet_length(correlation_id) > 200 then
    raise exception 'p_correlation_id must have 1 to 200 bytes' using errcode = 'PT400';
  end if;
  update preview.write_gate g
  set project_id = project_uuid, changes = submit.changes, bulk = submit.bulk, correlation_id = submit.correlation_id
  returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;

-- ------------------------------------------------------------------------------------------------ the RPCs
create function public.upsert_project_file(
  project_uuid uuid, p_file_path text, p_content text, p_file_type text default null, expected_version integer default null,
  p_correlation_id text default null
) returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if p_file_path is null then
    raise exception 'p_file_path must not be null' using errcode = 'PT400';
  elsif p_content is null then
    raise exception 'p_content must not be null' using errcode = 'PT400',
      hint = 'A binary file goes through apply_project_files, by its content_hash; a deletion through delete_project_file.';
  elsif p_file_type = '' or octet_length(p_file_type) > 100 then
    raise exception 'p_file_type must have 1 to 100 bytes' using errcode = 'PT400';
  elsif expected_version < 0 then
    raise exception 'expected_version must not be negative' using errcode = 'PT400';
  end if;
  result := preview.submit(project_uuid, array[
    row('update', p_file_path, p_file_type, p_content, null, null, expected_version)::preview.change], false, p_correlation_id);
  return (result - 'files' - 'changed') || (result -> 'files' -> 0);
end $$;
comment on function public.upsert_project_file is
  'Write one text file. `expected_version` n: only if it is at n (0: only if it is not there); null: the last write wins.';

create function public.delete_project_file(
  project_uuid uuid, p_file_path text, expected_version integer default null, p_correlation_id text default null
) returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if p_file_path is null then
    raise exception 'p_file_path must not be null' using errcode = 'PT400';
  elsif expected_version < 0 then
    raise exception 'expected_version must not be negative' using errcode = 'PT400';
  end if;
  result := preview.submit(project_uuid, array[
    row('delete', p_file_path, null, null, null, null, expected_version)::preview.change], false, p_correlation_id);
  if result -> 'files' -> 0 ->> 'version' = '0' then
    raise exception 'p_file_path %: there was never such a file', to_json(p_file_path) using errcode = 'PT404';
  end if;
  return (result - 'files' - 'changed') || (result -> 'files' -> 0);
end $$;
comment on function public.delete_project_file is 'Delete one file, by a tombstone. Deleting it again changes nothing.';

create function public.apply_project_files(project_uuid uuid, changes jsonb, p_correlation_id text default null)
returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  parsed preview.change[];
  problem text;
begin
  if changes is null or jsonb_typeof(changes) <> 'array' then
    raise exception 'changes must be a JSON array of {action, file_path, …}' using errcode = 'PT400';
  end if;
  select format('changes[%s]%s', item.ordinality - 1, p.says) into problem
  from jsonb_array_elements(changes) with ordinality item
  cross join lateral (select case
    when jsonb_typeof(item.value) <> 'object' then ' must be an object'
    when coalesce(item.value ->> 'action', 'update') not in ('update', 'delete') then '.action must be update or delete'
    when jsonb_typeof(item.value -> 'file_path') is distinct from 'string' then '.file_path must be a string'
    when jsonb_typeof(item.value -> 'file_type') not in ('string', 'null')
      or item.value ->> 'file_type' = '' or octet_length(item.value ->> 'file_type') > 100
      then '.file_type must be a string of 1 to 100 bytes'
    when jsonb_typeof(item.value -> 'content') not in ('string', 'null') then '.content must be a string or null'
    when jsonb_typeof(item.value -> 'executable') not in ('boolean', 'null') then '.executable must be true or false'
    when jsonb_typeof(item.value -> 'expected_version') not in ('number', 'null')
      or item.value ->> 'expected_version' !~ '^\d{1,9}$' then '.expected_version must be a whole number, 0 or more'
    when coalesce(item.value ->> 'encoding', 'utf-8') not in ('utf-8', 'base64') then '.encoding must be utf-8 or base64'
    when jsonb_typeof(item.value -> 'content_hash') not in ('string', 'null')
      or item.value ->> 'content_hash' !~ '^[0-9a-f]{64}$' then '.content_hash must be a lower-case hex SHA-256'
    when item.value ->> 'action' = 'delete' then null
    when item.value ->> 'content' is null and item.value ->> 'content_hash' is null
      then ' must have content, or the content_hash of an object in project-assets'
    when item.value ->> 'content' is null and item.value ->> 'encoding' = 'utf-8'
      then '.content must not be null: only a binary file (encoding base64) goes by its hash'
    when item.value ->> 'content' is not null and item.value ->> 'encoding' = 'base64'
      then '.content must be null for a binary file: upload it to project-assets and give its content_hash'
    when item.value ->> 'content_hash' <> encode(sha256(convert_to(item.value ->> 'content', 'UTF8')), 'hex')
      then '.content_hash is not the hash of content'
  end) p(says)
  where p.says is not null
  limit 1;
  if problem is not null then
    raise exception '%', problem using errcode = 'PT400';
  end if;
  select coalesce(array_agg(row(
    coalesce(c.value ->> 'action', 'update'), c.value ->> 'file_path', c.value ->> 'file_type',
    case when c.value ->> 'action' is distinct from 'delete' then c.value ->> 'content' end,
    case when c.value ->> 'action' is distinct from 'delete' then c.value ->> 'content_hash' end,
    (c.value ->> 'executable')::boolean, (c.value ->> 'expected_version')::integer
  )::preview.change), '{}') into parsed
  from jsonb_array_elements(changes) c;
  return preview.submit(project_uuid, parsed, true, p_correlation_id);
end $$;
comment on function public.apply_project_files is
  'Write many files in one transaction, one revision, one message: all of them or none.';

-- ------------------------------------------------------------------------------------------------ who may knock
revoke all on preview.settings, preview.answers, preview.write_gate from public;
revoke all on function preview.rfc3339, preview.entry_of, preview.broadcast, preview.write, preview.submit from public;
revoke all on function public.upsert_project_file, public.delete_project_file, public.apply_project_files
  from public, anon, authenticated, service_role;

grant select, update (project_id, changes, bulk, correlation_id) on preview.write_gate to authenticated, service_role;
grant usage on type preview.change to authenticated, service_role;
grant execute on function preview.submit to authenticated, service_role;
grant execute on function public.upsert_project_file, public.delete_project_file, public.apply_project_files
  to authenticated, service_role;

-- ------------------------------------------------------------------------------------------------ reading
-- The current tree, and what became of it since a revision. With the caller's rights. Each is one statement with one snapshot,
-- and a writer's rows become visible together with its head: so the revision in an answer is exactly the tree in it.
create function public.list_current_files(project_uuid uuid)
returns table (
  file_path text, file_type text, content text, content_hash text, version integer, updated_at timestamptz,
  size_bytes bigint, encoding text, executable boolean
) language sql stable security invoker set search_path = '' as $$
  select f.file_path, f.file_type, f.content, f.content_hash, f.version, f.updated_at, f.size_bytes, f.encoding, f.executable
  from public.project_files_current f
  where f.project_id = project_uuid
  order by f.file_path
$$;
comment on function public.list_current_files is 'The files of today, by path. A binary file has content null.';

-- SHA-256 over `{file_path}\0{content_hash}\n` of all current files, sorted by the path's bytes (protocol: tree_hash).
create function public.project_tree_hash(project_uuid uuid) returns text
language sql stable security invoker set search_path = '' as $$
  select encode(sha256(coalesce(string_agg(
    convert_to(f.file_path, 'UTF8') || '\x00'::bytea || convert_to(f.content_hash, 'UTF8') || '\x0a'::bytea,
    ''::bytea order by f.file_path), ''::bytea)), 'hex')
  from public.project_files_current f
  where f.project_id = project_uuid
$$;

-- The answer to catch-up, in the session API's form:
--   { kind: "current", epoch, revision }
--   { kind: "changes", epoch, revision, base_revision, changes: [ as in bulk:apply ] }     the latest of each path
--   { kind: "snapshot", epoch, revision, reason }     epoch: another history · ahead: a revision that never was here
--                                                     too_old: below what was pruned · too_large: more than p_max_bytes
-- `p_paths`: these as well, however old their last change. `p_max_bytes`: of content, all changes together. A binary file
-- comes with content null; its bytes are project-assets/{project_id}/{content_hash}.
create function public.changes_since(
  project_uuid uuid, epoch text, revision bigint, p_paths text[] default null, p_max_bytes bigint default null
) returns jsonb language plpgsql stable security invoker set search_path = ''
  set plan_cache_mode = 'force_generic_plan'  -- planning costs more than reading
  set enable_sort = off  -- so that it is the index in the order asked for that is read (see no_file_is_a_directory)
as $$
#variable_conflict use_column
declare
  head public.project_heads;
  answer jsonb;
  total bigint;
begin
  if project_uuid is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  elsif changes_since.revision is null or changes_since.revision < 0 then
    raise exception 'revision must be 0 or more' using errcode = 'PT400';
  elsif cardinality(p_paths) > 5000 then
    raise exception 'p_paths: % paths, at most 5000 are taken', cardinality(p_paths) using errcode = 'PT413';
  end if;
  select * into head from public.project_heads h where h.project_id = project_uuid;
  if not found then
    if preview.visible(project_uuid) then  -- nobody wrote yet: there is no history to stand in
      return '{"kind": "snapshot", "reason": "epoch", "epoch": null, "revision": 0}';
    end if;
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  answer := jsonb_build_object('epoch', head.epoch, 'revision', head.revision);
  if changes_since.epoch is distinct from head.epoch::text then
    return answer || '{"kind": "snapshot", "reason": "epoch"}';
  elsif changes_since.revision > head.revision then
    return answer || '{"kind": "snapshot", "reason": "ahead"}';
  elsif changes_since.revision < head.pruned_revision then
    return answer || '{"kind": "snapshot", "reason": "too_old"}';
  elsif changes_since.revision = head.revision and coalesce(cardinality(p_paths), 0) = 0 then
    return answer || '{"kind": "current"}';
  end if;
  if p_max_bytes is not null then
    select sum(f.size_bytes) into total
    from (select c.size_bytes, c.encoding from public.project_files c
          where c.project_id = project_uuid and c.is_current_version and c.revision > changes_since.revision
          order by c.revision) f
    where f.encoding = 'utf-8';
    if total > p_max_bytes then
      return answer || '{"kind": "snapshot", "reason": "too_large"}';
    end if;
  end if;
  return answer || jsonb_build_object(
    'kind', 'changes', 'base_revision', changes_since.revision,
    'changes', (
      select coalesce(jsonb_agg(preview.entry_of(c.file_path, c.is_deleted, c.content, c.content_hash, c.version,
                                                 c.encoding, c.executable) order by c.revision, c.file_path), '[]')
      from (
        (select f.file_path, f.is_deleted, f.content, f.content_hash, f.version, f.encoding, f.executable, f.revision
         from public.project_files f
         where f.project_id = project_uuid and f.is_current_version and f.revision > changes_since.revision
         order by f.revision)
        union all
        select f.*
        from (select distinct path from unnest(p_paths) path) wanted
        cross join lateral (
          select at.file_path, at.is_deleted, at.content, at.content_hash, at.version, at.encoding, at.executable, at.revision
          from public.project_files at
          where at.project_id = project_uuid and at.is_current_version and at.file_path >= wanted.path
          order by at.file_path limit 1
        ) f
        where f.file_path = wanted.path and f.revision <= changes_since.revision
      ) c));
end $$;
comment on function public.changes_since is 'What became of each path after `revision`; the latest of each, tombstones included.';

revoke all on function public.list_current_files, public.project_tree_hash, public.changes_since
  from public, anon, authenticated, service_role;
grant execute on function public.list_current_files, public.project_tree_hash, public.changes_since, preview.entry_of
  to authenticated, service_role;

-- ------------------------------------------------------------------------------------------------ bringing back
create function public.restore_project_file(
  project_uuid uuid, p_file_path text, p_version integer, expected_version integer default null,
  p_correlation_id text default null
) returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  old public.project_files;
  result jsonb;
begin
  if p_file_path is null or p_version is null then
    raise exception '% must not be null', case when p_file_path is null then 'p_file_path' else 'p_version' end
      using errcode = 'PT400';
  elsif expected_version < 0 then
    raise exception 'expected_version must not be negative' using errcode = 'PT400';
  end if;
  select * into old from public.project_files f
  where f.project_id = project_uuid and f.file_path = p_file_path and f.version = p_version;
  if not found then
    raise exception 'p_version %: the history of % has no such version', p_version, to_json(p_file_path) using errcode = 'PT404';
  elsif old.is_deleted then
    raise exception 'p_version %: % was deleted there', p_version, to_json(p_file_path)
      using errcode = 'PT400', hint = 'Restore the version before it.';
  end if;
  result := preview.submit(project_uuid, array[
    row('update', old.file_path, old.file_type, old.content, old.content_hash, old.executable, expected_version)::preview.change],
    false, p_correlation_id);
  return (result - 'files' - 'changed') || (result -> 'files' -> 0);
end $$;
comment on function public.restore_project_file is 'Write an earlier version again, as a new version.';

-- ------------------------------------------------------------------------------------------------ snapshots
create table public.project_snapshots (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  requested_by uuid,
  state text not null default 'requested' check (state in ('requested', 'building', 'ready', 'failed')),
  -- Filled by the builder: what the archive holds, and where it is in the bucket project-snapshots.
  epoch uuid,
  revision bigint,
  object_path text,
  size_bytes bigint,
  problem text,
  created_at timestamptz not null default now(),
  finished_at timestamptz
);
comment on table public.project_snapshots is 'Requests for an archive of the current files; the orchestrator''s job builds them.';
create index project_snapshots_project_id_idx on public.project_snapshots (project_id, created_at desc);
create index project_snapshots_requested_by_idx on public.project_snapshots (requested_by);
-- A second request before the first is taken up is the first.
create unique index project_snapshots_open_idx on public.project_snapshots (project_id) where state = 'requested';

create function preview.announce_snapshot_request() returns trigger language plpgsql set search_path = '' as $$
begin
  perform pg_notify('snapshot_requests', new.id::text);
  return null;
end $$;
create trigger announce_snapshot_request after insert on public.project_snapshots
  for each row execute function preview.announce_snapshot_request();

create function public.create_project_snapshot(project_uuid uuid) returns jsonb
language plpgsql security invoker set search_path = '' as $$
declare
  request public.project_snapshots;
begin
  if project_uuid is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  end if;
  perform preview.submit(project_uuid, null, false, null);  -- may the caller, is it there, has it a head
  loop  -- the open request may be taken up between the two statements
    insert into public.project_snapshots (project_id, requested_by) values (project_uuid, (select auth.uid()))
    on conflict do nothing
    returning * into request;
    exit when found;
    select * into request from public.project_snapshots s where s.project_id = project_uuid and s.state = 'requested';
    exit when found;
  end loop;
  return jsonb_build_object('snapshot_id', request.id, 'project_id', request.project_id, 'state', request.state,
                            'created_at', preview.rfc3339(request.created_at));
end $$;
comment on function public.create_project_snapshot is 'Ask for an archive of the current files. Returns the request.';

-- ------------------------------------------------------------------------------------------------ forgetting
-- Superseded versions older than `keep` go, the newest `keep_versions` of each path excepted; tombstones older than
-- `keep` and than the longest session go with everything before them, and whoever stands below the last of those is told
-- `too_old`. Current versions stay, whatever their age.
create function public.prune_project_history(project_uuid uuid, keep interval, keep_versions integer) returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  forgotten integer;
  tombstones integer := 0;
  gone record;
  oldest timestamptz;
begin
  if keep is null or keep < interval '0' then
    raise exception 'keep must be an interval of 0 or more' using errcode = 'PT400';
  elsif keep_versions is null or keep_versions < 0 then
    raise exception 'keep_versions must be 0 or more' using errcode = 'PT400';
  end if;
  delete from public.project_files f
  using (
    select id, row_number() over (partition by file_path order by version desc) as age
    from public.project_files where project_id = project_uuid and not is_current_version
  ) old
  where f.id = old.id and old.age > keep_versions and f.updated_at < now() - keep;
  get diagnostics forgotten = row_count;

  select now() - greatest(keep, s.longest_session) into strict oldest from preview.settings s;
  perform from public.project_heads h where h.project_id = project_uuid for no key update;
  if not found then
    raise exception 'project_uuid %: no such project', project_uuid using errcode = 'PT404';
  end if;
  with dead as (
    delete from public.project_files f
    where f.project_id = project_uuid and f.is_current_version and f.is_deleted and f.created_at < oldest
    returning f.file_path, f.revision
  ), before as (
    delete from public.project_files f using dead d
    where f.project_id = project_uuid and f.file_path = d.file_path and not f.is_current_version
    returning f.id
  )
  select count(*) as rows, max(revision) as revision, (select count(*) from before) as before into gone from dead;
  if gone.rows > 0 then
    tombstones := gone.rows;
    forgotten := forgotten + gone.before;
    update public.project_heads h set pruned_revision = greatest(h.pruned_revision, gone.revision)
    where h.project_id = project_uuid;
  end if;
  delete from preview.answers a where a.project_id = project_uuid and a.created_at < oldest;
  return jsonb_build_object('versions', forgotten, 'tombstones', tombstones);
end $$;
comment on function public.prune_project_history is 'Forget superseded versions and old tombstones; never a current file.';

-- After a restore from a backup, before anybody writes: the history is another one now, and every container starts over.
create function public.new_project_epoch(project_uuid uuid default null) returns integer
language plpgsql security definer set search_path = '' as $$
declare
  renamed integer;
begin
  update public.project_heads h set epoch = gen_random_uuid(), updated_at = now()
  where project_uuid is null or h.project_id = project_uuid;
  get diagnostics renamed = row_count;
  return renamed;
end $$;
comment on function public.new_project_epoch is 'Give one project, or all, a new epoch: to be called after a restore.';

revoke all on public.project_snapshots from public, anon, authenticated, service_role;
revoke all on function preview.announce_snapshot_request from public;
revoke all on function public.restore_project_file, public.create_project_snapshot, public.prune_project_history,
  public.new_project_epoch from public, anon, authenticated, service_role;
grant select, insert (project_id, requested_by) on public.project_snapshots to authenticated;
grant all on public.project_snapshots to service_role;
grant execute on function preview.rfc3339 to authenticated, service_role;
grant execute on function public.restore_project_file, public.create_project_snapshot to authenticated, service_role;
grant execute on function public.prune_project_history, public.new_project_epoch to service_role;

-- ------------------------------------------------------------------------------------------------ the control plane's state
-- Sessions and their machines. Only the orchestrator, which connects as the database's owner, reads and writes it.
create table preview.sessions (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  state text not null default 'requested'
    check (state in ('requested', 'provisioning', 'ready', 'draining', 'gone', 'failed')),
  generation integer not null default 1 check (generation > 0),
  -- What the caller sent as Idempotency-Key: the same key is the same session, for ever. It is its project's: were it
  -- everybody's, whoever used a key that another tenant's backend would derive kept that tenant from the session.
  idempotency_key text check (char_length(idempotency_key) between 1 and 255),
  created_at timestamptz not null default now(),
  expires_at timestamptz not null,
  state_since timestamptz not null default now(),
  -- One orchestrator's turn at making or ending the machine; another may take over once it has passed.
  claimed_by text,
  claimed_until timestamptz,
  -- Renewed by the agent's status; the sweeper ends what let it lapse.
  lease_until timestamptz,
  machine_driver text,
  machine_id text,
  machine_region text,
  preview_url text,
  health_url text,
  problem text,
  -- The agent's last status, as it sent it.
  status jsonb,
  status_at timestamptz,
  unique (project_id, idempotency_key)
);
create index sessions_by_project on preview.sessions (project_id, created_at desc);
create index sessions_not_ended on preview.sessions (state_since) where state not in ('gone', 'failed');
alter table preview.sessions enable row level security;
comment on table preview.sessions is 'One running preview of one project; its life is the table in orchestrator_stub/sessions/lifecycle.py.';

-- What was built and signed, for the next session that wants the same: without it every orchestrator, and every
-- restart of one, builds the archive of every project anew. A cache: it may be emptied at any time.
create table preview.snapshot_offers (
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  -- Epoch, revision and base of the archive, as the orchestrator writes them.
  stamp text not null,
  kept jsonb not null,
  kept_until timestamptz not null,
  primary key (project_id, stamp)
);
create index snapshot_offers_kept_until on preview.snapshot_offers (kept_until);
alter table preview.snapshot_offers enable row level security;
comment on table preview.snapshot_offers is 'Signed URLs and manifests of built snapshots; in Redis instead where the orchestrator has one.';

-- Which installation this is: all the orchestrators on this database. Every machine they make carries the id in its name, and
-- they touch no machine that carries another, so that two databases (production's and staging's, say) may share a Fly app or
-- a container engine.
create table preview.installation (
  only_row boolean primary key default true check (only_row),
  id uuid not null default gen_random_uuid(),
  -- Machines of sessions from before do not carry the id.
  since timestamptz not null default now()
);
alter table preview.installation enable row level security;
insert into preview.installation default values;
comment on table preview.installation is 'One row. A copy of a database is another installation: give it an id of its own before an orchestrator runs on it.';

-- ------------------------------------------------------------------------------------------------ row level security
-- On every table of ours; only what is granted here is possible. Members of a project read everything of it and write through the
-- RPCs. The service role reads everything and writes files through the same RPCs. A preview container reads one topic.
--
-- As on Supabase, whatever is made in `public` starts out open to all: close it, then name what is meant.
revoke all on public.project_files, public.project_files_current, public.project_heads
  from public, anon, authenticated, service_role;
grant select on public.project_files, public.project_files_current, public.project_heads to authenticated, service_role;

alter table public.project_files enable row level security;
alter table public.project_heads enable row level security;
alter table public.project_snapshots enable row level security;

-- Where a token for a container must carry the role `authenticated` (a hosted Realtime that knows no other), its claim
-- `project_id` turns it away from everything of ours but its topic. (Not `session_id`: a user's own token has one as well.)
do $$
declare
  guarded text;
begin
  foreach guarded in array array[
    'public.project_files', 'public.project_heads', 'public.project_snapshots', 'storage.objects'
  ] loop
    execute format(
      'create policy "a container''s token reads no table" on %s as restrictive for all to authenticated '
      'using (not coalesce((select auth.jwt()) ? ''project_id'', false))', guarded);
  end loop;
end $$;

-- ------------------------------------------------------------------------------------------------ realtime
do $$
begin
  grant preview_agent to authenticator;
  if exists (select from pg_roles where rolname = 'supabase_realtime_admin') then
    grant preview_agent to supabase_realtime_admin;
  end if;
exception when insufficient_privilege then
  raise warning 'preview_agent could not be granted to the API''s roles (%). Use tokens with the role authenticated.', sqlerrm;
end $$;
grant usage on schema realtime to preview_agent;
grant select on realtime.messages to preview_agent;
do $$
begin
  if not has_table_privilege('preview_agent', 'realtime.messages', 'select') then
    raise warning 'preview_agent may not read realtime.messages on this server. Use tokens with the role authenticated.';
  end if;
end $$;

-- Realtime asks with the topic in a setting and a row of that topic; the row is held to it too, lest somebody who could set
-- the one read all the others.
create policy "a container hears its project" on realtime.messages for select to preview_agent
  using (extension = 'broadcast' and topic = (select realtime.topic())
    and (select realtime.topic()) = 'project:' || ((select auth.jwt()) ->> 'project_id'));
create policy "members hear their projects" on realtime.messages for select to authenticated
  using (extension = 'broadcast' and topic = (select realtime.topic()) and case
    when (select auth.jwt()) ? 'project_id'
      then (select realtime.topic()) = 'project:' || ((select auth.jwt()) ->> 'project_id')
    else (select preview.allows(
      substring((select realtime.topic()) from '^project:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$')::uuid, 'read'))
  end);

insert into storage.buckets (id, name, public, file_size_limit) values
  ('project-snapshots', 'project-snapshots', false, null),
  ('project-assets', 'project-assets', false, 52428800),  -- 50 MB: Supabase's own default, and the free plan's most
  ('preview-bundles', 'preview-bundles', false, null)
on conflict (id) do nothing;

-- project-assets/{project_id}/{sha256}: an object is its hash, so it is added and read, never changed.
create policy "members add assets" on storage.objects for insert to authenticated
  with check (case
    when bucket_id = 'project-assets' and name ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/[0-9a-f]{64}$'
      then preview.allows(left(name, 36)::uuid, 'write')
    else false
  end);

-- ------------------------------------------------------------------------------------------------ fitted to the product
-- Two things follow from what was found. Whose key a person's id is: where a project's owner is a `user_profiles` (the tables
-- above, or a product's of that form) it is that table, and a version always has an author; elsewhere it is `auth.users`, a
-- version's author may be nobody, and deleting an account is never in the way of a product that does not know of us.
--
-- And how a policy asks: for all of the caller's projects at once, by index, each statement once; or, without
-- `preview.projects_of`, for each row's project.
do $$
declare
  profiles boolean := exists (
    select from pg_constraint k join pg_attribute a on a.attrelid = k.conrelid and a.attnum = k.conkey[1]
    where k.contype = 'f' and k.conrelid = 'public.projects'::regclass and k.confrelid = to_regclass('public.user_profiles')
      and cardinality(k.conkey) = 1 and a.attname = 'owner_id' and a.attnotnull and a.atttypid = 'uuid'::regtype
      and k.confkey[1] = (select attnum from pg_attribute where attrelid = k.confrelid and attname = 'id'))
    and has_column_privilege(to_regclass('public.user_profiles')::oid, 'id', 'references');
  people text := case when profiles then 'public.user_profiles' else 'auth.users' end;
  named boolean := coalesce(obj_description(to_regclass('public.user_profiles')), '') like 'Made by preview-sync%';
  at_once boolean := to_regprocedure('preview.projects_of(uuid)') is not null;
  mine text := case when at_once then 'project_id in (select preview.my_projects())' else 'preview.allows(project_id, ''read'')' end;
begin
  if profiles then
    -- Deferred: a person's own projects go with them, and are gone when this is looked at, at the end of the transaction.
    alter table public.project_files
      alter column created_by set not null,
      add foreign key (created_by) references public.user_profiles (id) deferrable initially deferred,
      add foreign key (last_modified_by) references public.user_profiles (id) deferrable initially deferred;
  else
    alter table public.project_files
      add foreign key (created_by) references auth.users (id) on delete set null,
      add foreign key (last_modified_by) references auth.users (id) on delete set null;
  end if;
  execute format('alter table public.project_snapshots add foreign key (requested_by) references %s (id) on delete set null', people);

  execute format('create policy "members read files" on public.project_files for select to authenticated using (%s)', mine);
  execute format('create policy "members read heads" on public.project_heads for select to authenticated using (%s)', mine);
  execute format('create policy "members see snapshot requests" on public.project_snapshots for select to authenticated using (%s)', mine);
  create policy "members ask for snapshots" on public.project_snapshots for insert to authenticated
    with check (preview.allows(project_id, 'read') and requested_by = (select auth.uid()));
  if at_once then
    create policy "members read assets" on storage.objects for select to authenticated
      using (bucket_id = 'project-assets' and (storage.foldername(name))[1] in (select m::text from preview.my_projects() m));
  else
    create policy "members read assets" on storage.objects for select to authenticated
      using (case
        when bucket_id = 'project-assets' and name ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/'
          then preview.allows(left(name, 36)::uuid, 'read')
        else false
      end);
  end if;

  if to_regprocedure('preview.may_access(uuid,uuid,text)') is not null
     and coalesce(obj_description(to_regclass('public.project_collaborators')), '') = 'Who, beside the owner, reads and writes a project.'
  then
    execute format('alter table public.project_collaborators
      add foreign key (project_id) references public.projects (id) on delete cascade,
      add foreign key (user_id) references %1$s (id) on delete cascade,
      add foreign key (added_by) references %1$s (id) on delete set null', people);
    revoke all on public.project_collaborators from public, anon, authenticated, service_role;
    grant select, insert (project_id, user_id, added_by), delete on public.project_collaborators to authenticated;
    grant all on public.project_collaborators to service_role;
    alter table public.project_collaborators enable row level security;
    -- A project is asked for through functions alone: a policy of its own may look here, and PostgreSQL refuses the circle.
    create policy "collaborators see themselves, owners whom they added" on public.project_collaborators for select to authenticated
      using (user_id = (select auth.uid()) or added_by = (select auth.uid()));
    create policy "the owner adds collaborators" on public.project_collaborators for insert to authenticated
      with check (added_by = (select auth.uid()) and preview.owns(project_id));
    create policy "owners remove collaborators, who may also leave" on public.project_collaborators for delete to authenticated
      using (user_id = (select auth.uid()) or added_by = (select auth.uid()));
    create policy "a container's token reads no table" on public.project_collaborators as restrictive for all to authenticated
      using (not coalesce((select auth.jwt()) ? 'project_id', false));
  end if;
  if obj_description('public.projects'::regclass) like 'Made by preview-sync%' then
    execute format('create policy "members see their projects" on public.projects for select to authenticated
      using (owner_id = (select auth.uid()) or %s)', case when at_once
      then 'id in (select c.project_id from public.project_collaborators c where c.user_id = (select auth.uid()))'
      else 'preview.allows(id, ''read'')' end);
  end if;

  -- The audit trail has names where there are names that we know of.
  execute format($v$
    create view public.project_history with (security_invoker = true) as
      select f.project_id, f.revision, f.created_at as changed_at, f.created_by as changed_by, %s as changed_by_name,
             case when f.is_deleted then 'delete' when f.version = 1 then 'create' else 'update' end as action,
             f.file_path, f.version, f.size_bytes, f.content_hash, f.is_current_version
      from public.project_files f %s $v$,
    case when named then 'u.display_name' else 'null::text' end,
    case when named then 'left join public.user_profiles u on u.id = f.created_by' end);
  comment on view public.project_history is 'The audit trail: one row for each change of a file. Order by revision.';
  revoke all on public.project_history from public, anon, authenticated, service_role;
  grant select on public.project_history to authenticated, service_role;
end $$;

-- ------------------------------------------------------------------------------------------------ adoption
-- Adopts an older `project_files` that was handed over, by moving it to the schema `preview`. It is read and kept as it is, for
-- whoever handed it over to drop. A row that cannot be a file here is told, whole, with the reason.
--
-- One row a file, whatever its columns were called: the path as file_path, path, filename or name; the contents as content, code or
-- source; the kind as file_type, type or language. Each file becomes version 1 of revision 1. Where the table has `version` and
-- `is_current_version`, every version is kept, under its id and number.
create table preview.legacy_rejects (
  id bigint generated always as identity primary key,
  reason text not null,
  legacy jsonb not null
);
alter table preview.legacy_rejects enable row level security;
comment on table preview.legacy_rejects is 'Rows of an older project_files that could not be adopted, and why.';
revoke all on preview.legacy_rejects from public;

do $$
declare
  columns text[];
  times text[];
  versioned boolean;
  people text := case when (select attnotnull from pg_attribute where attrelid = 'public.project_files'::regclass
                            and attname = 'created_by') then 'public.user_profiles' else 'auth.users' end;
begin
  if to_regclass('preview.project_files') is null then
    return;
  end if;
  select array_agg(a.attname::text),
         array_agg(a.attname::text) filter (where a.atttypid in ('timestamptz'::regtype, 'timestamp'::regtype, 'date'::regtype))
  into columns, times from pg_attribute a
  where a.attrelid = 'preview.project_files'::regclass and a.attnum > 0 and not a.attisdropped;
  versioned := columns @> array['version', 'is_current_version'];

  execute format($q$
    create temporary table adopted on commit drop as
    select found.*, coalesce(a.id, found.owner) as author, coalesce(m.id, a.id, found.owner) as modifier,
           case when found.content is not null then octet_length(found.content)
                when found.digest is not null then (o.metadata ->> 'size')::bigint end as size,
           null::bigint as revision, null::text as reason,
           (found.content is null and found.digest is not null and o.id is null) as is_lost
    from (
      select l.raw, p.id as project_id, preview.owner_of(p.id) as owner,
             coalesce(l.raw ->> 'content', l.raw ->> 'code', l.raw ->> 'source') as content,
             case when coalesce(l.raw ->> 'content', l.raw ->> 'code', l.raw ->> 'source') is null
                  then substring(lower(l.raw ->> 'content_hash') from '^[0-9a-f]{64}$') end as digest,
             normalize(regexp_replace(
               replace(coalesce(l.raw ->> 'file_path', l.raw ->> 'path', l.raw ->> 'filename', l.raw ->> 'name'), '\', '/'),
               '^(\.?/)+', '')) collate "C" as path,
             coalesce(l.raw ->> 'file_type', l.raw ->> 'type', l.raw ->> 'language') as kind,
             coalesce(l.raw ->> 'created_by', l.raw ->> 'user_id') as creator, l.raw ->> 'last_modified_by' as last_creator,
             coalesce(case when %1$L then (l.raw ->> 'created_at')::timestamptz end, now()) as created_at,
             coalesce(case when %2$L then (l.raw ->> 'updated_at')::timestamptz end,
                      case when %1$L then (l.raw ->> 'created_at')::timestamptz end, now()) as updated_at,
             case when not %3$L then 1
                  when l.raw ->> 'version' ~ '^[1-9][0-9]{0,8}$' then (l.raw ->> 'version')::integer end as version,
             not %3$L or l.raw ->> 'is_current_version' = 'true' as is_current,
             coalesce(l.raw ->> 'executable' = 'true', false) as executable
      from (select to_jsonb(old) as raw from preview.project_files old) l
      left join public.projects p on p.id::text = l.raw ->> 'project_id'
    ) found
    left join %4$s a on a.id::text = found.creator
    left join %4$s m on m.id::text = found.last_creator
    left join storage.objects o on o.bucket_id = 'project-assets' and o.name = found.project_id || '/' || found.digest
  $q$, coalesce(times @> array['created_at'], false), coalesce(times @> array['updated_at'], false), versioned, people);

  update adopted set reason = case
    when project_id is null then 'its project does not exist'
    when raw ->> 'type' in ('directory', 'folder') then 'a directory, not a file'
    when content is null and digest is null and not versioned then 'it has no content'
    when is_lost then 'its bytes are not in project-assets'
    when path is null then 'it has no path'
    when preview.path_problem(path) is not null then 'its path cannot be used: ' || preview.path_problem(path)
    when version is null then 'its version is not a number'
    when author is null and people = 'public.user_profiles' then 'its project has no owner'
  end;
  update adopted a set reason = case when versioned then 'a newer row has the same version' else 'a newer row has the same path' end
  from (select ctid, row_number() over (partition by project_id, path, version order by updated_at desc, raw ->> 'id') as age
        from adopted where reason is null) ranked
  where a.ctid = ranked.ctid and ranked.age > 1;
  update adopted a set reason = 'a file of that name would be a directory of another'
  where a.reason is null
    and exists (select from adopted live where live.reason is null and live.is_current
                and live.project_id = a.project_id and live.path = a.path and coalesce(live.content, live.digest) is not null)
    and exists (select from adopted below where below.reason is null and below.is_current
                and below.project_id = a.project_id and below.path > a.path || '/' and below.path < a.path || '0'
                and coalesce(below.content, below.digest) is not null);
  insert into preview.legacy_rejects (reason, legacy) select reason, raw from adopted where reason is not null;
  delete from adopted where reason is not null;

  -- The current version of a path is its last. Where another one was marked, or none, one more says so.
  insert into adopted (raw, project_id, content, digest, path, kind, created_at, updated_at, version, is_current, executable,
                       author, modifier, size)
  select '{}', l.project_id, f.content, f.digest, l.path, coalesce(f.kind, l.kind), now(), now(), l.version + 1, true,
         coalesce(f.executable, false), coalesce(f.author, l.author), coalesce(f.modifier, l.modifier), f.size
  from (select distinct on (project_id, path) * from adopted order by project_id, path, version desc) l
  left join lateral (select * from adopted f where f.project_id = l.project_id and f.path = l.path and f.is_current
                     order by f.version desc limit 1) f on true
  where not l.is_current;
  if columns @> array['revision', 'epoch'] or columns @> array['revision', 'is_deleted'] then
    update adopted set revision = (raw ->> 'revision')::bigint where raw ->> 'revision' ~ '^[1-9][0-9]{0,17}$';
  end if;
  update adopted a set revision = ranked.revision
  from (select ctid, case when versioned
                     then coalesce(max(revision) over (partition by project_id), 0)
                          + row_number() over (partition by project_id, revision is null order by created_at, version, path)
                     else 1 end as revision
        from adopted) ranked
  where a.ctid = ranked.ctid and a.revision is null;

  insert into public.project_heads (project_id, revision) select project_id, max(revision) from adopted group by project_id
  on conflict (project_id) do update set revision = excluded.revision, updated_at = now();
  insert into public.project_files (id, project_id, file_path, file_type, content, content_hash, version, parent_version_id,
                                    is_current_version, created_by, last_modified_by, created_at, updated_at, revision, is_deleted,
                                    size_bytes, encoding, executable)
  select id, project_id, path, coalesce(nullif(kind, ''), preview.file_type_of(path)), content,
         coalesce(digest, encode(sha256(convert_to(content, 'UTF8')), 'hex')), version,
         lag(id) over (partition by project_id, path order by version),
         version = max(version) over (partition by project_id, path),
         author, modifier, created_at, updated_at, revision, content is null and digest is null,
         coalesce(size, 0), case when digest is null then 'utf-8' else 'base64' end, 
         executable and coalesce(content, digest) is not null
  from (select *, case when versioned and raw ->> 'id' ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                       then (raw ->> 'id')::uuid else gen_random_uuid() end as id from adopted) named;
  drop table adopted;
end $$;
