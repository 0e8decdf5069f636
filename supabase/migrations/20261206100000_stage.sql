-- A save inside a turn, in fewer statements and calls. What it does and what it refuses is as it was.

-- Keeps the changes in the turn. No head is locked, so neither an ordinary save nor another turn waits for it.
create or replace function preview.stage(
  project uuid, turn uuid, changes preview.change[], bulk boolean, correlation_id text, limits preview.settings
) returns jsonb language plpgsql set search_path = '' as $$
declare
  it record;
  moment timestamptz;
  request text;
  answer jsonb;
  staged record;
  bad record;
begin
  -- One text with nothing wrong is the usual save: whatever else it is, is judged, and refused, there.
  if bulk or (changes[1]).content is null or octet_length((changes[1]).content) > limits.max_file_bytes
     or preview.path_problem((changes[1]).file_path) is not null then
    perform preview.check_changes(project, changes, bulk, limits);
  end if;
  if correlation_id is not null then
    perform from public.project_heads h where h.project_id = project for no key update;
    request := preview.digest_of(concat('stage ', turn, bulk, changes::text));
    answer := preview.answer_to(project, correlation_id, request, clock_timestamp(), limits.answers_kept);
    if answer is not null then
      return answer;
    end if;
  end if;
  select t.lease, t.files, t.bytes, t.window_start, t.window_writes into it from preview.turns t
  where t.id = turn and t.project_id = project and t.state = 'open' and t.kept_until >= clock_timestamp() for no key update;
  if not found then
    it := preview.open_turn(project, turn);  -- says what is wrong with it
  end if;
  moment := clock_timestamp();
  it.window_writes := case when it.window_start = date_trunc('minute', moment) then it.window_writes + 1 else 1 end;
  if it.window_writes > limits.turn_writes_per_minute then
    raise exception 'turn_id %: more than % writes in this minute', turn, limits.turn_writes_per_minute
      using errcode = 'PT429', hint = 'The turn is whole: wait for the next minute, or put many files into one apply_project_files.',
            detail = jsonb_build_object('retry_after', ceil(extract(epoch from
              date_trunc('minute', moment) + interval '1 minute' - moment)))::text;
  end if;

  -- One statement, one moment: the version that is expected is the version that becomes the base. What is refused below is undone.
  with met as (
    select c.action, c.file_path, c.file_type, c.content, c.content_hash, c.executable,
           coalesce(octet_length(c.content), 0) as size_bytes,
           case when is_based then s.base_id when not f.is_deleted then f.id end as base_id,
           case when is_based then s.base_version when not f.is_deleted then f.version else 0 end as base_version,
           s.file_path is not null as was_staged, coalesce(s.size_bytes, 0) as was_bytes, f.id is not null as was_ever,
           case when c.expected_version <> coalesce(f.version, 0) and not (c.expected_version = 0 and f.is_deleted)
             then jsonb_build_object(
               'file_path', c.file_path, 'expected_version', c.expected_version, 'version', coalesce(f.version, 0),
               'content_hash', f.content_hash, 'is_deleted', coalesce(f.is_deleted, true)) end as conflict
    from unnest(changes) c
    left join lateral (
      select t.file_path, t.base_id, t.base_version, t.size_bytes from preview.turn_changes t
      where t.turn_id = turn and t.file_path = c.file_path limit 1
    ) s on true
    left join lateral (
      select at.id, at.file_path, at.version, at.content_hash, at.is_deleted from public.project_files at
      where at.project_id = project and at.is_current_version and at.file_path >= c.file_path
      order by at.file_path limit 1
    ) f on f.file_path = c.file_path
    cross join lateral (select c.expected_version is null and s.file_path is not null) b(is_based)
  ), kept as (
    insert into preview.turn_changes as t (
      turn_id, file_path, action, file_type, content, content_hash, executable, size_bytes, base_id, base_version, staged_at)
    select turn, m.file_path, m.action, m.file_type, m.content, m.content_hash, m.executable, m.size_bytes, m.base_id, m.base_version, moment
    from met m
    on conflict (turn_id, file_path) do update set
      -- One after the other, as outside of a turn: what a write does not mention stays, and a deletion forgets the executable bit.
      action = excluded.action, content = excluded.content, content_hash = excluded.content_hash, size_bytes = excluded.size_bytes,
      base_id = excluded.base_id, base_version = excluded.base_version, staged_at = excluded.staged_at,
      file_type = coalesce(excluded.file_type, case
        when 'delete' in (t.action, excluded.action) or (t.content is null) = (excluded.content is null) then t.file_type end),
      executable = case when excluded.action = 'delete' then null
                        when t.action = 'delete' then coalesce(excluded.executable, false)
                        else coalesce(excluded.executable, t.executable) end
  )
  select count(*) filter (where not m.was_staged) as new_files, coalesce(sum(m.size_bytes - m.was_bytes), 0) as more_bytes,
         jsonb_agg(m.conflict) filter (where m.conflict is not null) as conflicts,
         bool_or(m.action = 'delete' and not m.was_staged and not m.was_ever) as was_never,
         coalesce(jsonb_agg(jsonb_build_object('file_path', m.file_path, 'base_version', m.base_version)), '[]') as files
  into staged from met m;
  if staged.conflicts is not null then
    select h.revision, h.epoch into bad from public.project_heads h where h.project_id = project;
    perform preview.refuse_conflicts((
      select jsonb_agg(c order by c ->> 'file_path' collate "C") from jsonb_array_elements(staged.conflicts) c
    ), bad.revision, bad.epoch, bulk, turn);
  elsif it.files + staged.new_files > limits.max_turn_files then
    raise exception 'turn_id %: % files in one turn, at most % are taken', turn, it.files + staged.new_files, limits.max_turn_files
      using errcode = 'PT413', hint = 'End the turn and begin another.';
  elsif it.bytes + staged.more_bytes > limits.max_turn_bytes then
    raise exception 'turn_id %: % bytes in one turn, at most % are taken', turn, it.bytes + staged.more_bytes, limits.max_turn_bytes
      using errcode = 'PT413', hint = 'End the turn and begin another.';
  elsif not bulk and staged.was_never then
    raise exception 'p_file_path %: there was never such a file', to_json((changes[1]).file_path) using errcode = 'PT404';
  end if;

  -- Among the turn's own files; with all the others it is looked at in the end, where a later deletion has made room.
  select found.upper_path, found.lower_path into bad
  from unnest(changes) w
  cross join lateral (
    (select w.file_path as upper_path, t.file_path as lower_path from preview.turn_changes t
     where t.turn_id = turn and t.action = 'update' and t.file_path > w.file_path || '/' and t.file_path < w.file_path || '0' limit 1)
    union all
    (select t.file_path, w.file_path from preview.turn_changes t
     where t.turn_id = turn and t.action = 'update' and t.file_path = any (array(
       select array_to_string(segments[:depth], '/')
       from string_to_array(w.file_path, '/') as segments, generate_series(1, cardinality(segments) - 1) as depth)) limit 1)
  ) as found
  where w.action = 'update'
  limit 1;
  if found then
    raise exception 'file_path %: a file of that name would be a directory of %', bad.upper_path, bad.lower_path
      using errcode = 'PT409', hint = 'Delete one of the two in the same turn before.',
            detail = jsonb_build_object('file_path', bad.upper_path, 'in_the_way_of', bad.lower_path)::text;
  end if;

  update preview.turns t
  set expires_at = moment + t.lease, kept_until = moment + limits.turn_kept, files = t.files + staged.new_files,
      bytes = t.bytes + staged.more_bytes, window_start = date_trunc('minute', moment), window_writes = it.window_writes
  where t.id = turn;
  answer := jsonb_build_object(
    'staged', true, 'turn_id', turn, 'expires_at', preview.rfc3339(moment + it.lease), 'files', staged.files);
  if correlation_id is not null then
    perform preview.keep_answer(project, correlation_id, request, answer, moment, limits.answers_kept);
  end if;
  return answer;
end $$;

drop type preview.staging;
