-- A path that containers change without end is left alone until people write.
--
-- Two sessions whose generators disagree come to rest where each makes the same as before (`came_before`). One that writes the time or
-- a number into its output makes another content each time: 30 versions a minute, for ever, in both sessions. Twenty of one path
-- since people last wrote in the project are more than a tool needs that says what comes of their saves.
--
-- On a live database: one function, which is replaced.
set local lock_timeout = '2s';

-- What becomes of one offered change; null: it is to be written. The caller holds the project's head.
create or replace function preview.judge_offered(project uuid, session uuid, change preview.offered, since bigint, limits preview.settings)
returns jsonb language plpgsql set search_path = '' set enable_seqscan = off set enable_sort = off as $$
declare
  path constant text := change.file_path;
  rule preview.project_write_back;
  current public.project_files;
  is_there boolean;
  kept record;
begin
  if preview.path_problem(path) is not null then
    return preview.outcome(path, 'refused', 'path');
  end if;
  select * into rule from preview.project_write_back r
  where r.project_id = project and path ~ preview.glob_pattern(r.glob) order by r.position limit 1;
  if not found then
    return preview.outcome(path, 'refused', 'glob');
  elsif change.action = 'delete' and not rule.deletes then
    return preview.outcome(path, 'refused', 'deletes');
  elsif change.size_bytes > rule.max_bytes then
    return preview.outcome(path, 'refused', 'size');
  end if;
  select * into current from public.project_files f
  where f.project_id = project and f.is_current_version and f.file_path >= path order by f.file_path limit 1;
  if current.file_path is distinct from path then
    current := null;
  end if;
  is_there := coalesce(not current.is_deleted, false);
  if change.content_hash is not distinct from current.content_hash
     and (change.executable is null or change.action = 'delete' or change.executable = current.executable) then
    return preview.outcome(path, 'same') || jsonb_build_object('version', coalesce(current.version, 0),
                                                               'revision', coalesce(current.revision, 0));
  end if;
  if rule.mode = 'authored' then
    kept := preview.keep_change(project, session, 'proposal', change, limits);
    return preview.outcome(path, case when kept.rule is null then 'proposed' else 'refused' end, kept.rule, kept.kept_id);
  end if;
  if change.base_version <> coalesce(current.version, 0) and not (change.base_version = 0 and not is_there) then
    if change.action = 'delete' then
      return preview.outcome(path, 'refused', 'base');  -- a deletion goes over nothing that the container has not seen
    elsif exists (select from public.project_files v
                  where v.project_id = project and v.file_path = path and v.content_hash = change.content_hash) then
      return preview.outcome(path, 'conflict');  -- it is in the history
    end if;
    kept := preview.keep_change(project, session, 'conflict', change, limits);
    return preview.outcome(path, case when kept.rule is null then 'conflict' else 'refused' end, kept.rule, kept.kept_id);
  end if;
  if preview.came_before(project, path, change.content_hash, since) then
    return preview.outcome(path, 'refused', 'came_before');
  elsif (select count(*) from public.project_files v
         where v.project_id = project and v.file_path = path and v.origin = 'container' and v.revision > since) >= 20 then
    return preview.outcome(path, 'refused', 'restless');
  end if;
  return null;
end $$;
