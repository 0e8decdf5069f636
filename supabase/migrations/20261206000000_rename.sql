-- A file gets another name in one commit: the old path's tombstone and the new path's first version under it, one revision, one
-- `bulk:apply` like any other. `renamed_from` leads from the new version to the one it was, so that a history goes on across names.
--
-- On a live table: the column is added without a rewrite or a scan. It is no foreign key, so that pruning the history looks at nothing
-- more than before; a version that was pruned is still named, and not found. Rows that an earlier migration of the same transaction
-- took over have deferred checks, which are made now: a table with such rows cannot be altered.
set local lock_timeout = '2s';
set constraints all immediate;
alter table public.project_files add column renamed_from uuid;
set constraints all deferred;
comment on column public.project_files.renamed_from is
  'Of the version that a rename made under the new path: the id of the version that it was, under the old one.';

-- Renames, for whoever may write. The head is locked first, as by every write; the write itself is `preview.write`'s.
create function preview.rename_file(
  project uuid, from_path text, to_path text, expected_version integer, correlation_id text
) returns jsonb language plpgsql set search_path = '' as $$
declare
  head public.project_heads;
  kept interval := (select s.answers_kept from preview.settings s);
  moment timestamptz;
  request text := preview.digest_of(concat_ws(' ', 'rename', to_json(from_path), to_json(to_path), expected_version));
  old public.project_files;
  result jsonb;
begin
  if not preview.give_head(project) then
    perform preview.refuse_project(project);
  end if;
  select * into strict head from public.project_heads h where h.project_id = project for no key update;
  moment := clock_timestamp();
  if correlation_id is not null then
    result := preview.answer_to(project, correlation_id, request, moment, kept);
    if result is not null then
      return result;
    end if;
  end if;
  select * into old from public.project_files f
  where f.project_id = project and f.file_path = from_path and f.is_current_version;
  if old.id is not null and expected_version <> old.version then
    perform preview.refuse_conflicts(jsonb_build_array(jsonb_build_object(
      'file_path', from_path, 'expected_version', expected_version, 'version', old.version, 'content_hash', old.content_hash,
      'is_deleted', old.is_deleted)), head.revision, head.epoch, true);
  elsif old.id is null or old.is_deleted then
    raise exception 'p_from %: there is no such file', to_json(from_path) using errcode = 'PT404';
  end if;
  update preview.write_gate g
  set project_id = project, bulk = true, changes = array[
    row('delete', from_path, null, null, null, null, null),
    -- Something else at the new path is a conflict: 0 is "not there".
    row('update', to_path,
        case when old.file_type = preview.file_type_of(from_path) then preview.file_type_of(to_path) else old.file_type end,
        old.content, old.content_hash, old.executable, 0)]::preview.change[]
  returning g.answer into strict result;
  update public.project_files f set renamed_from = old.id
  where f.project_id = project and f.file_path = to_path and f.is_current_version;
  result := result || jsonb_build_object('renamed_from', old.id);
  if correlation_id is not null then
    perform preview.keep_answer(project, correlation_id, request, result, moment, kept);
  end if;
  return result;
end $$;

-- As `preview.write_gate` is: the RPC has its caller's rights, and the trigger asks whether the caller may write.
create view preview.rename_gate with (security_invoker = true) as
  select null::uuid as project_id, null::text as from_path, null::text as to_path, null::integer as expected_version,
         null::text as correlation_id, null::jsonb as answer,
         not row_security_active('public.project_files'::regclass) as unrestricted;
comment on view preview.rename_gate is 'The door of renames: `update … set project_id = …, from_path = …, to_path = … returning answer`.';

create function preview.rename() returns trigger
language plpgsql security definer set search_path = ''
  set plan_cache_mode = 'force_generic_plan' set enable_seqscan = off set enable_sort = off as $$
begin
  if not old.unrestricted then
    if auth.uid() is null or coalesce(auth.jwt() ? 'project_id', false)
       or not coalesce(preview.may_access(new.project_id, auth.uid(), 'write'), false)
    then
      return null;
    end if;
  end if;
  new.answer := preview.rename_file(new.project_id, new.from_path, new.to_path, new.expected_version, new.correlation_id);
  return new;
end $$;
create trigger rename instead of update on preview.rename_gate for each row execute function preview.rename();

create function public.rename_project_file(
  project_uuid uuid, p_from text, p_to text, expected_version integer default null, p_correlation_id text default null
) returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null or p_from is null or p_to is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' when p_from is null then 'p_from' else 'p_to' end
      using errcode = 'PT400';
  elsif p_from = p_to then
    raise exception 'p_to %: the file has that name already', to_json(p_to) using errcode = 'PT400';
  elsif expected_version < 1 then
    raise exception 'expected_version must be 1 or more' using errcode = 'PT400';
  elsif p_correlation_id = '' or octet_length(p_correlation_id) > 200 then
    raise exception 'p_correlation_id must have 1 to 200 bytes' using errcode = 'PT400';
  end if;
  update preview.rename_gate g
  set project_id = project_uuid, from_path = p_from, to_path = p_to, expected_version = rename_project_file.expected_version,
      correlation_id = p_correlation_id
  returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;
comment on function public.rename_project_file is
  'Give a file another path, in one revision. `expected_version` n: only if it is at n; null: whatever it is. Nothing may be at the new path.';

revoke all on function preview.rename_file, preview.rename from public;
revoke all on function public.rename_project_file from public, anon, authenticated, service_role;
grant execute on function public.rename_project_file to authenticated, service_role;
revoke all on preview.rename_gate from public;
grant select, update (project_id, from_path, to_path, expected_version, correlation_id) on preview.rename_gate to authenticated, service_role;

notify pgrst, 'reload schema';
