-- Time travel: the log of a project's commits, the difference between two of them, a whole project brought back to one, and checkpoints:
-- revisions with a name, which stay when history is forgotten. Each turn's end is one by itself. To bring a project back is one new commit
-- through the ordinary write path, so whatever follows the project just follows.
--
-- Sections: settings and checkpoints · the tree of a revision · forgetting · the door · the difference · the RPCs · rights
--
-- On a live database: a new table, two columns of a one-row table, and a trigger on preview.turns, which waits for its writers, at most for
-- the lock_timeout.
set local lock_timeout = '2s';

-- ------------------------------------------------------------------------------------------------ settings and checkpoints
alter table preview.settings
  -- Of each project. A checkpoint keeps a version of every file from being forgotten.
  add column max_checkpoints integer not null default 200 check (max_checkpoints >= 0),
  -- The ends of the last so many turns; 0: none.
  add column automatic_checkpoints integer not null default 50 check (automatic_checkpoints >= 0);

create table preview.checkpoints (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  revision bigint not null check (revision >= 0),
  -- Null: the end of a turn.
  name text check (octet_length(name) between 1 and 200),
  turn_id uuid,
  label text,
  created_at timestamptz not null
);
create index checkpoints_project_id_idx on preview.checkpoints (project_id, revision);
create unique index checkpoints_name_idx on preview.checkpoints (project_id, name) where name is not null;
alter table preview.checkpoints enable row level security;
comment on table preview.checkpoints is 'Revisions of projects that can be brought back whatever is forgotten.';

create function preview.keep_turn() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  most integer := (select s.automatic_checkpoints from preview.settings s);
begin
  if most > 0 then
    insert into preview.checkpoints (project_id, revision, turn_id, label, created_at)
    values (new.project_id, new.revision, new.id, new.label, new.closed_at);
  end if;
  delete from preview.checkpoints c where c.id in (
    select k.id from preview.checkpoints k where k.project_id = new.project_id and k.name is null
    order by k.revision desc offset most);
  return null;
end $$;
create trigger keep_turn after update of state on preview.turns for each row
  when (new.state = 'ended' and old.state <> 'ended' and new.revision is not null) execute function preview.keep_turn();

-- ------------------------------------------------------------------------------------------------ the tree of a revision
-- What each path was at a revision, deleted ones included. `known` false: as far as can be told without checkpoints, the version of then
-- may be forgotten. With the caller's rights.
create function preview.files_at(project uuid, revision bigint)
returns table (id uuid, file_path text, content_hash text, encoding text, executable boolean, is_deleted boolean, known boolean)
language plpgsql stable set search_path = '' set plan_cache_mode = 'force_generic_plan' as $$
#variable_conflict use_column
begin
  return query
    select v.id, v.file_path, v.content_hash, v.encoding, v.executable, v.is_deleted,
           v.is_current_version or v.revision = files_at.revision or files_at.revision < coalesce(
             (select n.revision from public.project_files n where n.parent_version_id = v.id limit 1), 0)
    from (
      select distinct on (f.file_path) f.id, f.file_path, f.content_hash, f.encoding, f.executable, f.is_deleted, f.is_current_version,
             f.revision
      from public.project_files f where f.project_id = project and f.revision <= files_at.revision
      order by f.file_path, f.version desc
    ) v
    union all
    -- Later than that, but not from the beginning.
    select null::uuid, first.file_path, null::text, 'utf-8'::text, false, true, false
    from (
      select distinct on (f.file_path) f.file_path, f.revision, f.version
      from public.project_files f where f.project_id = project
      order by f.file_path, f.version
    ) first
    where first.revision > files_at.revision and first.version > 1;
end $$;

-- Says no to a revision that was not, and to one of which something may be forgotten. Of a checkpoint nothing is: what was current
-- when it was made stays, so the latest version of a path up to it is the one of then.
create function preview.check_kept(project uuid, revision bigint, argument text, head public.project_heads) returns void
language plpgsql stable set search_path = '' as $$
declare
  missing text;
begin
  if revision > head.revision then
    raise exception '% %: the project is at revision %', argument, revision, head.revision using errcode = 'PT404';
  end if;
  if exists (select from preview.checkpoints c where c.project_id = project and c.revision = check_kept.revision) then
    return;
  end if;
  select f.file_path into missing from preview.files_at(project, check_kept.revision) f where not f.known order by f.file_path limit 1;
  if found or revision < head.pruned_revision then
    raise exception '% %: the history of that revision is not kept any more%', argument, revision, coalesce(' (' || missing || ')', '')
      using errcode = 'PT410', hint = 'Checkpoints are kept: see list_checkpoints.';
  end if;
end $$;

-- ------------------------------------------------------------------------------------------------ forgetting
-- As it was, but what a checkpoint needs stays: the version of each path that was current at it, and every deletion since the oldest.
-- An automatic one is forgotten with its time.
create or replace function preview.forget(project uuid, keep interval, keep_versions integer, most integer) returns jsonb
language plpgsql set search_path = '' as $$
declare
  oldest timestamptz;
  forgotten integer;
  gone record;
begin
  delete from preview.checkpoints c where c.project_id = project and c.name is null and c.created_at < now() - keep;
  delete from public.project_files f where f.id in (
    select old.id from (
      select v.id, v.is_current_version, v.updated_at, v.revision,
             row_number() over (partition by v.file_path order by v.version desc) as age,
             lag(v.revision) over (partition by v.file_path order by v.version desc) as until
      from public.project_files v where v.project_id = project
    ) old
    where not old.is_current_version and old.age > keep_versions + 1 and old.updated_at < now() - keep
      and not exists (select from preview.checkpoints c
                      where c.project_id = project and c.revision >= old.revision and c.revision < old.until)
    limit most);
  get diagnostics forgotten = row_count;

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
  return jsonb_build_object('versions', forgotten + gone.before, 'tombstones', gone.rows);
end $$;

-- ------------------------------------------------------------------------------------------------ the door
create function preview.restore_all(project uuid, revision bigint, correlation_id text) returns jsonb
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
  update preview.write_gate g set project_id = project, bulk = true, changes = steps returning g.answer into strict result;
  result := result || jsonb_build_object('restored', revision);
  if correlation_id is not null then
    perform preview.keep_answer(project, correlation_id, request, result, moment, kept);
  end if;
  return result;
end $$;

create function preview.set_checkpoint(project uuid, name text) returns jsonb
language plpgsql set search_path = '' as $$
declare
  head public.project_heads;
  most integer := (select s.max_checkpoints from preview.settings s);
  made preview.checkpoints;
begin
  if not preview.give_head(project) then
    perform preview.refuse_project(project);
  end if;
  -- Whoever forgets holds it too: what this keeps is still there.
  select * into strict head from public.project_heads h where h.project_id = project for no key update;
  select * into made from preview.checkpoints c where c.project_id = project and c.name = set_checkpoint.name;
  if found and made.revision <> head.revision then
    raise exception 'p_name %: a checkpoint of that name is at revision %', to_json(name), made.revision
      using errcode = 'PT409', hint = 'Take another name, or remove that one with delete_checkpoint.';
  elsif not found then
    if (select count(*) from preview.checkpoints c where c.project_id = project and c.name is not null) >= most then
      raise exception 'project_uuid %: % checkpoints, at most % are kept', project, most, most
        using errcode = 'PT413', hint = 'Remove one with delete_checkpoint.';
    end if;
    insert into preview.checkpoints (project_id, revision, name, created_at)
    values (project, head.revision, set_checkpoint.name, clock_timestamp()) returning * into made;
  end if;
  return jsonb_build_object('name', made.name, 'revision', made.revision, 'created_at', preview.rfc3339(made.created_at));
end $$;

-- As `preview.write_gate` is: the RPCs have their caller's rights, and the trigger asks whether the caller may write.
create view preview.history_gate with (security_invoker = true) as
  select null::uuid as project_id, null::text as act, null::bigint as revision, null::text as name, null::text as correlation_id,
         null::jsonb as answer, not row_security_active('public.project_files'::regclass) as unrestricted;
comment on view preview.history_gate is 'The door of time travel: `update … set act = restore | keep | release, … returning answer`.';

create function preview.travel() returns trigger
language plpgsql security definer set search_path = ''
  set plan_cache_mode = 'force_generic_plan' set enable_seqscan = off as $$
begin
  if not old.unrestricted then
    if auth.uid() is null or coalesce(auth.jwt() ? 'project_id', false)
       or not coalesce(preview.may_access(new.project_id, auth.uid(), 'write'), false)
    then
      return null;
    end if;
  end if;
  case new.act
    when 'restore' then
      new.answer := preview.restore_all(new.project_id, new.revision, new.correlation_id);
    when 'keep' then
      new.answer := preview.set_checkpoint(new.project_id, new.name);
    when 'release' then
      if not preview.there_is(new.project_id) then
        perform preview.refuse_project(new.project_id);
      end if;
      delete from preview.checkpoints c where c.project_id = new.project_id and c.name = new.name;
      new.answer := jsonb_build_object('name', new.name, 'deleted', found);
  end case;
  return new;
end $$;
create trigger travel instead of update on preview.history_gate for each row execute function preview.travel();

-- ------------------------------------------------------------------------------------------------ the difference
-- The lines of a text, each with its end of line; the last may have none.
create function preview.lines_of(content text) returns text[]
language plpgsql immutable strict parallel safe set search_path = '' as $$
declare
  lines text[] := string_to_array(content, E'\n');
  count constant integer := cardinality(lines);
begin
  return (select coalesce(array_agg(case when l.n < count then l.line || E'\n' else l.line end order by l.n), '{}')
          from unnest(lines) with ordinality l(line, n) where l.n < count or l.line <> '');
end $$;

-- Where the lines of a text begin, in bytes; behind a last end of line there is one more.
create function preview.line_starts(content text) returns integer[]
language plpgsql immutable strict parallel safe set search_path = '' as $$
begin
  return (select array_agg(s.start order by s.n) from (
    select l.n, coalesce(sum(octet_length(l.line) + 1) over (order by l.n rows between unbounded preceding and 1 preceding), 0)::integer as start
    from unnest(string_to_array(content, E'\n')) with ordinality l(line, n)) s);
end $$;

create function preview.marked(lines text[], mark text) returns text
language plpgsql immutable strict parallel safe set search_path = '' as $$
begin
  return (select coalesce(string_agg(mark || l.line || case when right(l.line, 1) = E'\n' then ''
                                       else E'\n\\ No newline at end of file\n' end, '' order by l.n), '')
          from unnest(lines) with ordinality l(line, n));
end $$;

-- The hunks of a unified diff, with three lines around each change. Where lines differ is found by `splices_of`, so what it takes for
-- equal is equal, and what it takes for different may be more than need be.
create function preview.hunks_of(before text, after text) returns text
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  a constant text[] := preview.lines_of(before);
  b constant text[] := preview.lines_of(after);
  starts_a constant integer[] := coalesce(preview.line_starts(before), '{0}');
  starts_b constant integer[] := coalesce(preview.line_starts(after), '{0}');
  splices constant jsonb := coalesce(preview.splices_of(before, after, 200),
                                     jsonb_build_array(jsonb_build_array(0, octet_length(before), after)));
  splice jsonb;
  shift integer := 0;
  -- Regions that differ, each four numbers: lines of a from (counted from 0) and to (not in it), lines of b from and to.
  regions integer[] := '{}';
  n integer;
  found integer[];
  middle boolean;
  at_a integer;
  at_b integer;
  body text := '';
  hunk text;
  first integer;
begin
  for splice in select s.value from jsonb_array_elements(splices) s loop
    at_a := (splice ->> 0)::integer;
    at_b := at_a + shift;
    found := array[width_bucket(at_a, starts_a) - 1, 0, width_bucket(at_b, starts_b) - 1, 0];
    at_a := at_a + (splice ->> 1)::integer;
    at_b := at_b + octet_length(splice ->> 2);
    shift := at_b - at_a;
    -- Does it end within a line on either side, that line belongs to it on both.
    middle := starts_a[width_bucket(at_a, starts_a)] <> at_a or starts_b[width_bucket(at_b, starts_b)] <> at_b;
    found[2] := least(width_bucket(at_a, starts_a) - 1 + middle::integer, cardinality(a));
    found[4] := least(width_bucket(at_b, starts_b) - 1 + middle::integer, cardinality(b));
    n := cardinality(regions);
    if n > 0 and (found[1] < regions[n - 2] or found[3] < regions[n]) then
      regions[n - 2] := found[2];
      regions[n] := found[4];
    else
      regions := regions || found;
    end if;
  end loop;
  -- What is equal at the ends of a region is not different.
  n := 1;
  while n < cardinality(regions) loop
    while regions[n] < regions[n + 1] and regions[n + 2] < regions[n + 3] and a[regions[n] + 1] = b[regions[n + 2] + 1] loop
      regions[n] := regions[n] + 1;
      regions[n + 2] := regions[n + 2] + 1;
    end loop;
    while regions[n] < regions[n + 1] and regions[n + 2] < regions[n + 3] and a[regions[n + 1]] = b[regions[n + 3]] loop
      regions[n + 1] := regions[n + 1] - 1;
      regions[n + 3] := regions[n + 3] - 1;
    end loop;
    n := n + 4;
  end loop;
  n := 1;
  while n < cardinality(regions) loop
    at_a := greatest(regions[n] - 3, 0);
    at_b := regions[n + 2] - (regions[n] - at_a);
    found := array[at_a, at_b];
    hunk := '';
    loop
      hunk := hunk || preview.marked(a[at_a + 1 : regions[n]], ' ')
        || preview.marked(a[regions[n] + 1 : regions[n + 1]], '-') || preview.marked(b[regions[n + 2] + 1 : regions[n + 3]], '+');
      at_a := regions[n + 1];
      at_b := regions[n + 3];
      n := n + 4;
      exit when n > cardinality(regions) or regions[n] - at_a > 6;
    end loop;
    first := least(cardinality(a), at_a + 3);
    hunk := hunk || preview.marked(a[at_a + 1 : first], ' ');
    at_b := at_b + first - at_a;
    at_a := first;
    -- An empty side is named by the line before it.
    body := body || format(E'@@ -%s,%s +%s,%s @@\n', found[1] + (at_a > found[1])::integer, at_a - found[1],
                           found[2] + (at_b > found[2])::integer, at_b - found[2]) || hunk;
  end loop;
  return body;
end $$;

-- One file's part of the difference, as git writes and reads it. A content that is null is not there, or not a text.
create function preview.file_diff(
  path text, before text, after text, was_there boolean, is_there boolean, was_executable boolean, is_executable boolean,
  is_text boolean, is_same boolean
) returns text language plpgsql immutable parallel safe set search_path = '' as $$
declare
  old_name constant text := case when path ~ '"' then to_json('a/' || path)::text else 'a/' || path end;
  new_name constant text := case when path ~ '"' then to_json('b/' || path)::text else 'b/' || path end;
  -- So that a reader knows where a name with a blank ends.
  tail constant text := case when path ~ '\s' and path !~ '"' then E'\t' else '' end;
  mode_of constant text[] := array['100644', '100755'];
  head text := format(E'diff --git %s %s\n', old_name, new_name);
  hunks text;
begin
  if not was_there then
    head := head || format(E'new file mode %s\n', mode_of[1 + is_executable::integer]);
  elsif not is_there then
    head := head || format(E'deleted file mode %s\n', mode_of[1 + was_executable::integer]);
  elsif was_executable <> is_executable then
    head := head || format(E'old mode %s\nnew mode %s\n', mode_of[1 + was_executable::integer], mode_of[1 + is_executable::integer]);
  end if;
  if is_same then
    return head;
  elsif not is_text then
    return head || format(E'Binary files %s and %s differ\n', case when was_there then old_name else '/dev/null' end,
                          case when is_there then new_name else '/dev/null' end);
  end if;
  hunks := preview.hunks_of(coalesce(before, ''), coalesce(after, ''));
  if hunks <> '' then
    head := head || format(E'--- %s\n+++ %s\n', case when was_there then old_name || tail else '/dev/null' end,
                           case when is_there then new_name || tail else '/dev/null' end);
  end if;
  return head || hunks;
end $$;

-- ------------------------------------------------------------------------------------------------ the RPCs
create function public.restore_project(project_uuid uuid, revision bigint, p_correlation_id text default null)
returns jsonb language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null or restore_project.revision is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' else 'revision' end using errcode = 'PT400';
  elsif restore_project.revision < 1 then
    raise exception 'revision must be 1 or more' using errcode = 'PT400';
  elsif p_correlation_id = '' or octet_length(p_correlation_id) > 200 then
    raise exception 'p_correlation_id must have 1 to 200 bytes' using errcode = 'PT400';
  end if;
  update preview.history_gate g
  set project_id = project_uuid, act = 'restore', revision = restore_project.revision, correlation_id = p_correlation_id
  returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;
comment on function public.restore_project is
  'Make all of a project as it was at a revision, in one new commit. What was written since stays in its history.';

create function public.create_checkpoint(project_uuid uuid, p_name text) returns jsonb
language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null or p_name is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' else 'p_name' end using errcode = 'PT400';
  elsif octet_length(p_name) not between 1 and 200 then
    raise exception 'p_name must have 1 to 200 bytes' using errcode = 'PT400';
  end if;
  update preview.history_gate g set project_id = project_uuid, act = 'keep', name = p_name returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;
comment on function public.create_checkpoint is 'Name the revision of now: it can be brought back whatever of its history is forgotten.';

create function public.delete_checkpoint(project_uuid uuid, p_name text) returns jsonb
language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project_uuid is null or p_name is null then
    raise exception '% must not be null', case when project_uuid is null then 'project_uuid' else 'p_name' end using errcode = 'PT400';
  end if;
  update preview.history_gate g set project_id = project_uuid, act = 'release', name = p_name returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project_uuid using errcode = 'PT404';
  end if;
  return result;
end $$;
comment on function public.delete_checkpoint is 'Remove a checkpoint: what only it kept is forgotten in its time.';

-- What the caller sees of the project; the head says up to where.
create function preview.seen_head(project uuid) returns public.project_heads
language plpgsql stable security invoker set search_path = '' as $$
declare
  head public.project_heads;
begin
  select * into head from public.project_heads h where h.project_id = project;
  if not found and not preview.visible(project) then
    raise exception 'project_uuid %: no such project, or not yours', project using errcode = 'PT404';
  end if;
  head.revision := coalesce(head.revision, 0);
  return head;
end $$;

create function public.list_checkpoints(project_uuid uuid)
returns table (name text, revision bigint, automatic boolean, turn_id uuid, label text, created_at timestamptz)
language plpgsql stable security invoker set search_path = '' as $$
#variable_conflict use_column
begin
  if project_uuid is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  end if;
  perform preview.seen_head(project_uuid);
  return query
    select c.name, c.revision, c.name is null, c.turn_id, c.label, c.created_at from preview.checkpoints c
    where c.project_id = project_uuid order by c.revision desc, c.created_at desc;
end $$;
comment on function public.list_checkpoints is 'The checkpoints of a project, newest first; automatic ones are the ends of turns.';

create function public.diff_project(project_uuid uuid, p_from bigint, p_to bigint default null) returns text
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
      file.path, (select f.content from public.project_files f where f.id = file.past_id),
      (select f.content from public.project_files f where f.id = file.later_id), file.past_id is not null, file.later_id is not null,
      file.was_executable, file.is_executable, file.is_text, file.is_same);
    bytes := bytes + octet_length(parts[cardinality(parts)]);
    if bytes > most then
      raise exception 'the difference between % and % has more than % bytes', p_from, upto, most
        using errcode = 'PT413', hint = 'Compare revisions that are closer.';
    end if;
  end loop;
  return array_to_string(parts, '');
end $$;
comment on function public.diff_project is
  'What changed from one revision to another (null: now), as a unified diff that `git apply` takes; of binary files, that they differ.';

create function public.list_commits(project_uuid uuid, p_limit integer default 50, p_before bigint default null)
returns table (
  revision bigint, changed_at timestamptz, changed_by uuid, changed_by_name text, turn_id uuid, label text, files integer, bytes bigint,
  changes jsonb
) language plpgsql stable security invoker set search_path = '' as $$
#variable_conflict use_column
begin
  if project_uuid is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  elsif p_limit is null or p_limit not between 1 and 1000 then
    raise exception 'p_limit must be 1 to 1000' using errcode = 'PT400';
  end if;
  perform preview.seen_head(project_uuid);
  return query
    select h.revision, min(h.changed_at), min(h.changed_by::text)::uuid, min(h.changed_by_name), coalesce(t.id, k.turn_id),
           coalesce(t.label, k.label),
           count(*)::integer, sum(h.size_bytes)::bigint,
           jsonb_agg(jsonb_build_object('action', h.action, 'file_path', h.file_path, 'version', h.version, 'size_bytes', h.size_bytes)
                     order by h.file_path) filter (where h.n <= 100)
    from (select distinct f.revision from public.project_files f
          where f.project_id = project_uuid and f.revision < coalesce(p_before, 9223372036854775807)
          order by f.revision desc limit p_limit) page
    cross join lateral (
      select c.*, row_number() over (order by c.file_path) as n from public.project_history c
      where c.project_id = project_uuid and c.revision = page.revision
    ) h
    left join preview.turns t on t.project_id = project_uuid and t.revision = page.revision
    left join preview.checkpoints k on k.project_id = project_uuid and k.revision = page.revision and k.name is null
    group by h.revision, t.id, t.label, k.turn_id, k.label
    order by h.revision desc;
end $$;
comment on function public.list_commits is
  'A project''s commits, newest first: who, when, in which turn, and what of it is kept; of `changes` the first 100. `p_before`: only those below that revision.';

-- ------------------------------------------------------------------------------------------------ rights
revoke all on preview.checkpoints, preview.history_gate from public;
revoke all on function preview.keep_turn, preview.files_at, preview.check_kept, preview.restore_all, preview.set_checkpoint, preview.travel,
  preview.lines_of, preview.line_starts, preview.marked, preview.hunks_of, preview.file_diff, preview.seen_head from public;
revoke all on function public.restore_project, public.create_checkpoint, public.delete_checkpoint, public.list_checkpoints,
  public.diff_project, public.list_commits from public, anon, authenticated, service_role;

grant select, update (project_id, act, revision, name, correlation_id) on preview.history_gate to authenticated, service_role;
grant select on preview.checkpoints to authenticated, service_role;
grant execute on function preview.files_at, preview.check_kept, preview.lines_of, preview.line_starts, preview.marked, preview.hunks_of,
  preview.file_diff, preview.seen_head to authenticated, service_role;
grant execute on function public.restore_project, public.create_checkpoint, public.delete_checkpoint, public.list_checkpoints,
  public.diff_project, public.list_commits to authenticated, service_role;
do $$
begin
  execute format('create policy "members see checkpoints" on preview.checkpoints for select to authenticated using (%s)',
    case when to_regprocedure('preview.projects_of(uuid)') is not null then 'project_id in (select preview.my_projects())'
         else 'preview.allows(project_id, ''read'')' end);
end $$;
create policy "a container's token reads no table" on preview.checkpoints as restrictive for all to authenticated
  using (not coalesce((select auth.jwt()) ? 'project_id', false));

notify pgrst, 'reload schema';
