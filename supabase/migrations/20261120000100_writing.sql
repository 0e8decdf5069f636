-- The write path: three RPCs, one door, one function behind it.
--
-- The RPCs run with the caller's rights and own nothing but the reading of their arguments. They UPDATE one row of the
-- view `preview.write_gate`, in which the caller's row level security shows the projects that it may touch; the trigger
-- behind the view runs as the tables' owner and does the writing. So there is no function with higher rights that anybody
-- may call, no privilege to write to the tables, and no way past the versions, the revision, the limits and the broadcast.
--
-- On a live database: only new objects.
set local lock_timeout = '2s';

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
  project_id uuid not null references public.projects (id) on delete cascade,
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

-- Tells the project's topic about one commit, inside its transaction: what is rolled back was never said. Above the limit
-- the contents go by reference; a bulk whose references are still too many is a doorbell, and the log says the rest.
create function preview.broadcast(
  project_uuid uuid, bulk boolean, steps preview.step[], head_epoch uuid, head_revision bigint, moment timestamptz,
  sender text, limit_bytes integer
) returns void language plpgsql set search_path = '' as $$
declare
  common jsonb := jsonb_build_object('timestamp', preview.rfc3339(moment), 'sender', sender,
                                     'revision', head_revision, 'epoch', head_epoch);
  step preview.step := steps[1];
  event text;
  message jsonb;
  content_bytes bigint;
begin
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

-- ------------------------------------------------------------------------------------------------ the one writer
create view preview.write_gate with (security_invoker = true) as
  select id as project_id, null::preview.change[] as changes, null::boolean as bulk, null::text as correlation_id,
         null::jsonb as answer
  from public.projects;
comment on view preview.write_gate is
  'The door: `update … set changes = … where project_id = … returning answer`, for the projects that the caller may see.';

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
  select * into head from public.project_heads where project_id = new.project_id for update;
  if not found then
    raise exception 'project_uuid %: no such project', new.project_id using errcode = 'PT404';
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
    author := coalesce((select auth.uid()), (select p.owner_id from public.projects p where p.id = new.project_id));

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
  set changes = submit.changes, bulk = submit.bulk, correlation_id = submit.correlation_id
  where g.project_id = project_uuid
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

grant usage on schema preview to authenticated, service_role;
grant select, update (changes, bulk, correlation_id) on preview.write_gate to authenticated, service_role;
grant usage on type preview.change to authenticated, service_role;
grant execute on function preview.submit to authenticated, service_role;
grant execute on function public.upsert_project_file, public.delete_project_file, public.apply_project_files
  to authenticated, service_role;
