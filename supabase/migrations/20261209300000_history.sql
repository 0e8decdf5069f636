-- History that does not grow: a superseded content is kept as what makes it of the version after it (*reverse splices*, some 30 bytes for
-- one edit of a file of 20 KB), every 200th stays whole. Upkeep does it, an hour after a version was superseded, in short steps that hold
-- nothing a writer needs; before a content is dropped, what its splices make is compared with its hash. Whatever reads history reads
-- `preview.content_of`. Upkeep also forgets ended sessions and old snapshot requests, and names archives that nobody needs.
--
-- Sections: settings and tables · reading · making splices · forgetting · collecting · who reads history · rights
--
-- On a live database: one nullable column and settings with a default are added without a rewrite; the two constraints hold for new rows
-- and are not checked for old ones, which a stricter one held so far. What it waits for is bounded by the lock_timeout.
set local lock_timeout = '2s';

-- ------------------------------------------------------------------------------------------------ settings and tables
alter table preview.settings
  -- A version superseded so long ago is kept as splices; null: all stay whole. Until then a catch-up and an undo read it as it is.
  add column compact_after interval default '1 hour' check (compact_after >= '0'),
  -- To read a version is to apply at most so many splices: 3 ms for 200 of a file of 20 KB.
  add column whole_every integer not null default 200 check (whole_every between 2 and 1000),
  -- A session's row, with its idempotency key, after its end.
  add column sessions_kept interval default '30 days' check (sessions_kept >= '1 day'),
  -- Rows of project_snapshots that are ready or failed.
  add column snapshot_requests_kept interval default '7 days' check (snapshot_requests_kept >= '1 hour'),
  -- Archives but a project's newest; null: until an orchestrator's hourly round, which knows recent projects only.
  add column archives_kept interval default '1 day' check (archives_kept >= '1 day');

set constraints all immediate;
alter table public.project_files add column splices text;
alter table public.project_files drop constraint project_files_encoding;
alter table public.project_files
  add constraint project_files_encoding check (
    encoding in ('utf-8', 'base64') and (is_deleted or (encoding = 'utf-8') = (content is not null or splices is not null))
  ) not valid,
  add constraint project_files_splices check (splices is null or content is null and not is_current_version) not valid;
set constraints all deferred;
comment on column public.project_files.splices is
  'Of an older version whose content is null: what makes it of the next, as [[offset, delete, "insert"], …]. Read `file_version`.';

-- Up to where a project's history was looked through. Whoever makes splices or deletes versions holds the row: a version must not go while
-- another is made to depend on it. Whoever holds the head may wait for it, never the other way round.
create table preview.compactions (
  project_id uuid primary key references public.project_heads (project_id) on delete cascade,
  -- Of versions in the order of (revision, file_path): what the ones up to here superseded is done.
  revision bigint not null default 0,
  file_path text collate "C" not null default '',
  due_at timestamptz not null default now()
);
create index compactions_due_at_idx on preview.compactions (due_at);
alter table preview.compactions enable row level security;
comment on table preview.compactions is 'How far each project''s superseded contents have become splices.';

-- The newest whole archive of each project, so that a new session may begin with it.
create table preview.archives (
  project_id uuid primary key references public.project_heads (project_id) on delete cascade,
  epoch uuid not null,
  revision bigint not null,
  object_path text not null,
  stored_at timestamptz not null default now()
);
alter table preview.archives enable row level security;
comment on table preview.archives is 'Each project''s newest archive of everything in project-snapshots; the orchestrator writes it.';

-- ------------------------------------------------------------------------------------------------ reading
-- What splices make of a base, both in UTF-8.
create function preview.spliced(base bytea, splices text) returns bytea
language plpgsql immutable strict parallel safe set search_path = '' as $$
declare
  each jsonb;
  made bytea := '';
  at integer := 0;
begin
  for each in select s.value from jsonb_array_elements(splices::jsonb) s loop
    made := made || substring(base from at + 1 for (each ->> 0)::integer - at) || convert_to(each ->> 2, 'UTF8');
    at := (each ->> 0)::integer + (each ->> 1)::integer;
  end loop;
  return made || substring(base from at + 1);
end $$;

-- The text of a version, whatever it is kept as; null: it has none. With the caller's rights. One statement reads all that is needed, so
-- a version whose base is made splices meanwhile is read as it was.
create function preview.content_of(file uuid) returns text
language plpgsql stable strict set search_path = '' set plan_cache_mode = 'force_generic_plan' set enable_sort = off as $$
declare
  wanted record;
  later record;
  steps text[];
  made bytea;
begin
  select f.project_id, f.file_path, f.version, f.content, f.splices, f.content_hash into wanted
  from public.project_files f where f.id = file;
  if wanted.splices is null then
    return wanted.content;
  end if;
  steps := array[wanted.splices];
  for later in
    select f.version, f.content, f.splices from public.project_files f
    where f.project_id = wanted.project_id and f.file_path = wanted.file_path and f.version > wanted.version order by f.version
  loop
    exit when later.version <> wanted.version + cardinality(steps) or later.content is null and later.splices is null;
    if later.content is not null then
      made := convert_to(later.content, 'UTF8');
      exit;
    end if;
    steps := steps || later.splices;
  end loop;
  for n in reverse cardinality(steps)..1 loop
    made := preview.spliced(made, steps[n]);
  end loop;
  if encode(sha256(made), 'hex') is distinct from wanted.content_hash then
    raise exception 'version % of %: what is kept of it does not have its hash', wanted.version, to_json(wanted.file_path)
      using errcode = 'data_corrupted', hint = 'Rows of project_files were changed or deleted by hand.';
  end if;
  return convert_from(made, 'UTF8');
end $$;
comment on function preview.content_of is 'The text of a version, made from its splices where they are what is kept.';

create function public.file_version(project_uuid uuid, p_file_path text, p_version integer) returns jsonb
language plpgsql stable security invoker set search_path = '' as $$
declare
  it public.project_files;
begin
  if project_uuid is null or p_file_path is null or p_version is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' when p_file_path is null then 'p_file_path'
      else 'p_version' end using errcode = 'PT400';
  end if;
  perform preview.seen_head(project_uuid);
  select * into it from public.project_files f
  where f.project_id = project_uuid and f.file_path = p_file_path and f.version = p_version;
  if not found then
    raise exception 'p_version %: the history of % has no such version', p_version, to_json(p_file_path) using errcode = 'PT404';
  end if;
  return jsonb_build_object(
    'file_path', it.file_path, 'file_type', it.file_type, 'version', it.version, 'revision', it.revision,
    'content', preview.content_of(it.id), 'content_hash', it.content_hash, 'size_bytes', it.size_bytes, 'encoding', it.encoding, 'executable', it.executable,
    'is_deleted', it.is_deleted, 'created_at', preview.rfc3339(it.created_at), 'created_by', it.created_by);
end $$;
comment on function public.file_version is 'One version of one file with its content, however old.';

-- ------------------------------------------------------------------------------------------------ making splices
-- What makes `before` of `after`, checked; null: it is not worth it.
create function preview.reverse_splices(after text, before text, hash text) returns text
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  splices text := preview.splices_of(after, before, 100)::text;
begin
  if 2 * octet_length(splices) < octet_length(before)
     and encode(sha256(preview.spliced(convert_to(after, 'UTF8'), splices)), 'hex') = hash then
    return splices;
  end if;
  return null;
end $$;

-- One step for the project that has waited longest: at most `most` superseded contents become splices, for at most `budget`. Null: nothing
-- is due. It locks the project's row here and superseded versions, none of which a writer waits for, and waits for nobody.
create function preview.compact(most integer default 500, budget interval default '200 ms') returns jsonb
language plpgsql set search_path = '' set plan_cache_mode = 'force_generic_plan' set enable_seqscan = off as $$
declare
  limits preview.settings;
  done preview.compactions;
  pair record;
  began timestamptz := clock_timestamp();
  looked integer := 0;
  is_more boolean := false;
  made text;
  contents integer := 0;
  bytes bigint := 0;
begin
  select * into strict limits from preview.settings;
  if limits.compact_after is null then
    return null;
  end if;
  select * into done from preview.compactions c where c.due_at <= now() order by c.due_at limit 1 for update skip locked;
  if not found then
    return null;
  end if;
  for pair in
    with recursive walk as (
      select f.id, f.parent_version_id, f.revision, f.file_path, f.created_at
      from public.project_files f where f.project_id = done.project_id and f.is_current_version and f.revision >= done.revision
      union all
      select p.id, p.parent_version_id, p.revision, p.file_path, p.created_at
      from walk w join public.project_files p on p.id = w.parent_version_id where p.revision >= done.revision
    )
    select w.id, w.parent_version_id, w.revision, w.file_path from walk w
    where (w.revision, w.file_path) > (done.revision, done.file_path) and w.created_at <= now() - limits.compact_after
    order by w.revision, w.file_path limit most
  loop
    looked := looked + 1;
    done.revision := pair.revision;
    done.file_path := pair.file_path;
    -- One that somebody holds stays whole: they delete the project and will want our row, or change its author.
    perform from public.project_files p
    where p.id = pair.parent_version_id and p.content is not null and p.version % limits.whole_every <> 0
    for no key update skip locked;
    made := null;
    if found then
      select preview.reverse_splices(n.content, p.content, p.content_hash) into made
      from public.project_files p join public.project_files n on n.id = pair.id
      where p.id = pair.parent_version_id and n.content is not null and n.version = p.version + 1;
    end if;
    if made is not null then
      update public.project_files f set content = null, splices = made where f.id = pair.parent_version_id;
      contents := contents + 1;
      bytes := bytes + octet_length(made);
    end if;
    is_more := looked = most or clock_timestamp() - began > budget;
    exit when is_more;
  end loop;
  update preview.compactions c
  set revision = done.revision, file_path = done.file_path, due_at = case
        when is_more then now()
        when exists (select from public.project_heads h
                     where h.project_id = done.project_id and h.updated_at > now() - limits.compact_after)
          then now() + greatest(limits.compact_after, '1 minute')
        else 'infinity' end
  where c.project_id = done.project_id;
  return jsonb_build_object('project_id', done.project_id, 'looked', looked, 'contents', contents, 'bytes', bytes);
end $$;
comment on function preview.compact is 'One step of making splices of superseded contents; the orchestrator calls it.';

-- ------------------------------------------------------------------------------------------------ forgetting
-- As it was, but a version that stays and is made of one that goes is made whole first. The caller holds the head.
create or replace function preview.forget(project uuid, keep interval, keep_versions integer, most integer) returns jsonb
language plpgsql set search_path = '' as $$
declare
  oldest timestamptz;
  going uuid[];
  gone record;
begin
  perform from preview.compactions c where c.project_id = project for update;
  delete from preview.checkpoints c where c.project_id = project and c.name is null and c.created_at < now() - keep;
  -- The oldest first: what is made of a version mostly goes before it or with it.
  select coalesce(array_agg(g.id), '{}') into going from (
    select old.id from (
      select v.id, v.is_current_version, v.updated_at, v.revision, v.file_path, v.version,
             row_number() over (partition by v.file_path order by v.version desc) as age,
             lag(v.revision) over (partition by v.file_path order by v.version desc) as until
      from public.project_files v where v.project_id = project
    ) old
    where not old.is_current_version and old.age > keep_versions + 1 and old.updated_at < now() - keep
      and not exists (select from preview.checkpoints c
                      where c.project_id = project and c.revision >= old.revision and c.revision < old.until)
    order by old.file_path, old.version limit most
  ) g;
  update public.project_files p set content = preview.content_of(p.id), splices = null
  from public.project_files n
  where n.id = any (going) and p.project_id = project and p.file_path = n.file_path and p.version = n.version - 1
    and p.splices is not null and p.id <> all (going);
  delete from public.project_files f where f.id = any (going);

  select now() - greatest(keep, s.longest_session) into strict oldest from preview.settings s;
  with dead as (
    delete from public.project_files f where f.id in (
      select t.id from public.project_files t
      where t.project_id = project and t.is_current_version and t.is_deleted and t.created_at < oldest
        and not exists (select from preview.checkpoints c where c.project_id = project and c.revision < t.revision)
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
  return jsonb_build_object('versions', cardinality(going) + gone.before, 'tombstones', gone.rows);
end $$;

-- ------------------------------------------------------------------------------------------------ collecting
-- Archives that no session needs: all but the newest of everything, which goes too once history is forgotten beyond it. One that was
-- replaced stays for two hours more, since somebody may have been given its URL just before.
create function preview.archives_unused(project uuid, kept interval, pruned bigint) returns setof text
language sql stable set search_path = '' as $$
  with found as (
    select o.name, o.created_at, o.name !~ '-from-' as whole, substring(o.name from 38) as title
    from storage.objects o
    where o.bucket_id = 'project-snapshots' and o.name > project || '/' and o.name < project || '0'
  )
  select f.name from found f
  where f.created_at < now() - kept
    and (not f.whole
         or exists (select from found n where n.whole and n.created_at > f.created_at and n.created_at < now() - interval '2 hours')
         or f.title ~ '^\d{1,18}-' and split_part(f.title, '-', 1)::bigint < pruned)
$$;

-- As it was, but what the project's history is made into splices with is due then too; ended sessions and old snapshot requests are
-- forgotten, and archives are named that nobody needs.
create or replace function preview.keep_up(most integer default 500) returns jsonb
language plpgsql set search_path = '' as $$
declare
  limits preview.settings;
  project uuid;
  pruned bigint;
  done jsonb := '{"versions": 0, "tombstones": 0}';
  unused integer;
  sessions integer;
  requests integer;
  archives text[];
  busy boolean;
begin
  select * into strict limits from preview.settings;
  select h.project_id, h.pruned_revision into project, pruned from public.project_heads h
  where h.kept_up_at < now() - limits.upkeep_every
  order by h.kept_up_at limit 1 for no key update skip locked;
  if not found then
    return null;
  end if;
  -- Not `on conflict`: that would wait for a step that is under way.
  insert into preview.compactions (project_id)
  select project where not exists (select from preview.compactions c where c.project_id = project);
  perform from preview.compactions c where c.project_id = project for update skip locked;
  -- Splices are being made, which takes a moment: a save should not wait for the head that long. The project stays due.
  busy := not found;
  if not busy then
    update preview.compactions c set due_at = least(c.due_at, now()) where c.project_id = project;
    if limits.history_kept is not null then
      done := preview.forget(project, limits.history_kept, limits.versions_kept, most);
    end if;
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
  delete from preview.sessions s where s.id in (
    select e.id from preview.sessions e
    where e.project_id = project and e.state in ('gone', 'failed') and e.state_since < now() - limits.sessions_kept
    limit most for update skip locked);
  get diagnostics sessions = row_count;
  delete from public.project_snapshots r where r.id in (
    select e.id from public.project_snapshots e
    where e.project_id = project and e.state in ('ready', 'failed') and e.finished_at < now() - limits.snapshot_requests_kept
    limit most for update skip locked);
  get diagnostics requests = row_count;
  archives := array(select preview.archives_unused(project, limits.archives_kept, pruned) limit least(most, 200));
  delete from preview.archives a where a.project_id = project and a.object_path = any (archives);
  if greatest((done ->> 'versions')::int, (done ->> 'tombstones')::int, unused, sessions, requests) < most and not busy then
    update public.project_heads h set kept_up_at = now() where h.project_id = project;
  end if;
  return done || jsonb_build_object('project_id', project, 'unused', unused, 'sessions', sessions, 'requests', requests,
                                    'archives', to_jsonb(archives));
end $$;
comment on function preview.keep_up is 'One step of upkeep for the project that has waited longest; the orchestrator calls it.';

-- ------------------------------------------------------------------------------------------------ who reads history
-- As they were, but for `content_of`.
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
           else (select row('update', v.file_path, v.file_type, preview.content_of(v.id), v.content_hash, v.executable, null)::preview.change
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

create or replace function public.diff_project(project_uuid uuid, p_from bigint, p_to bigint default null) returns text
language plpgsql stable security invoker set search_path = '' as $$
declare
  most constant integer := 4194304;
  head public.project_heads := preview.seen_head(project_uuid);
  upto bigint := coalesce(p_to, head.revision);
  file record;
  parts text[] := '{}';
  bytes bigint := 0;
begin
  if project_uuid is null or p_from is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' else 'p_from' end using errcode = 'PT400';
  elsif p_from < 0 or upto < 0 then
    raise exception 'p_from and p_to must be 0 or more' using errcode = 'PT400';
  end if;
  perform preview.check_kept(project_uuid, p_from, 'p_from', head);
  perform preview.check_kept(project_uuid, upto, 'p_to', head);
  for file in
    with past as (select p.* from preview.files_at(project_uuid, p_from) p where not p.is_deleted),
         later as (select p.* from preview.files_at(project_uuid, upto) p where not p.is_deleted)
    select coalesce(past.file_path, later.file_path) as path, past.id as past_id, later.id as later_id,
           past.executable as was_executable, later.executable as is_executable,
           coalesce(past.encoding, 'utf-8') = 'utf-8' and coalesce(later.encoding, 'utf-8') = 'utf-8' as is_text,
           coalesce(past.content_hash = later.content_hash, false) as is_same
    from past full join later on later.file_path = past.file_path
    where past.content_hash is distinct from later.content_hash or past.executable is distinct from later.executable
    order by coalesce(past.file_path, later.file_path)
  loop
    parts := parts || preview.file_diff(
      file.path, preview.content_of(file.past_id), preview.content_of(file.later_id), file.past_id is not null,
      file.later_id is not null, file.was_executable, file.is_executable, file.is_text, file.is_same);
    bytes := bytes + octet_length(parts[cardinality(parts)]);
    if bytes > most then
      raise exception 'the difference between % and % has more than % bytes', p_from, upto, most
        using errcode = 'PT413', hint = 'Compare revisions that are closer.';
    end if;
  end loop;
  return array_to_string(parts, '');
end $$;

create or replace function public.changes_since(
  project_uuid uuid, epoch text, revision bigint, p_paths text[] default null, p_max_bytes bigint default null,
  p_accept text[] default null
) returns jsonb language plpgsql stable security invoker set search_path = ''
  set plan_cache_mode = 'force_generic_plan'  -- planning costs more than reading
  set enable_sort = off  -- so that it is the index in the order asked for that is read (see no_file_is_a_directory)
as $$
#variable_conflict use_column
declare
  head public.project_heads;
  answer jsonb;
  total bigint;
  above integer;
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
  if 'splices' = any (p_accept) then
    above := preview.patches_above();
  end if;
  return answer || jsonb_build_object(
    'kind', 'changes', 'base_revision', changes_since.revision,
    'changes', (
      select coalesce(jsonb_agg(preview.entry_of(c.file_path, c.is_deleted, c.content, c.content_hash, c.version,
                                                 c.encoding, c.executable)
        || coalesce(case when c.size_bytes > above and c.content is not null and c.revision > changes_since.revision
                         and not c.file_path = any (coalesce(p_paths, '{}')) then (
             select preview.patch_of(base.content, base.content_hash, c.content, 2147483647)
             from (select preview.content_of(b.id) as content, b.content_hash from public.project_files b
                   where b.project_id = project_uuid and b.file_path = c.file_path and b.revision <= changes_since.revision
                   order by b.version desc limit 1) base
             where base.content is not null) end, '{}') order by c.revision, c.file_path), '[]')
      from (
        (select f.file_path, f.is_deleted, f.content, f.content_hash, f.version, f.encoding, f.executable, f.revision, f.size_bytes
         from public.project_files f
         where f.project_id = project_uuid and f.is_current_version and f.revision > changes_since.revision
         order by f.revision)
        union all
        select f.*
        from (select distinct path from unnest(p_paths) path) wanted
        cross join lateral (
          select at.file_path, at.is_deleted, at.content, at.content_hash, at.version, at.encoding, at.executable, at.revision,
                 at.size_bytes
          from public.project_files at
          where at.project_id = project_uuid and at.is_current_version and at.file_path >= wanted.path
          order by at.file_path limit 1
        ) f
        where f.file_path = wanted.path and f.revision <= changes_since.revision
      ) c));
end $$;

create or replace function public.restore_project_file(
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
    row('update', old.file_path, old.file_type, preview.content_of(old.id), old.content_hash, old.executable, expected_version)::preview.change],
    false, p_correlation_id);
  return (result - 'files' - 'changed') || (result -> 'files' -> 0);
end $$;

-- ------------------------------------------------------------------------------------------------ rights
revoke all on preview.compactions, preview.archives from public, anon, authenticated, service_role;
revoke all on function preview.spliced, preview.content_of, preview.reverse_splices, preview.compact, preview.archives_unused from public;
revoke all on function public.file_version from public, anon, authenticated, service_role;
grant execute on function preview.spliced, preview.content_of to authenticated, service_role;
grant execute on function preview.compact to service_role;
grant execute on function public.file_version to authenticated, service_role;

notify pgrst, 'reload schema';
