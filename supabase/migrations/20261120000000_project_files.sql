-- The tables: projects, their files with full history, and how far each project's history has come.
--
-- On a live database: everything large here is new and empty. A `project_files` of an older shape is renamed out of the way
-- (one catalog entry) and adopted by the last migration of this set; `projects` and `user_profiles` that are there already
-- get a trigger and foreign keys from empty tables, which scan nothing. Should a long query hold one of them, the
-- lock_timeout makes us the one who gives up, and whoever queued behind us waited no longer than that.
set local lock_timeout = '2s';

create schema if not exists preview;
comment on schema preview is 'What the API does not expose: the write path, its settings, and the control plane''s state.';
revoke all on schema preview from public;

-- The role of a preview container: it may read one realtime topic, and nothing else.
do $$
begin
  if not exists (select from pg_roles where rolname = 'preview_agent') then
    create role preview_agent nologin noinherit;
  end if;
exception when duplicate_object or unique_violation then
  null;  -- made by another database of the same server at the same moment
end $$;

-- ------------------------------------------------------------------------------------------------ legacy, out of the way
do $$
begin
  if to_regclass('public.project_files') is not null and not exists (
    select from information_schema.columns
    where table_schema = 'public' and table_name = 'project_files' and column_name = 'is_current_version'
  ) then
    alter table public.project_files rename to project_files_legacy;
    alter table public.project_files_legacy set schema preview;
  end if;
end $$;

-- ------------------------------------------------------------------------------------------------ people and projects
create table if not exists public.user_profiles (
  id uuid primary key references auth.users (id) on delete cascade,
  created_at timestamptz not null default now()
);
alter table public.user_profiles add column if not exists display_name text;

do $$
begin
  if to_regclass('public.projects') is not null and not exists (
    select from information_schema.columns
    where table_schema = 'public' and table_name = 'projects' and column_name = 'owner_id'
  ) then
    alter table public.projects rename column user_id to owner_id;  -- the older name of the same thing
  end if;
  if exists (select from pg_constraint where conname = 'projects_user_id_fkey' and conrelid = to_regclass('public.projects')) then
    alter table public.projects rename constraint projects_user_id_fkey to projects_owner_id_fkey;
  end if;
end $$;
create table if not exists public.projects (
  id uuid primary key default gen_random_uuid(),
  owner_id uuid not null references public.user_profiles (id) on delete cascade,
  name text not null default 'untitled',
  created_at timestamptz not null default now()
);
create index if not exists projects_owner_id_idx on public.projects (owner_id);

create table public.project_collaborators (
  project_id uuid not null references public.projects (id) on delete cascade,
  user_id uuid not null references public.user_profiles (id) on delete cascade,
  added_by uuid references public.user_profiles (id) on delete set null,
  created_at timestamptz not null default now(),
  primary key (project_id, user_id)
);
create index project_collaborators_user_id_idx on public.project_collaborators (user_id);
create index project_collaborators_added_by_idx on public.project_collaborators (added_by);
comment on table public.project_collaborators is 'Who, beside the owner, reads and writes a project.';

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

-- ------------------------------------------------------------------------------------------------ files
-- Each row is one version of one file; rows are added, and the older one is marked superseded. A deletion is a version
-- too: a tombstone, current until the path is written again.
create table public.project_files (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.projects (id) on delete cascade,
  -- "C": by bytes, as the tree hash sorts, and so that everything below a directory is one range of the index.
  file_path text collate "C" not null,
  file_type text not null,
  content text,
  content_hash text,
  version integer not null default 1,
  parent_version_id uuid references public.project_files (id) on delete set null,
  is_current_version boolean not null default true,
  -- Deferred: a person's own projects go with them, and are gone when this is looked at, at the end of the transaction.
  created_by uuid not null references public.user_profiles (id) deferrable initially deferred,
  last_modified_by uuid references public.user_profiles (id) deferrable initially deferred,
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

-- ------------------------------------------------------------------------------------------------ heads
-- Where a project's history stands. A writer holds this row's lock from the moment it takes a revision until it commits:
-- so revisions have no holes, and none is visible before a lower one.
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

create function preview.give_head() returns trigger
language plpgsql security definer set search_path = '' as $$
begin
  insert into public.project_heads (project_id) values (new.id) on conflict do nothing;
  return null;
end $$;
create trigger give_head after insert on public.projects for each row execute function preview.give_head();
insert into public.project_heads (project_id) select id from public.projects on conflict do nothing;

revoke all on function preview.path_problem, preview.parents, preview.file_type_of, preview.no_file_is_a_directory,
  preview.give_head from public;
