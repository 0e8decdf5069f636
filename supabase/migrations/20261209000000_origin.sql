-- Each version says where it came from: a person's save, a room in which several people type, a tool in a container, a restored
-- project, or a program with the service key; with it, everybody who typed, and the session of a container.
--
-- Whoever saves cannot choose it. A function of ours says it in columns of `preview.write_gate` that are granted to nobody. The
-- orchestrator, which connects as the tables' owner, may say it in the settings `preview.origin`, `preview.contributors` and
-- `preview.session` of its transaction; of everybody else, who comes in as `authenticator` or a role of their own, those are not read.
--
-- On a live database: three columns are added without a rewrite or a scan (the new constraint holds for new rows; older ones have the
-- default). Two functions and two views are replaced in place. What that waits for is bounded by the lock_timeout.
set local lock_timeout = '2s';
set constraints all immediate;
alter table public.project_files
  add column origin text not null default 'user',
  add column contributors uuid[],
  add column session_id uuid;
alter table public.project_files
  add constraint project_files_origin check (origin in ('user', 'room', 'container', 'restore', 'api')) not valid;
set constraints all deferred;
comment on column public.project_files.origin is
  'Where this version came from: user, room, container, restore or api. Versions from before there was this column say user.';
comment on column public.project_files.contributors is 'Everybody who typed what a room saved; else null.';
comment on column public.project_files.session_id is 'The session whose container made this version; else null.';

-- `origin`, `contributors` and `session_id` are granted to nobody, as `turn` and `label` are.
create or replace view preview.write_gate with (security_invoker = true) as
  select null::uuid as project_id, null::preview.change[] as changes, null::boolean as bulk, null::text as correlation_id,
         null::jsonb as answer, not row_security_active('public.project_files'::regclass) as unrestricted,
         null::uuid as turn, null::text as label, null::text as origin, null::uuid[] as contributors, null::uuid as session_id;

-- As it was, but each version says where it came from; a container's writes have a rate of their own.
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
  -- In the gate's columns, else in the owner's settings, else by who is asking.
  if new.origin is null and current_setting('preview.origin', true) <> '' and pg_has_role(session_user, current_user, 'member') then
    new.origin := current_setting('preview.origin');
    new.contributors := nullif(current_setting('preview.contributors', true), '')::uuid[];
    new.session_id := nullif(current_setting('preview.session', true), '')::uuid;
  end if;
  new.origin := coalesce(new.origin, case when auth.uid() is null then 'api' else 'user' end);

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
        window_writes = case when h.window_start = date_trunc('minute', moment) then h.window_writes else 0 end
          + (new.origin <> 'container')::int
    where h.project_id = new.project_id
    returning * into head;
    if head.window_writes > limits.writes_per_minute and new.origin <> 'container' then
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
      created_by, last_modified_by, created_at, updated_at, revision, is_deleted, size_bytes, encoding, executable,
      origin, contributors, session_id)
    select s.id, new.project_id, s.file_path, s.file_type, s.content, s.content_hash, s.version, s.was_id, true,
           author, author, moment, moment, head.revision, s.action = 'delete', s.size_bytes, s.encoding, s.executable,
           new.origin, new.contributors, new.session_id
    from unnest(fresh) s;

    perform preview.broadcast(new.project_id, new.bulk, fresh, head.epoch, head.revision, moment,
      case when new.origin = 'container' then 'container:' || new.session_id
           else coalesce((select auth.uid())::text, (select auth.role()), session_user::text) end, limits.broadcast_limit_bytes,
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

-- As it was, but what it writes says so.
create or replace function preview.restore_all(project uuid, revision bigint, correlation_id text) returns jsonb
language plpgsql set search_path = '' as $$
declare
  head public.project_heads;
  kept interval := (select s.answers_kept from preview.settings s);
  moment timestamptz;
  request text := preview.digest_of(concat_ws(' ', 'restore', revision));
  steps preview.change[];
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
  perform preview.check_kept(project, revision, 'revision', head);
  with past as (
    select p.* from preview.files_at(project, restore_all.revision) p where not p.is_deleted
  ), here as (
    select f.file_path, f.content_hash, f.executable from public.project_files f
    where f.project_id = project and f.is_current_version and not f.is_deleted
  )
  select coalesce(array_agg(case when past.id is null
           then row('delete', here.file_path, null, null, null, null, null)::preview.change
           else (select row('update', v.file_path, v.file_type, v.content, v.content_hash, v.executable, null)::preview.change
                 from public.project_files v where v.id = past.id) end), '{}') into steps
  from past full join here on here.file_path = past.file_path
  where past.content_hash is distinct from here.content_hash or past.executable is distinct from here.executable;
  update preview.write_gate g set project_id = project, bulk = true, changes = steps, origin = 'restore' returning g.answer into strict result;
  result := result || jsonb_build_object('restored', revision);
  if correlation_id is not null then
    perform preview.keep_answer(project, correlation_id, request, result, moment, kept);
  end if;
  return result;
end $$;

-- The audit trail, with its three new columns at the end.
do $$
declare
  named boolean := pg_get_viewdef('public.project_history'::regclass) ~ 'user_profiles';
begin
  execute format($v$
    create or replace view public.project_history with (security_invoker = true) as
      select f.project_id, f.revision, f.created_at as changed_at, f.created_by as changed_by, %s as changed_by_name,
             case when f.is_deleted then 'delete' when f.version = 1 then 'create' else 'update' end as action,
             f.file_path, f.version, f.size_bytes, f.content_hash, f.is_current_version, f.origin, f.contributors, f.session_id
      from public.project_files f %s $v$,
    case when named then 'u.display_name' else 'null::text' end,
    case when named then 'left join public.user_profiles u on u.id = f.created_by' end);
end $$;

notify pgrst, 'reload schema';
