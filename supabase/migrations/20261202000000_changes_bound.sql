-- An answer of `changes_since` has a size: what is asked for by path counts towards `p_max_bytes` as what is newer does. A question
-- with many paths was answered with all of their content, 37 MB for a limit of 2 MB, and above 64 MiB no agent reads it.
--
-- On a live database: one function is replaced, which waits for nobody and keeps its grants.
set local lock_timeout = '2s';

create or replace function public.changes_since(
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
    from (
      (select c.size_bytes, c.encoding from public.project_files c
       where c.project_id = project_uuid and c.is_current_version and c.revision > changes_since.revision
       order by c.revision)
      union all
      select f.size_bytes, f.encoding
      from (select distinct path from unnest(p_paths) path) wanted
      cross join lateral (
        select at.file_path, at.size_bytes, at.encoding, at.revision
        from public.project_files at
        where at.project_id = project_uuid and at.is_current_version and at.file_path >= wanted.path
        order by at.file_path limit 1
      ) f
      where f.file_path = wanted.path and f.revision <= changes_since.revision
    ) f
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
