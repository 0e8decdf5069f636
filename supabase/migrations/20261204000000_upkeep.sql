-- Upkeep: history that nobody keeps is forgotten and objects that nothing names are collected, project by project, by a schedule
-- and in short transactions. Until now somebody had to call `prune_project_history`, and nobody did; `project-assets` only grew.
--
-- Sections: settings · forgetting · unused objects · what is due
--
-- On a live database: columns are added without rewriting a table, each with a default that is kept once for all rows. The index on
-- project_heads is built while saves wait: a tenth of a second for a hundred thousand projects.
set local lock_timeout = '2s';

-- ------------------------------------------------------------------------------------------------ settings
alter table preview.settings
  -- Superseded versions and tombstones older than this are forgotten; null: never.
  add column history_kept interval default '90 days' check (history_kept >= '1 hour'),
  -- The newest so many superseded versions of each path stay whatever their age.
  add column versions_kept integer not null default 100 check (versions_kept >= 0),
  -- An object that nothing names is collected after this: whoever uploads bytes names them within minutes, or in a turn that is kept
  -- for a day. Null: never.
  add column unused_assets_kept interval default '2 days' check (unused_assets_kept >= '1 hour'),
  -- Between two rounds of upkeep of one project.
  add column upkeep_every interval not null default '1 day' check (upkeep_every >= '1 minute');

-- When a project was last kept up. Not touched by saves, so they go on updating the head without touching an index.
alter table public.project_heads add column kept_up_at timestamptz not null default now();
create index project_heads_kept_up_at_idx on public.project_heads (kept_up_at);

-- Since when a deleted project waits for its cleaning: one that is opened again, for something that came late, waits anew.
alter table preview.deleted_projects add column queued_at timestamptz not null default now();

-- ------------------------------------------------------------------------------------------------ forgetting
-- Forgets at most `most` superseded versions and as many tombstones, with what was before each. The caller holds the head: to
-- delete a version clears the `parent_version_id` of the one after it, which is the row that a save is about to update.
create function preview.forget(project uuid, keep interval, keep_versions integer, most integer) returns jsonb
language plpgsql set search_path = '' as $$
declare
  oldest timestamptz;
  forgotten integer;
  gone record;
begin
  delete from public.project_files f where f.id in (
    select old.id from (
      select v.id, v.updated_at, row_number() over (partition by v.file_path order by v.version desc) as age
      from public.project_files v where v.project_id = project and not v.is_current_version
    ) old
    where old.age > keep_versions and old.updated_at < now() - keep limit most);
  get diagnostics forgotten = row_count;

  select now() - greatest(keep, s.longest_session) into strict oldest from preview.settings s;
  with dead as (
    delete from public.project_files f where f.id in (
      select t.id from public.project_files t
      where t.project_id = project and t.is_current_version and t.is_deleted and t.created_at < oldest
      order by t.revision limit most)
    returning f.file_path, f.revision
  ), before as (
    delete from public.project_files f using dead d
    where f.project_id = project and f.file_path = d.file_path and not f.is_current_version
    returning f.id
  )
  select count(*) as rows, max(revision) as revision, (select count(*) from before) as before into gone from dead;
  if gone.rows > 0 then
    update public.project_heads h set pruned_revision = greatest(h.pruned_revision, gone.revision) where h.project_id = project;
  end if;
  return jsonb_build_object('versions', forgotten + gone.before, 'tombstones', gone.rows);
end $$;

-- As it was, but the head is locked first, as whoever writes does: the other order met a save in a circle (40P01).
create or replace function public.prune_project_history(project_uuid uuid, keep interval, keep_versions integer) returns jsonb
language plpgsql security definer set search_path = '' as $$
declare
  forgotten jsonb;
begin
  if keep is null or keep < interval '0' then
    raise exception 'keep must be an interval of 0 or more' using errcode = 'PT400';
  elsif keep_versions is null or keep_versions < 0 then
    raise exception 'keep_versions must be 0 or more' using errcode = 'PT400';
  end if;
  perform from public.project_heads h where h.project_id = project_uuid for no key update;
  if not found then
    raise exception 'project_uuid %: no such project', project_uuid using errcode = 'PT404';
  end if;
  forgotten := preview.forget(project_uuid, keep, keep_versions, null);
  delete from preview.answers a where a.project_id = project_uuid
    and a.created_at < (select now() - greatest(keep, s.longest_session) from preview.settings s);
  return forgotten;
end $$;

-- ------------------------------------------------------------------------------------------------ unused objects
-- Objects of project-assets that are on their way out. The bytes are deleted through the Storage API, after the transaction that
-- decided: in between, nothing may come to name them. So a row here is a refusal, from the decision until the bytes are gone.
create table preview.unused_assets (
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  content_hash text not null,
  found_at timestamptz not null default now(),
  primary key (project_id, content_hash)
);
create index unused_assets_found_at_idx on preview.unused_assets (found_at);
alter table preview.unused_assets enable row level security;
comment on table preview.unused_assets is 'Objects of project-assets that nothing named when it was last asked; no file can name one until it is gone.';

-- RACE: a save finds the object there, and waits for the head while it is found unused. It is refused here, under the head's lock,
-- and so is a turn that staged the name at that moment. Who is refused uploads again, a few seconds later.
create function preview.refuse_unused() returns trigger language plpgsql security definer set search_path = '' as $$
declare
  project uuid := case tg_table_name when 'project_files' then (to_jsonb(new) ->> 'project_id')::uuid
    else (select t.project_id from preview.turns t where t.id = (to_jsonb(new) ->> 'turn_id')::uuid) end;
begin
  if exists (select from preview.unused_assets u where u.project_id = project and u.content_hash = new.content_hash) then
    raise exception 'content of %: the object project-assets/%/% was not named by anything and is being removed', new.file_path,
      project, new.content_hash
      using errcode = 'PT503', detail = '{"retry_after": 5}', hint = 'Wait some seconds, upload the bytes again, and repeat the write.';
  end if;
  return new;
end $$;
create trigger refuse_unused before insert on public.project_files
  for each row when (new.content is null and new.content_hash is not null) execute function preview.refuse_unused();
create trigger refuse_unused before insert or update on preview.turn_changes
  for each row when (new.content is null and new.content_hash is not null) execute function preview.refuse_unused();

-- ------------------------------------------------------------------------------------------------ what is due
-- One step for the project that has waited longest: forget, and find what nothing names. Null: nothing is due. A project that
-- somebody writes to is passed by; one where `most` was not enough is due again at once. Any number may call this at a time.
create function preview.keep_up(most integer default 500) returns jsonb
language plpgsql set search_path = '' as $$
declare
  limits preview.settings;
  project uuid;
  done jsonb := '{"versions": 0, "tombstones": 0}';
  unused integer;
begin
  select * into strict limits from preview.settings;
  select h.project_id into project from public.project_heads h
  where h.kept_up_at < now() - limits.upkeep_every
  order by h.kept_up_at limit 1 for no key update skip locked;
  if not found then
    return null;
  end if;
  if limits.history_kept is not null then
    done := preview.forget(project, limits.history_kept, limits.versions_kept, most);
  end if;
  insert into preview.unused_assets (project_id, content_hash)
  select project, o.hash from (
    select substr(s.name, 38) as hash from storage.objects s
    where s.bucket_id = 'project-assets' and s.name > project || '/' and s.name < project || '0'
      and starts_with(s.name, project || '/') and s.created_at < now() - limits.unused_assets_kept
  ) o
  where o.hash ~ '^[0-9a-f]{64}$'
    and not exists (select from preview.unused_assets u where u.project_id = project and u.content_hash = o.hash)
    and o.hash not in (select preview.objects_named(project))
  limit most;
  get diagnostics unused = row_count;
  if greatest((done ->> 'versions')::int, (done ->> 'tombstones')::int, unused) < most then
    update public.project_heads h set kept_up_at = now() where h.project_id = project;
  end if;
  return done || jsonb_build_object('project_id', project, 'unused', unused);
end $$;
comment on function preview.keep_up is 'One step of upkeep for the project that has waited longest; the orchestrator calls it.';

revoke all on preview.unused_assets from public;
revoke all on function preview.forget, preview.refuse_unused, preview.keep_up from public;
grant execute on function preview.keep_up to service_role;
