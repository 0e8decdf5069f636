-- Reading: the current tree, and what became of it since a revision. With the caller's rights.
--
-- Each is one statement with one snapshot, and a writer's rows become visible together with its head: so the revision in
-- an answer is exactly the tree in it.
--
-- On a live database: only new functions.

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
