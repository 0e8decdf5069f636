-- Turns: many saves that belong together appear together, in one revision and one message. Until its end the database withholds
-- them; nothing that follows a project sees a turn before that. Also: every event leaves through one function,
-- a conflict names all paths, a correlation id belongs to one request, and members have a topic of their own.
--
-- Sections: the way out · settings and answers · turns · saying no · the write path · staging · the end of a turn · the door · the RPCs ·
-- reading · forgetting · rights · the members' topic
--
-- On a live database: three columns are added to small tables of ours without rewriting them, one to each answer as null. The
-- three writing RPCs and `list_current_files` are dropped and made again with one more optional argument, `p_turn_id`, because a second
-- form beside the first would leave PostgREST unable to choose; whoever was granted them keeps that, and a call by name or by
-- position finds the new one. A view or an SQL function with a parsed body (`begin atomic`) of the product's that calls one of the four
-- keeps it from being dropped, and the migration then changes nothing and says so: drop that object and make it again afterwards. The
-- policy that lets members hear a topic is altered, which waits for readers of realtime.messages, at most for the lock_timeout.
set local lock_timeout = '2s';

-- ------------------------------------------------------------------------------------------------ the way out
-- Every event leaves the database here, and nowhere else: one place to change when it shall also go elsewhere.
create function preview.publish(topic text, event text, payload jsonb) returns void
language plpgsql security invoker set search_path = '' as $$
begin
  perform realtime.send(payload, event, topic, true);
end $$;
comment on function preview.publish is 'Say one event on one topic, privately: it is heard once this transaction has committed.';

-- ------------------------------------------------------------------------------------------------ settings and answers
alter table preview.settings
  -- Alive at once, in one project. What a turn holds is not shared by versions, so it is bounded here.
  add column max_open_turns integer not null default 8 check (max_open_turns > 0),
  add column max_turn_files integer not null default 5000 check (max_turn_files > 0),
  add column max_turn_bytes integer not null default 16777216 check (max_turn_bytes > 0),
  -- Of each turn: staging sends no message, so Realtime's rate is not its own.
  add column turn_writes_per_minute integer not null default 6000 check (turn_writes_per_minute > 0),
  -- Of each project.
  add column turns_per_minute integer not null default 60 check (turns_per_minute > 0),
  -- After its last write a turn can be resumed for so long; after its end its answer is given again for so long.
  add column turn_kept interval not null default '24 hours' check (turn_kept > '0'),
  -- Whoever asks again asks within minutes.
  add column answers_kept interval not null default '24 hours' check (answers_kept > '0');

alter table preview.answers add column request text;
comment on column preview.answers.request is 'A hash of what was asked; null: answered before there were hashes.';

create function preview.digest_of(request text) returns text
language plpgsql immutable parallel safe set search_path = '' as $$
begin
  return encode(sha256(convert_to(request, 'UTF8')), 'hex');
end $$;

-- The first answer to a correlation id; null: it is new, or its answer has expired. The caller holds the project's head.
create function preview.answer_to(project uuid, correlation_id text, request text, moment timestamptz, kept interval)
returns jsonb language plpgsql stable set search_path = '' as $$
declare
  known record;
begin
  select a.answer, a.request into known from preview.answers a
  where a.project_id = project and a.correlation_id = answer_to.correlation_id and a.created_at > moment - kept;
  if not found then
    return null;
  elsif known.request <> answer_to.request then
    raise exception 'p_correlation_id %: another request was made under this id', to_json(correlation_id)
      using errcode = 'PT422', hint = 'Give each request an id of its own, and repeat it only with the same arguments.';
  end if;
  return known.answer;
end $$;

-- Keeps an answer, and forgets two that have expired: so the table stays as large as what is asked within `kept`.
create function preview.keep_answer(
  project uuid, correlation_id text, request text, answer jsonb, moment timestamptz, kept interval
) returns void language plpgsql set search_path = '' as $$
begin
  delete from preview.answers a where a.ctid = any (array(
    select old.ctid from preview.answers old where old.created_at < moment - kept
    order by old.created_at limit 2 for update skip locked));
  insert into preview.answers as a (project_id, correlation_id, answer, created_at, request)
  values (project, keep_answer.correlation_id, keep_answer.answer, moment, keep_answer.request)
  on conflict on constraint answers_pkey do update
  set answer = excluded.answer, created_at = excluded.created_at, request = excluded.request;
end $$;

-- ------------------------------------------------------------------------------------------------ turns
-- Whoever writes locks the project's head before a turn, or a turn alone: a deletion takes them in that order.
create table preview.turns (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  -- The history that its bases are of: after a restore from a backup they are of another.
  epoch uuid not null,
  label text check (octet_length(label) between 1 and 200),
  state text not null default 'open' check (state in ('open', 'ended', 'abandoned', 'reaped')),
  begun_by uuid,
  begun_at timestamptz not null,
  lease interval not null,
  -- Renewed by each write. After it the turn gives its place to a new one, if there is no other; else nothing happens.
  expires_at timestamptz not null,
  -- Until then it can be resumed.
  kept_until timestamptz not null,
  files integer not null default 0,
  bytes bigint not null default 0,
  window_start timestamptz not null default '-infinity',
  window_writes integer not null default 0,
  closed_at timestamptz,
  -- Taken into an orchestrator's metrics: each turn by one of them.
  counted boolean not null default false,
  -- Of an ended one: the commit that it became (null: it changed nothing), and what whoever ends it again is answered.
  revision bigint,
  answer jsonb
) with (fillfactor = 50);  -- updated by every write of its own
create index turns_project_id_idx on preview.turns (project_id, begun_at);
create index turns_open_idx on preview.turns (begun_at) where state = 'open';
create index turns_closed_idx on preview.turns (closed_at) where state <> 'open';
create index turns_to_count_idx on preview.turns (id) where state <> 'open' and not counted;
alter table preview.turns enable row level security;
comment on table preview.turns is 'Saves that belong together, withheld until their end.';

create table preview.turn_changes (
  turn_id uuid not null references preview.turns (id) on delete cascade,
  file_path text collate "C" not null,
  action text not null,
  file_type text,
  content text,
  content_hash text,
  executable boolean,
  size_bytes integer not null,
  -- What the file was when the turn first wrote it: a version of it, or nothing (null and 0).
  base_id uuid,
  base_version integer not null,
  staged_at timestamptz not null,
  primary key (turn_id, file_path)
);
alter table preview.turn_changes enable row level security;
comment on table preview.turn_changes is 'What an open turn will do to each path: the last word of its writers.';

-- A change beside what it meets, as `preview.step` is for an ordinary write.
create type preview.staging as (
  action text,
  file_path text,
  file_type text,
  content text,
  content_hash text,
  executable boolean,
  size_bytes integer,
  base_id uuid,
  base_version integer,
  was_staged boolean,
  was_bytes integer,
  was_ever boolean,
  conflict jsonb
);

-- ------------------------------------------------------------------------------------------------ saying no
create function preview.refuse_project(project uuid) returns void
language plpgsql stable set search_path = '' as $$
begin
  if exists (select from preview.deleted_projects d where d.project_id = project) then
    raise exception 'project_uuid %: a project of this id was deleted, and its id is not used again', project
      using errcode = 'PT410', hint = 'Make the project under a new id.';
  end if;
  raise exception 'project_uuid %: no such project', project using errcode = 'PT404';
end $$;

-- `conflicts`: an array of {file_path, expected_version, version, content_hash, is_deleted}. The first is spread out in the
-- detail, as it is for a write of one file.
create function preview.refuse_conflicts(conflicts jsonb, revision bigint, epoch uuid, bulk boolean, turn uuid default null) returns void
language plpgsql stable set search_path = '' as $$
declare
  first jsonb := conflicts -> 0;
  others integer := jsonb_array_length(conflicts) - 1;
begin
  raise exception 'expected_version %: % is at version %', first ->> 'expected_version', first ->> 'file_path', first ->> 'version' ||
    case when others > 0 then format(', and %s more of these files %s not at what was expected', others,
                                     case others when 1 then 'is' else 'are' end) else '' end
    using errcode = 'PT409',
          detail = (first - 'expected_version' || jsonb_build_object('revision', revision, 'epoch', epoch)
            || case when bulk then jsonb_build_object('conflicts', conflicts) else '{}' end
            || case when turn is not null then jsonb_build_object('turn_id', turn) else '{}' end)::text,
          hint = case when turn is null then 'Read the current version, merge, and write again with its number.'
            else 'The turn is still open: write each of these files again with its current version as expected_version, or end the '
                 'turn with p_force.' end;
end $$;

create function preview.check_changes(project uuid, changes preview.change[], bulk boolean, limits preview.settings) returns void
language plpgsql stable set search_path = '' as $$
declare
  bad record;
begin
  if cardinality(changes) > limits.max_bulk_files then
    raise exception 'changes: % files in one write, at most % are taken', cardinality(changes), limits.max_bulk_files
      using errcode = 'PT413';
  end if;
  select c.file_path, preview.path_problem(c.file_path) as rule into bad
  from unnest(changes) c where preview.path_problem(c.file_path) is not null limit 1;
  if found then
    raise exception 'file_path %: not a path that a project can hold (%)', to_json(left(bad.file_path, 200)), bad.rule
      using errcode = 'PT400', detail = jsonb_build_object('file_path', left(bad.file_path, 1024), 'rule', bad.rule)::text;
  end if;
  select c.file_path, octet_length(c.content) as size into bad
  from unnest(changes) c where octet_length(c.content) > limits.max_file_bytes limit 1;
  if found then
    raise exception 'content of %: % bytes, at most % are taken', bad.file_path, bad.size, limits.max_file_bytes
      using errcode = 'PT413';
  end if;
  if bulk then
    select sum(octet_length(c.content)) as size into bad from unnest(changes) c;
    if bad.size > limits.max_bulk_bytes then
      raise exception 'changes: % bytes in one write, at most % are taken', bad.size, limits.max_bulk_bytes
        using errcode = 'PT413';
    end if;
    select c.file_path into bad from unnest(changes) c group by c.file_path having count(*) > 1 limit 1;
    if found then
      raise exception 'changes: % is named twice', bad.file_path using errcode = 'PT400';
    end if;
  end if;
  if bulk or (changes[1]).content is null then
    -- A binary file is its hash here; the bytes must be where readers will look for them.
    select c.file_path, c.content_hash into bad
    from unnest(changes) c
    where c.action = 'update' and c.content is null and not exists (
      select from storage.objects o
      where o.bucket_id = 'project-assets' and o.name = project || '/' || c.content_hash
    ) limit 1;
    if found then
      raise exception 'content of %: there is no object project-assets/%/%', bad.file_path, project, bad.content_hash
        using errcode = 'PT400', hint = 'Upload the bytes under their SHA-256 first.';
    end if;
  end if;
end $$;

-- ------------------------------------------------------------------------------------------------ the write path
drop function preview.broadcast(uuid, boolean, preview.step[], uuid, bigint, timestamptz, text, integer);
-- Tells the project's topic about one commit, inside its transaction: what is rolled back was never said. Above the limit
-- the contents go by reference; a bulk whose references are still too many is a doorbell, and the log says the rest.
create function preview.broadcast(
  project_uuid uuid, bulk boolean, steps preview.step[], head_epoch uuid, head_revision bigint, moment timestamptz,
  sender text, limit_bytes integer, turn uuid default null, label text default null
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
  if turn is not null then
    common := common || jsonb_build_object('turn', turn);
    if label is not null then
      common := common || jsonb_build_object('label', label);
    end if;
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
  perform preview.publish('project:' || project_uuid, event, message);
end $$;

-- `turn` and `label` are granted to nobody: only the end of a turn, below, says them.
create or replace view preview.write_gate with (security_invoker = true) as
  select null::uuid as project_id, null::preview.change[] as changes, null::boolean as bulk, null::text as correlation_id,
         null::jsonb as answer, not row_security_active('public.project_files'::regclass) as unrestricted,
         null::uuid as turn, null::text as label;

-- As it was, but: conflicts are told all at once, a correlation id is held to its request and its answer expires, and a
-- commit may be a turn's. (Its plans are kept, and a look-up by path leaves no choice: see the first migration.)
create or replace function preview.write() returns trigger
language plpgsql security definer set search_path = ''
  set plan_cache_mode = 'force_generic_plan' set enable_seqscan = off set enable_sort = off as $$
declare
  limits preview.settings;
  head public.project_heads;
  author uuid;
  moment timestamptz;
  steps preview.step[];
  fresh preview.step[];
  request text;
  conflicts jsonb;
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

  -- Whatever is wrong with the arguments is said before anything is locked.
  perform preview.check_changes(new.project_id, new.changes, new.bulk, limits);

  -- From here on this is the project's only writer, until the transaction ends.
  select * into head from public.project_heads where project_id = new.project_id for no key update;
  if not found then
    if not preview.give_head(new.project_id) then
      perform preview.refuse_project(new.project_id);
    end if;
    select * into strict head from public.project_heads where project_id = new.project_id for no key update;
  end if;
  moment := clock_timestamp();

  if new.correlation_id is not null then
    request := preview.digest_of(concat('write ', new.bulk, new.changes::text));
    new.answer := preview.answer_to(new.project_id, new.correlation_id, request, moment, limits.answers_kept);
    if new.answer is not null then
      return new;
    end if;
  end if;

  if new.bulk or (new.changes[1]).expected_version is not null then
    select jsonb_agg(jsonb_build_object(
             'file_path', c.file_path, 'expected_version', c.expected_version, 'version', coalesce(f.version, 0),
             'content_hash', f.content_hash, 'is_deleted', coalesce(f.is_deleted, true)) order by c.file_path collate "C")
    into conflicts
    from unnest(new.changes) c
    left join lateral (
      select at.file_path, at.version, at.content_hash, at.is_deleted from public.project_files at
      where at.project_id = new.project_id and at.is_current_version and at.file_path >= c.file_path
      order by at.file_path limit 1
    ) f on f.file_path = c.file_path
    where c.expected_version <> coalesce(f.version, 0)
      and not (c.expected_version = 0 and f.is_deleted);
    if conflicts is not null then
      perform preview.refuse_conflicts(conflicts, head.revision, head.epoch, new.bulk);
    end if;
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
  -- A repeat that changes nothing counts as a write where its answer has to be kept.
  if fresh is not null or new.correlation_id is not null then
    update public.project_heads h
    set revision = h.revision + (fresh is not null)::int, updated_at = case when fresh is null then h.updated_at else moment end,
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
  end if;
  if fresh is not null then
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
      coalesce((select auth.uid())::text, (select auth.role()), session_user::text), limits.broadcast_limit_bytes,
      new.turn, new.label);
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
    perform preview.keep_answer(new.project_id, new.correlation_id, request, new.answer, moment, limits.answers_kept);
  end if;
  return new;
end $$;

-- ------------------------------------------------------------------------------------------------ staging
-- The open turn of that id, locked. Whatever is wrong with it is said.
create function preview.open_turn(project uuid, turn uuid) returns preview.turns
language plpgsql set search_path = '' as $$
declare
  it preview.turns;
begin
  select * into it from preview.turns t where t.id = turn and t.project_id = project for no key update;
  if not found then
    if not exists (select from public.project_heads h where h.project_id = project) and not preview.there_is(project) then
      perform preview.refuse_project(project);
    end if;
    raise exception 'turn_id %: no such turn in this project', turn
      using errcode = 'PT404', hint = 'A turn is forgotten a day after it is over: begin a new one.';
  elsif it.state <> 'open' or it.kept_until < clock_timestamp() then
    raise exception 'turn_id %: the turn is over (%)', turn, case when it.state = 'open' then 'reaped' else it.state end
      using errcode = 'PT410', hint = 'Begin a new turn.',
            detail = jsonb_build_object('turn_id', turn, 'state', case when it.state = 'open' then 'reaped' else it.state end)::text;
  end if;
  return it;
end $$;

-- The end of a turn that nobody ended: what it held is gone, the row stays for a while to say so.
create function preview.close_turn(turn uuid, state text, moment timestamptz) returns void
language plpgsql set search_path = '' as $$
begin
  update preview.turns t set state = close_turn.state, closed_at = moment where t.id = turn;
  delete from preview.turn_changes c where c.turn_id = turn;
end $$;

create function preview.begin_turn(project uuid, label text, lease_seconds integer, limits preview.settings) returns jsonb
language plpgsql set search_path = '' as $$
declare
  head public.project_heads;
  moment timestamptz;
  place uuid;
  open record;
  begun preview.turns;
begin
  if not preview.give_head(project) then
    perform preview.refuse_project(project);
  end if;
  select * into strict head from public.project_heads h where h.project_id = project for no key update;
  moment := clock_timestamp();
  if (select count(*) from preview.turns t where t.project_id = project and t.begun_at > moment - interval '1 minute')
     >= limits.turns_per_minute then
    raise exception 'project_uuid %: more than % turns begun in this minute', project, limits.turns_per_minute
      using errcode = 'PT429', detail = '{"retry_after": 60}', hint = 'Put more saves into one turn.';
  end if;
  select count(*) as n, min(t.expires_at) as first into open from preview.turns t where t.project_id = project and t.state = 'open';
  if open.n >= limits.max_open_turns then
    -- A turn that nobody renews gives its place away, the longest unattended first.
    select t.id into place from preview.turns t
    where t.project_id = project and t.state = 'open' and t.expires_at < moment
    order by t.expires_at limit 1 for no key update skip locked;
    if not found then
      raise exception 'project_uuid %: % turns are open, at most % may be', project, open.n, limits.max_open_turns
        using errcode = 'PT429', hint = 'End or abandon one of them, or wait for the lease of one to run out.',
              detail = jsonb_build_object('retry_after', greatest(1, ceil(extract(epoch from open.first - moment))))::text;
    end if;
    perform preview.close_turn(place, 'reaped', moment);
  end if;
  insert into preview.turns (project_id, epoch, label, begun_by, begun_at, lease, expires_at, kept_until)
  values (project, head.epoch, begin_turn.label, (select auth.uid()), moment, make_interval(secs => lease_seconds),
          moment + make_interval(secs => lease_seconds), moment + limits.turn_kept)
  returning * into begun;
  return jsonb_build_object('turn_id', begun.id, 'expires_at', preview.rfc3339(begun.expires_at));
end $$;

-- Keeps the changes in the turn. No head is locked, so neither an ordinary save nor another turn waits for it.
create function preview.stage(
  project uuid, turn uuid, changes preview.change[], bulk boolean, correlation_id text, limits preview.settings
) returns jsonb language plpgsql set search_path = '' as $$
declare
  it preview.turns;
  moment timestamptz;
  request text;
  answer jsonb;
  staged preview.staging[];
  sums record;
  bad record;
begin
  perform preview.check_changes(project, changes, bulk, limits);
  if correlation_id is not null then
    perform from public.project_heads h where h.project_id = project for no key update;
    request := preview.digest_of(concat('stage ', turn, bulk, changes::text));
    answer := preview.answer_to(project, correlation_id, request, clock_timestamp(), limits.answers_kept);
    if answer is not null then
      return answer;
    end if;
  end if;
  it := preview.open_turn(project, turn);
  moment := clock_timestamp();
  it.window_writes := case when it.window_start = date_trunc('minute', moment) then it.window_writes + 1 else 1 end;
  if it.window_writes > limits.turn_writes_per_minute then
    raise exception 'turn_id %: more than % writes in this minute', turn, limits.turn_writes_per_minute
      using errcode = 'PT429', hint = 'The turn is whole: wait for the next minute, or put many files into one apply_project_files.',
            detail = jsonb_build_object('retry_after', ceil(extract(epoch from
              date_trunc('minute', moment) + interval '1 minute' - moment)))::text;
  end if;

  -- One statement, one moment: the version that is expected is the version that becomes the base.
  select array_agg(row(
           c.action, c.file_path, c.file_type, c.content, c.content_hash, c.executable, coalesce(octet_length(c.content), 0),
           case when is_based then s.base_id when not f.is_deleted then f.id end,
           case when is_based then s.base_version when not f.is_deleted then f.version else 0 end,
           s.file_path is not null, coalesce(s.size_bytes, 0), f.id is not null,
           case when c.expected_version <> coalesce(f.version, 0) and not (c.expected_version = 0 and f.is_deleted)
             then jsonb_build_object(
               'file_path', c.file_path, 'expected_version', c.expected_version, 'version', coalesce(f.version, 0),
               'content_hash', f.content_hash, 'is_deleted', coalesce(f.is_deleted, true)) end
         )::preview.staging)
  into staged
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
  cross join lateral (select c.expected_version is null and s.file_path is not null) b(is_based);

  select count(*) filter (where not s.was_staged) as files, coalesce(sum(s.size_bytes - s.was_bytes), 0) as bytes,
         jsonb_agg(s.conflict order by s.file_path collate "C") filter (where s.conflict is not null) as conflicts
  into sums from unnest(staged) s;
  if sums.conflicts is not null then
    select h.revision, h.epoch into bad from public.project_heads h where h.project_id = project;
    perform preview.refuse_conflicts(sums.conflicts, bad.revision, bad.epoch, bulk, turn);
  elsif it.files + sums.files > limits.max_turn_files then
    raise exception 'turn_id %: % files in one turn, at most % are taken', turn, it.files + sums.files, limits.max_turn_files
      using errcode = 'PT413', hint = 'End the turn and begin another.';
  elsif it.bytes + sums.bytes > limits.max_turn_bytes then
    raise exception 'turn_id %: % bytes in one turn, at most % are taken', turn, it.bytes + sums.bytes, limits.max_turn_bytes
      using errcode = 'PT413', hint = 'End the turn and begin another.';
  elsif not bulk and staged[1].action = 'delete' and not staged[1].was_staged and not staged[1].was_ever then
    raise exception 'p_file_path %: there was never such a file', to_json(staged[1].file_path) using errcode = 'PT404';
  end if;

  insert into preview.turn_changes as t (
    turn_id, file_path, action, file_type, content, content_hash, executable, size_bytes, base_id, base_version, staged_at)
  select turn, s.file_path, s.action, s.file_type, s.content, s.content_hash, s.executable, s.size_bytes, s.base_id, s.base_version, moment
  from unnest(staged) s
  on conflict (turn_id, file_path) do update set
    -- One after the other, as outside of a turn: what a write does not mention stays, and a deletion forgets the executable bit.
    action = excluded.action, content = excluded.content, content_hash = excluded.content_hash, size_bytes = excluded.size_bytes,
    base_id = excluded.base_id, base_version = excluded.base_version, staged_at = excluded.staged_at,
    file_type = coalesce(excluded.file_type, case
      when 'delete' in (t.action, excluded.action) or (t.content is null) = (excluded.content is null) then t.file_type end),
    executable = case when excluded.action = 'delete' then null
                      when t.action = 'delete' then coalesce(excluded.executable, false)
                      else coalesce(excluded.executable, t.executable) end;

  -- Among the turn's own files; with all the others it is looked at in the end, where a later deletion has made room.
  select found.upper_path, found.lower_path into bad
  from unnest(staged) w
  cross join lateral (
    (select w.file_path as upper_path, t.file_path as lower_path from preview.turn_changes t
     where t.turn_id = turn and t.action = 'update' and t.file_path > w.file_path || '/' and t.file_path < w.file_path || '0' limit 1)
    union all
    (select t.file_path, w.file_path from preview.turn_changes t
     where t.turn_id = turn and t.action = 'update' and t.file_path = any (array(select preview.parents(w.file_path))) limit 1)
  ) as found
  where w.action = 'update'
  limit 1;
  if found then
    raise exception 'file_path %: a file of that name would be a directory of %', bad.upper_path, bad.lower_path
      using errcode = 'PT409', hint = 'Delete one of the two in the same turn before.',
            detail = jsonb_build_object('file_path', bad.upper_path, 'in_the_way_of', bad.lower_path)::text;
  end if;

  update preview.turns t
  set expires_at = moment + t.lease, kept_until = moment + limits.turn_kept, files = t.files + sums.files, bytes = t.bytes + sums.bytes,
      window_start = date_trunc('minute', moment), window_writes = it.window_writes
  where t.id = turn;
  select jsonb_build_object(
    'staged', true, 'turn_id', turn, 'expires_at', preview.rfc3339(moment + it.lease),
    'files', coalesce(jsonb_agg(jsonb_build_object('file_path', s.file_path, 'base_version', s.base_version)), '[]'))
  into answer from unnest(staged) s;
  if correlation_id is not null then
    perform preview.keep_answer(project, correlation_id, request, answer, moment, limits.answers_kept);
  end if;
  return answer;
end $$;

-- ------------------------------------------------------------------------------------------------ the end of a turn
create function preview.end_turn(project uuid, turn uuid, force boolean, correlation_id text, limits preview.settings) returns jsonb
language plpgsql set search_path = '' as $$
declare
  request text := preview.digest_of(concat('end ', turn));
  head public.project_heads;
  moment timestamptz;
  it preview.turns;
  conflicts jsonb;
  outcome jsonb;
begin
  select * into head from public.project_heads h where h.project_id = project for no key update;
  moment := clock_timestamp();
  if correlation_id is not null then
    outcome := preview.answer_to(project, correlation_id, request, moment, limits.answers_kept);
    if outcome is not null then
      return outcome;
    end if;
  end if;
  select * into it from preview.turns t where t.id = turn and t.project_id = project for no key update;
  if it.state = 'ended' then
    outcome := it.answer;
  else
    it := preview.open_turn(project, turn);
    if it.epoch <> head.epoch then
      raise exception 'turn_id %: the project''s history was replaced since the turn began', turn
        using errcode = 'PT410', detail = jsonb_build_object('turn_id', turn, 'state', it.state)::text,
              hint = 'Abandon the turn, read the current files and begin a new one.';
    end if;
    if not force then
      select jsonb_agg(jsonb_build_object(
               'file_path', c.file_path, 'expected_version', c.base_version, 'version', coalesce(f.version, 0),
               'content_hash', f.content_hash, 'is_deleted', coalesce(f.is_deleted, true)) order by c.file_path collate "C")
      into conflicts
      from preview.turn_changes c
      left join lateral (
        select at.id, at.file_path, at.version, at.content_hash, at.is_deleted from public.project_files at
        where at.project_id = project and at.is_current_version and at.file_path >= c.file_path
        order by at.file_path limit 1
      ) f on f.file_path = c.file_path
      where c.turn_id = turn and c.base_id is distinct from case when not f.is_deleted then f.id end;
      if conflicts is not null then
        perform preview.refuse_conflicts(conflicts, head.revision, head.epoch, true, turn);
      end if;
    end if;
    update preview.write_gate g
    set project_id = project, bulk = true, turn = end_turn.turn, label = it.label, changes = (
      select coalesce(array_agg(row(c.action, c.file_path, c.file_type, c.content, c.content_hash, c.executable, null)::preview.change), '{}')
      from preview.turn_changes c where c.turn_id = end_turn.turn)
    returning g.answer into outcome;
    update preview.turns t
    set state = 'ended', closed_at = moment, answer = outcome,
        revision = case when outcome ->> 'changed' <> '0' then (outcome ->> 'revision')::bigint end
    where t.id = end_turn.turn;
    delete from preview.turn_changes c where c.turn_id = end_turn.turn;
  end if;
  if correlation_id is not null then
    perform preview.keep_answer(project, correlation_id, request, outcome, moment, limits.answers_kept);
  end if;
  return outcome;
end $$;

create function preview.abandon_turn(project uuid, turn uuid) returns jsonb
language plpgsql set search_path = '' as $$
declare
  is_abandoned boolean;
begin
  select t.state = 'abandoned' into is_abandoned from preview.turns t where t.id = turn and t.project_id = project;
  if is_abandoned is not true then
    perform preview.open_turn(project, turn);
    perform preview.close_turn(turn, 'abandoned', clock_timestamp());
  end if;
  return jsonb_build_object('turn_id', turn, 'state', 'abandoned');
end $$;

-- ------------------------------------------------------------------------------------------------ the door
-- As `preview.write_gate` is: the RPCs have their caller's rights, and the trigger asks whether the caller may write.
create view preview.turn_gate with (security_invoker = true) as
  select null::uuid as project_id, null::text as act, null::uuid as turn_id, null::preview.change[] as changes, null::boolean as bulk,
         null::text as correlation_id, null::text as label, null::integer as lease_seconds, null::boolean as force,
         null::jsonb as answer, not row_security_active('public.project_files'::regclass) as unrestricted;
comment on view preview.turn_gate is 'The door of turns: `update … set act = begin | stage | end | abandon, … returning answer`.';

create function preview.turn() returns trigger
language plpgsql security definer set search_path = ''
  set plan_cache_mode = 'force_generic_plan' set enable_seqscan = off set enable_sort = off as $$
declare
  limits preview.settings;
begin
  if not old.unrestricted then
    if auth.uid() is null or coalesce(auth.jwt() ? 'project_id', false)
       or not coalesce(preview.may_access(new.project_id, auth.uid(), 'write'), false)
    then
      return null;
    end if;
  end if;
  select * into strict limits from preview.settings;
  new.answer := case new.act
    when 'stage' then preview.stage(new.project_id, new.turn_id, new.changes, new.bulk, new.correlation_id, limits)
    when 'begin' then preview.begin_turn(new.project_id, new.label, new.lease_seconds, limits)
    when 'end' then preview.end_turn(new.project_id, new.turn_id, coalesce(new.force, false), new.correlation_id, limits)
    when 'abandon' then preview.abandon_turn(new.project_id, new.turn_id)
  end;
  return new;
end $$;
create trigger turn instead of update on preview.turn_gate for each row execute function preview.turn();

-- The caller's way to both doors.
drop function preview.submit(uuid, preview.change[], boolean, text);
create function preview.submit(
  project_uuid uuid, changes preview.change[], bulk boolean, correlation_id text, turn_id uuid default null
) returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  end if;
  if correlation_id = '' or octet_length(correlation_id) > 200 then
    raise exception 'p_correlation_id must have 1 to 200 bytes' using errcode = 'PT400';
  end if;
  if submit.turn_id is null then
    update preview.write_gate g
    set project_id = project_uuid, changes = submit.changes, bulk = submit.bulk, correlation_id = submit.correlation_id
    returning g.answer into result;
  else
    update preview.turn_gate g
    set project_id = project_uuid, act = 'stage', turn_id = submit.turn_id, changes = submit.changes, bulk = submit.bulk,
        correlation_id = submit.correlation_id
    returning g.answer into result;
  end if;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;

-- ------------------------------------------------------------------------------------------------ the RPCs
create function public.begin_turn(project_uuid uuid, p_label text default null, p_lease_seconds integer default 60)
returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  elsif p_label = '' or octet_length(p_label) > 200 then
    raise exception 'p_label must have 1 to 200 bytes' using errcode = 'PT400';
  elsif p_lease_seconds is null or p_lease_seconds not between 1 and 3600 then
    raise exception 'p_lease_seconds must be 1 to 3600' using errcode = 'PT400';
  end if;
  update preview.turn_gate g
  set project_id = project_uuid, act = 'begin', label = p_label, lease_seconds = p_lease_seconds
  returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;
comment on function public.begin_turn is
  'Begin a turn: what is written with its id as p_turn_id appears at its end, all at once. Each write renews the lease.';

create function public.end_turn(project_uuid uuid, turn_id uuid, p_force boolean default false, p_correlation_id text default null)
returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null or end_turn.turn_id is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' else 'turn_id' end using errcode = 'PT400';
  elsif p_correlation_id = '' or octet_length(p_correlation_id) > 200 then
    raise exception 'p_correlation_id must have 1 to 200 bytes' using errcode = 'PT400';
  end if;
  update preview.turn_gate g
  set project_id = project_uuid, act = 'end', turn_id = end_turn.turn_id, force = p_force, correlation_id = p_correlation_id
  returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;
comment on function public.end_turn is
  'Write all of a turn in one transaction, one revision, one message. Ended again, it answers what it did before.';

create function public.abandon_turn(project_uuid uuid, turn_id uuid)
returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null or abandon_turn.turn_id is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' else 'turn_id' end using errcode = 'PT400';
  end if;
  update preview.turn_gate g set project_id = project_uuid, act = 'abandon', turn_id = abandon_turn.turn_id
  returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;
comment on function public.abandon_turn is 'Forget a turn and all that was written in it.';

-- Whom the product granted the four that are made anew.
create temporary table granted on commit drop as
  select p.proname, a.grantee, a.is_grantable from pg_proc p cross join lateral aclexplode(p.proacl) a
  where p.pronamespace = 'public'::regnamespace and a.privilege_type = 'EXECUTE' and a.grantee <> p.proowner and a.grantee <> 0
    and p.proname in ('upsert_project_file', 'delete_project_file', 'apply_project_files', 'list_current_files');
drop function public.upsert_project_file(uuid, text, text, text, integer, text);
drop function public.delete_project_file(uuid, text, integer, text);
drop function public.apply_project_files(uuid, jsonb, text);
drop function public.list_current_files(uuid);

create function public.upsert_project_file(
  project_uuid uuid, p_file_path text, p_content text, p_file_type text default null, expected_version integer default null,
  p_correlation_id text default null, p_turn_id uuid default null
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
    row('update', p_file_path, p_file_type, p_content, null, null, expected_version)::preview.change], false, p_correlation_id, p_turn_id);
  return (result - 'files' - 'changed') || (result -> 'files' -> 0);
end $$;
comment on function public.upsert_project_file is
  'Write one text file. `expected_version` n: only if it is at n (0: only if it is not there); null: the last write wins.';

create function public.delete_project_file(
  project_uuid uuid, p_file_path text, expected_version integer default null, p_correlation_id text default null,
  p_turn_id uuid default null
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
    row('delete', p_file_path, null, null, null, null, expected_version)::preview.change], false, p_correlation_id, p_turn_id);
  if p_turn_id is null and result -> 'files' -> 0 ->> 'version' = '0' then
    raise exception 'p_file_path %: there was never such a file', to_json(p_file_path) using errcode = 'PT404';
  end if;
  return (result - 'files' - 'changed') || (result -> 'files' -> 0);
end $$;
comment on function public.delete_project_file is 'Delete one file, by a tombstone. Deleting it again changes nothing.';

create function public.apply_project_files(project_uuid uuid, changes jsonb, p_correlation_id text default null, p_turn_id uuid default null)
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
  return preview.submit(project_uuid, parsed, true, p_correlation_id, p_turn_id);
end $$;
comment on function public.apply_project_files is
  'Write many files in one transaction, one revision, one message: all of them or none.';

-- ------------------------------------------------------------------------------------------------ reading
-- With the caller's rights. One statement, one moment, in either form. A file that the turn wrote has its base as its version:
-- given back as expected_version, it says whether somebody else has written the file since.
create function public.list_current_files(project_uuid uuid, p_turn_id uuid default null)
returns table (
  file_path text, file_type text, content text, content_hash text, version integer, updated_at timestamptz,
  size_bytes bigint, encoding text, executable boolean
) language plpgsql stable security invoker set search_path = '' as $$
#variable_conflict use_column
declare
  state text;
begin
  if p_turn_id is null then
    return query
      select f.file_path, f.file_type, f.content, f.content_hash, f.version, f.updated_at, f.size_bytes, f.encoding, f.executable
      from public.project_files_current f
      where f.project_id = project_uuid
      order by f.file_path;
    return;
  end if;
  select case when t.state = 'open' and t.kept_until < clock_timestamp() then 'reaped' else t.state end into state
  from preview.turns t where t.id = p_turn_id and t.project_id = project_uuid;
  if not found then
    raise exception 'p_turn_id %: no such turn in this project', p_turn_id using errcode = 'PT404';
  elsif state <> 'open' then
    raise exception 'p_turn_id %: the turn is over (%)', p_turn_id, state using errcode = 'PT410', hint = 'Begin a new turn.',
      detail = jsonb_build_object('turn_id', p_turn_id, 'state', state)::text;
  end if;
  return query
    select f.file_path, f.file_type, f.content, f.content_hash, f.version, f.updated_at, f.size_bytes, f.encoding, f.executable
    from public.project_files_current f
    where f.project_id = project_uuid
      and not exists (select from preview.turn_changes c where c.turn_id = p_turn_id and c.file_path = f.file_path)
    union all
    select c.file_path,
           coalesce(c.file_type, case when f.encoding = case when c.content is null then 'base64' else 'utf-8' end then f.file_type end,
                    case when c.content is null then 'binary' else preview.file_type_of(c.file_path) end),
           c.content, coalesce(c.content_hash, encode(sha256(convert_to(c.content, 'UTF8')), 'hex')), c.base_version, c.staged_at,
           case when c.content is null then coalesce((
             select (o.metadata ->> 'size')::bigint from storage.objects o
             where o.bucket_id = 'project-assets' and o.name = project_uuid || '/' || c.content_hash), 0)
           else c.size_bytes end,
           case when c.content is null then 'base64' else 'utf-8' end, coalesce(c.executable, f.executable, false)
    from preview.turn_changes c
    left join public.project_files_current f on f.project_id = project_uuid and f.file_path = c.file_path
    where c.turn_id = p_turn_id and c.action = 'update'
    order by 1;
end $$;
comment on function public.list_current_files is
  'The files of today, by path; with p_turn_id, as they would be after that turn. A binary file has content null.';

-- ------------------------------------------------------------------------------------------------ forgetting
-- Turns that nobody has written to for `turn_kept` are over, and those that have been over for as long are forgotten; so are
-- answers that have expired. At most `most` of each, so that no call holds anything for long. Whoever looks after the database calls
-- it now and then; the orchestrator does.
create function preview.reap_turns(most integer default 100) returns jsonb
language plpgsql set search_path = '' as $$
declare
  limits preview.settings;
  moment timestamptz := clock_timestamp();
  each uuid;
  reaped integer := 0;
  forgotten integer;
  answers integer;
begin
  select * into strict limits from preview.settings;
  for each in
    select t.id from preview.turns t where t.state = 'open' and t.kept_until < moment limit most for no key update skip locked
  loop
    perform preview.close_turn(each, 'reaped', moment);
    reaped := reaped + 1;
  end loop;
  delete from preview.turns t where t.id in (
    select old.id from preview.turns old where old.state <> 'open' and old.closed_at < moment - limits.turn_kept
    order by old.closed_at limit most for update skip locked);
  get diagnostics forgotten = row_count;
  delete from preview.answers a where a.ctid = any (array(
    select old.ctid from preview.answers old where old.created_at < moment - limits.answers_kept
    order by old.created_at limit most for update skip locked));
  get diagnostics answers = row_count;
  return jsonb_build_object('reaped', reaped, 'forgotten', forgotten, 'answers', answers);
end $$;
comment on function preview.reap_turns is 'End turns that nobody resumed, forget those that are long over, and answers that have expired.';

-- The objects of project-assets that something still names: a version that is kept, or a turn that may yet end. Whoever
-- collects the others asks here, in the transaction in which it decides.
create function preview.objects_named(project uuid) returns setof text
language sql stable set search_path = '' as $$
  select f.content_hash from public.project_files f where f.project_id = project and f.encoding = 'base64' and not f.is_deleted
  union
  select c.content_hash from preview.turns t join preview.turn_changes c on c.turn_id = t.id
  where t.project_id = project and t.state = 'open' and c.action = 'update' and c.content is null
$$;
comment on function preview.objects_named is 'Hashes of the objects in project-assets that must stay.';

-- ------------------------------------------------------------------------------------------------ rights
revoke all on preview.turns, preview.turn_changes, preview.turn_gate from public;
revoke all on function preview.publish, preview.digest_of, preview.answer_to, preview.keep_answer, preview.refuse_project,
  preview.refuse_conflicts, preview.check_changes, preview.broadcast, preview.submit, preview.open_turn, preview.close_turn,
  preview.begin_turn, preview.stage, preview.end_turn, preview.abandon_turn, preview.turn, preview.reap_turns, preview.objects_named
  from public;
revoke all on function public.upsert_project_file, public.delete_project_file, public.apply_project_files,
  public.list_current_files, public.begin_turn, public.end_turn, public.abandon_turn
  from public, anon, authenticated, service_role;

grant select, update (project_id, act, turn_id, changes, bulk, correlation_id, label, lease_seconds, force)
  on preview.turn_gate to authenticated, service_role;
-- `list_current_files` reads them with its caller's rights; a turn is its project's, whichever member began it.
grant select on preview.turns, preview.turn_changes to authenticated, service_role;
grant execute on function preview.submit, preview.file_type_of to authenticated, service_role;
grant execute on function public.begin_turn, public.end_turn, public.abandon_turn to authenticated, service_role;
grant execute on function preview.reap_turns, preview.objects_named to service_role;
do $$
declare
  earlier record;
begin
  for earlier in
    select p.oid::regprocedure as function, g.grantee::regrole as who, g.is_grantable from granted g
    join pg_proc p on p.proname = g.proname and p.pronamespace = 'public'::regnamespace
  loop
    execute format('grant execute on function %s to %s%s', earlier.function, earlier.who,
                   case when earlier.is_grantable then ' with grant option' else '' end);
  end loop;

  execute format('create policy "members see turns" on preview.turns for select to authenticated using (%s)',
    case when to_regprocedure('preview.projects_of(uuid)') is not null then 'project_id in (select preview.my_projects())'
         else 'preview.allows(project_id, ''read'')' end);
end $$;
create policy "members see what a turn holds" on preview.turn_changes for select to authenticated
  using (turn_id in (select t.id from preview.turns t));
create policy "a container's token reads no table" on preview.turns as restrictive for all to authenticated
  using (not coalesce((select auth.jwt()) ? 'project_id', false));
create policy "a container's token reads no table" on preview.turn_changes as restrictive for all to authenticated
  using (not coalesce((select auth.jwt()) ? 'project_id', false));

-- ------------------------------------------------------------------------------------------------ the members' topic
-- `preview:{project}`: what concerns people and not containers, whose traffic is what plans cap. A container's token, whichever role
-- it carries, hears `project:{project}` alone.
alter policy "members hear their projects" on realtime.messages
  using (extension = 'broadcast' and topic = (select realtime.topic()) and case
    when (select auth.jwt()) ? 'project_id'
      then (select realtime.topic()) = 'project:' || ((select auth.jwt()) ->> 'project_id')
    else (select preview.allows(
      substring((select realtime.topic()) from '^(?:project|preview):([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$')::uuid, 'read'))
  end);

notify pgrst, 'reload schema';
