-- History: who changed what when, bringing a version back, asking for a snapshot, and what all of it may cost.
--
-- On a live database: new objects only. `prune_project_history` deletes in one statement for each kind and locks the
-- project's head only while tombstones go, so writers wait for that alone.
set local lock_timeout = '2s';

create view public.project_history with (security_invoker = true) as
  select f.project_id, f.revision, f.created_at as changed_at, f.created_by as changed_by, u.display_name as changed_by_name,
         case when f.is_deleted then 'delete' when f.version = 1 then 'create' else 'update' end as action,
         f.file_path, f.version, f.size_bytes, f.content_hash, f.is_current_version
  from public.project_files f
  left join public.user_profiles u on u.id = f.created_by;
comment on view public.project_history is 'The audit trail: one row for each change of a file. Order by revision.';

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
  project_id uuid not null references public.projects (id) on delete cascade,
  requested_by uuid references public.user_profiles (id) on delete set null,
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
  perform from public.projects p where p.id = project_uuid;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
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

alter table public.project_snapshots enable row level security;
create policy "members see snapshot requests" on public.project_snapshots for select to authenticated
  using (project_id in (select preview.my_projects()));
create policy "members ask for snapshots" on public.project_snapshots for insert to authenticated
  with check (project_id in (select preview.my_projects()) and requested_by = (select auth.uid()));
create policy "a container's token reads no table" on public.project_snapshots as restrictive for all to authenticated
  using (not coalesce((select auth.jwt()) ? 'project_id', false));

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
  perform from public.project_heads h where h.project_id = project_uuid for update;
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

-- ------------------------------------------------------------------------------------------------ who may
revoke all on public.project_history, public.project_snapshots from public, anon, authenticated, service_role;
revoke all on function preview.announce_snapshot_request from public;
revoke all on function public.restore_project_file, public.create_project_snapshot, public.prune_project_history,
  public.new_project_epoch from public, anon, authenticated, service_role;
grant select on public.project_history to authenticated, service_role;
grant select, insert (project_id, requested_by) on public.project_snapshots to authenticated;
grant all on public.project_snapshots to service_role;
grant execute on function preview.rfc3339 to authenticated, service_role;
grant execute on function public.restore_project_file, public.create_project_snapshot to authenticated, service_role;
grant execute on function public.prune_project_history, public.new_project_epoch to service_role;
