-- Write-back: what a tool in a container made (a lock file, a generated route tree, a formatted source) goes back into the project.
--
-- Off until a project has rules: which paths, as what, how large. `generated` is written at once, `authored` waits for a member.
-- A container offers through the orchestrator, which asks as the role `preview_writer`; that one may execute one function here and
-- nothing else, and everything is judged in it again: rules, sizes, rate, versions. What loses against a newer version is kept and
-- shown, so that neither a person's save nor a tool's output is lost.
--
-- Sections: rules · what is kept · the rate and the loop guard · an offer · what members decide · the RPCs · forgetting · rights
--
-- On a live database: new tables and functions alone, columns of the one-row table of settings, and a role.
set local lock_timeout = '2s';

do $$
begin
  if not exists (select from pg_roles where rolname = 'preview_writer') then
    create role preview_writer nologin noinherit;
  end if;
  -- Whoever makes a role may administer it; to become it is another right, from PostgreSQL 16 on.
  execute format('grant preview_writer to %I', current_user);
exception
  when duplicate_object or unique_violation then null;  -- made by another database of the same server at the same moment
  when insufficient_privilege then
    raise warning 'preview_writer could not be granted to % (%): grant it to the role that the orchestrator connects as', current_user, sqlerrm;
end $$;

alter table preview.settings
  -- Of each project; one offer has up to 50 files.
  add column offers_per_minute integer not null default 30 check (offers_per_minute > 0),
  -- Open conflicts and proposals of each project: how many, and the bytes of their contents.
  add column max_kept_changes integer not null default 200 check (max_kept_changes > 0),
  add column max_kept_bytes bigint not null default 33554432 check (max_kept_bytes > 0),
  add column kept_changes_kept interval not null default '30 days' check (kept_changes_kept > '0');

-- ------------------------------------------------------------------------------------------------ rules
-- Why a glob may not be used; null: it may. `*` and `?` within a segment, `**` as a whole one; all else stands for itself.
create function preview.glob_problem(glob text) returns text
language plpgsql immutable strict parallel safe set search_path = '' as $$
begin
  return coalesce(preview.path_problem(glob), case
    when octet_length(glob) > 512 then 'too_long'
    when left(glob, 1) = '!' then 'negation'
    when glob ~ '[{}]' then 'braces'
    when exists (select from unnest(string_to_array(glob, '/')) s where s ~ '\*\*' and s <> '**') then 'stars'
  end);
end $$;

-- A glob as a regular expression. `**` at the end stands for one segment or more, elsewhere for any number, none too.
create function preview.glob_pattern(glob text) returns text
language plpgsql immutable strict parallel safe set search_path = '' as $$
declare
  segments text[] := string_to_array(glob, '/');
  last integer := cardinality(segments);
begin
  return '^' || (select string_agg(case
      when s.text = '**' then case when s.n = last then '.+' else '(?:[^/]+/)*' end
      else replace(replace(regexp_replace(s.text, '([][(){}.+^$|\\])', '\\\1', 'g'), '?', '[^/]'), '*', '[^/]*')
           || case when s.n = last then '' else '/' end end, '' order by s.n)
    from unnest(segments) with ordinality s(text, n)) || '$';
end $$;

create table preview.project_write_back (
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  glob text not null check (preview.glob_problem(glob) is null),
  -- The first that speaks of a path decides.
  position integer not null,
  mode text not null check (mode in ('generated', 'authored')),
  -- Of one file.
  max_bytes integer not null check (max_bytes between 1 and 1048576),
  -- Whether a deletion may come back too.
  deletes boolean not null,
  primary key (project_id, glob)
);
alter table preview.project_write_back enable row level security;
comment on table preview.project_write_back is 'Which paths of a project its containers may give back, and as what. None: write-back is off.';

-- ------------------------------------------------------------------------------------------------ what is kept
create table preview.kept_changes (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  kind text not null check (kind in ('conflict', 'proposal')),
  state text not null default 'open' check (state in ('open', 'taken', 'dropped', 'replaced')),
  file_path text collate "C" not null,
  action text not null check (action in ('upsert', 'delete')),
  -- Null once it is decided.
  content text,
  content_hash text,
  size_bytes integer not null,
  executable boolean,
  -- The version that the container's file was made from; 0: none.
  base_version integer not null,
  session_id uuid not null,
  created_at timestamptz not null,
  decided_at timestamptz,
  decided_by uuid,
  check ((state = 'open' and action = 'upsert') = (content is not null))
);
create unique index kept_changes_open_idx on preview.kept_changes (project_id, kind, file_path, content_hash)
  nulls not distinct where state = 'open';
create index kept_changes_path_idx on preview.kept_changes (project_id, file_path);
create index kept_changes_created_at_idx on preview.kept_changes (created_at);
alter table preview.kept_changes enable row level security;
comment on table preview.kept_changes is
  'What containers offered and was not written: conflicts, which came too late, and proposals, which wait for a member.';

-- ------------------------------------------------------------------------------------------------ the rate and the loop guard
create table preview.write_back_state (
  project_id uuid primary key references public.project_heads (project_id) on delete cascade,
  tokens double precision not null,
  refilled_at timestamptz not null,
  -- The last commit of containers, and the last one before it that was not theirs. If the head stands at another, people wrote since.
  last_revision bigint not null default 0,
  person_revision bigint not null default 0
) with (fillfactor = 50);
alter table preview.write_back_state enable row level security;
comment on table preview.write_back_state is 'Of each project that took offers: what it may take now, and when people wrote last.';

-- Whether the path held it since people wrote last. Two sessions whose generators disagree would else write for ever.
create function preview.came_before(project uuid, path text, hash text, since bigint) returns boolean
language plpgsql stable set search_path = '' set enable_seqscan = off as $$
begin
  return exists (
    select from public.project_files v
    where v.project_id = project and v.file_path = path and not v.is_current_version and v.content_hash is not distinct from hash
      and coalesce((select n.revision from public.project_files n
                    where n.project_id = project and n.file_path = path and n.version > v.version
                    order by n.version limit 1), 0) > since);
end $$;

-- ------------------------------------------------------------------------------------------------ an offer
create type preview.offered as (
  action text, file_path text, content text, content_hash text, size_bytes integer, executable boolean, base_version integer
);

-- Keeps a change that is not written. The same again is the same row; null: `rule` says why it is not kept.
create function preview.keep_change(
  project uuid, session uuid, kind text, change preview.offered, limits preview.settings, out kept_id uuid, out rule text
) language plpgsql set search_path = '' as $$
declare
  held record;
begin
  select k.id into kept_id from preview.kept_changes k
  where k.project_id = project and k.kind = keep_change.kind and k.file_path = change.file_path and k.state = 'open'
    and k.content_hash is not distinct from change.content_hash;
  if found then
    return;
  end if;
  if kind = 'proposal' then
    if exists (select from preview.kept_changes k
               where k.project_id = project and k.file_path = change.file_path and k.kind = 'proposal' and k.state = 'dropped'
                 and k.content_hash is not distinct from change.content_hash) then
      rule := 'rejected';
      return;
    end if;
    update preview.kept_changes k set state = 'replaced', content = null, decided_at = clock_timestamp()
    where k.project_id = project and k.file_path = change.file_path and k.kind = 'proposal' and k.state = 'open'
      and k.session_id = session;
  end if;
  select count(*) as rows, coalesce(sum(k.size_bytes), 0) as bytes into held from preview.kept_changes k
  where k.project_id = project and k.state = 'open';
  if held.rows >= limits.max_kept_changes or held.bytes + change.size_bytes > limits.max_kept_bytes then
    rule := 'full';
    return;
  end if;
  insert into preview.kept_changes (
    project_id, kind, file_path, action, content, content_hash, size_bytes, executable, base_version, session_id, created_at)
  values (project, kind, change.file_path, change.action, change.content, change.content_hash, change.size_bytes, change.executable,
          change.base_version, session, clock_timestamp())
  returning id into kept_id;
end $$;

create function preview.outcome(path text, outcome text, rule text default null, kept_id uuid default null) returns jsonb
language plpgsql immutable set search_path = '' as $$
begin
  return jsonb_strip_nulls(jsonb_build_object('file_path', path, 'outcome', outcome, 'rule', rule, 'kept_id', kept_id));
end $$;

-- What becomes of one offered change; null: it is to be written. The caller holds the project's head.
create function preview.judge_offered(project uuid, session uuid, change preview.offered, since bigint, limits preview.settings)
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
  end if;
  return null;
end $$;

-- Writes changes of one offer, in one commit; `refused`: what is in the way of it.
create function preview.write_offered(project uuid, session uuid, changes preview.offered[]) returns jsonb
language plpgsql set search_path = '' as $$
declare
  answer jsonb;
begin
  update preview.write_gate g
  set project_id = project, bulk = cardinality(write_offered.changes) > 1, origin = 'container', session_id = session,
      changes = array(select row(case c.action when 'upsert' then 'update' else c.action end, c.file_path, null, c.content, null,
                                 c.executable, null)::preview.change from unnest(write_offered.changes) c)
  returning g.answer into strict answer;
  return answer;
exception
  when sqlstate 'PT409' then return '{"refused": "path"}';  -- a file would be a directory
  when sqlstate 'PT413' then return '{"refused": "project_full"}';
end $$;

-- Takes what is left of an offer into the project. As one commit where nothing is in the way of any of it, else each by itself.
-- `results` by number, as `write_back` gives them.
create function preview.take_offered(project uuid, session uuid, changes preview.offered[], numbers integer[])
returns table (n integer, result jsonb) language plpgsql set search_path = '' as $$
declare
  answer jsonb := preview.write_offered(project, session, changes);
begin
  if not answer ? 'refused' then
    return query
      select w.n, preview.outcome(c.file_path, 'applied')
                  || jsonb_build_object('version', f.value -> 'version', 'revision', answer -> 'revision')
      from unnest(changes) with ordinality c
      join unnest(numbers) with ordinality w(n, at) on w.at = c.ordinality
      join jsonb_array_elements(answer -> 'files') f on f.value ->> 'file_path' = c.file_path;
  elsif cardinality(changes) = 1 then
    return query select numbers[1], preview.outcome(changes[1].file_path, 'refused', answer ->> 'refused');
  else
    for at in 1..cardinality(changes) loop
      return query select t.n, t.result from preview.take_offered(project, session, changes[at:at], numbers[at:at]) t;
    end loop;
  end if;
end $$;

-- What a container's session offers, judged and written in one transaction; the same `offer_id` again is the same answer.
-- `changes`: [{action, file_path, content, executable, base_version}], as the orchestrator read them; `refused` beside them is a rule
-- that the orchestrator found broken.
create function preview.write_back(session uuid, generation integer, offer_id text, epoch text, changes jsonb) returns jsonb
language plpgsql security definer set search_path = '' set plan_cache_mode = 'force_generic_plan' as $$
#variable_conflict use_variable
declare
  known preview.sessions;
  head public.project_heads;
  limits preview.settings;
  state preview.write_back_state;
  moment timestamptz;
  -- Without what the orchestrator refused: it may be judged otherwise when it is asked again.
  request text := preview.digest_of(concat_ws(' ', 'write_back', generation, epoch,
    (select jsonb_agg(c.value - 'refused' order by c.ordinality) from jsonb_array_elements(changes) with ordinality c)));
  id constant text := 'container:' || session || ':' || offer_id;
  answer jsonb;
  whole text;
  results jsonb[] := '{}';
  fresh preview.offered[] := '{}';
  numbers integer[] := '{}';
  each record;
  since bigint;
  deleted integer;
begin
  select * into known from preview.sessions s where s.id = session;
  if not found or known.state in ('draining', 'gone', 'failed') then
    raise exception 'session %: it is over', session using errcode = 'PT410';
  end if;
  select * into strict limits from preview.settings;
  select * into strict head from public.project_heads h where h.project_id = known.project_id for no key update;
  moment := clock_timestamp();
  answer := preview.answer_to(known.project_id, id, request, moment, limits.answers_kept);
  if answer is not null then
    return answer;
  end if;
  insert into preview.write_back_state as s (project_id, tokens, refilled_at)
  values (known.project_id, limits.offers_per_minute, moment)
  on conflict (project_id) do update
  set tokens = least(limits.offers_per_minute,
                     s.tokens + greatest(0, extract(epoch from moment - s.refilled_at)) * limits.offers_per_minute / 60),
      refilled_at = moment
  returning * into state;
  if state.tokens < 1 then
    raise exception 'project %: more than % offers in a minute', known.project_id, limits.offers_per_minute using errcode = 'PT429',
      detail = jsonb_build_object('retry_after', ceil((1 - state.tokens) * 60 / limits.offers_per_minute))::text;
  elsif jsonb_array_length(changes) > 50 or octet_length(changes::text) > 16777216 then
    raise exception 'changes: at most 50 files and 4 MB are taken in one offer' using errcode = 'PT413';
  end if;
  since := case when state.last_revision = head.revision then state.person_revision else head.revision end;
  whole := case
    when generation <> known.generation then 'generation'
    when epoch is distinct from head.epoch::text then 'epoch'
    when coalesce(known.run -> 'plain' ->> 'write_back', (select r.plain ->> 'write_back' from preview.run_settings r
      where r.project_id = known.project_id)) is distinct from 'true' then 'off'
  end;
  deleted := (select count(*) from jsonb_array_elements(changes) c where c.value ->> 'action' = 'delete');
  deleted := case when deleted > 3 and deleted * 5 > (select t.files from preview.project_totals t
                                                      where t.project_id = known.project_id) then deleted else 0 end;
  for each in
    select c.ordinality::integer as n, c.value ->> 'refused' as refused, row(
             c.value ->> 'action', c.value ->> 'file_path', text.content,
             encode(sha256(convert_to(text.content, 'UTF8')), 'hex'), coalesce(octet_length(text.content), 0),
             (c.value ->> 'executable')::boolean, (c.value ->> 'base_version')::integer)::preview.offered as change
    from jsonb_array_elements(changes) with ordinality c
    cross join lateral (select case when c.value ->> 'action' = 'upsert' then c.value ->> 'content' end as content) text
    order by c.ordinality
  loop
    if coalesce(whole, each.refused) is not null then
      answer := preview.outcome((each.change).file_path, 'refused', coalesce(whole, each.refused));
    elsif (each.change).action = 'delete' and deleted > 0 then
      answer := preview.outcome((each.change).file_path, 'refused', 'deletes');
    else
      answer := preview.judge_offered(known.project_id, session, each.change, since, limits);
    end if;
    results := array_append(results, answer);
    if answer is null then
      fresh := array_append(fresh, each.change);
      numbers := array_append(numbers, each.n);
    end if;
  end loop;
  if cardinality(fresh) > 0 then
    for each in select t.n, t.result from preview.take_offered(known.project_id, session, fresh, numbers) t loop
      results[each.n] := each.result;
    end loop;
    select h.* into strict head from public.project_heads h where h.project_id = known.project_id;
  end if;
  update preview.write_back_state s
  set tokens = s.tokens - 1, person_revision = since, last_revision = head.revision
  where s.project_id = known.project_id;
  answer := jsonb_build_object('epoch', head.epoch, 'revision', head.revision, 'results', to_jsonb(results));
  perform preview.keep_answer(known.project_id, id, request, answer, moment, limits.answers_kept);
  return answer;
end $$;
comment on function preview.write_back is 'Take what a container offers; only preview_writer may ask.';

-- ------------------------------------------------------------------------------------------------ what members decide
-- Replaces a project's rules, and turns write-back on, or off where there are none; running agents hear it with their next heartbeat.
create function preview.set_rules(project uuid, rules jsonb) returns jsonb
language plpgsql set search_path = '' as $$
declare
  problem text;
  is_on constant boolean := jsonb_array_length(rules) > 0;
begin
  if not preview.give_head(project) then
    perform preview.refuse_project(project);
  end if;
  select format('p_rules[%s]%s', r.ordinality - 1, p.says) into problem
  from jsonb_array_elements(rules) with ordinality r
  cross join lateral (select case
    when jsonb_typeof(r.value) <> 'object' then ' must be an object'
    when jsonb_typeof(r.value -> 'glob') is distinct from 'string' then '.glob must be a string'
    when preview.glob_problem(r.value ->> 'glob') is not null
      then format('.glob is no glob that can be used here (%s)', preview.glob_problem(r.value ->> 'glob'))
    when coalesce(r.value ->> 'mode', '') not in ('generated', 'authored') then '.mode must be generated or authored'
    when r.value ? 'max_bytes' and (jsonb_typeof(r.value -> 'max_bytes') <> 'number' or r.value ->> 'max_bytes' !~ '^\d{1,7}$'
      or (r.value ->> 'max_bytes')::integer not between 1 and 1048576) then '.max_bytes must be 1 to 1048576'
    when r.value ? 'deletes' and jsonb_typeof(r.value -> 'deletes') <> 'boolean' then '.deletes must be true or false'
    when exists (select from jsonb_array_elements(rules) with ordinality o
                 where o.ordinality < r.ordinality and o.value ->> 'glob' = r.value ->> 'glob') then '.glob is named twice'
  end) p(says)
  where p.says is not null limit 1;
  if problem is not null then
    raise exception '%', problem using errcode = 'PT400';
  end if;
  delete from preview.project_write_back w where w.project_id = project;
  insert into preview.project_write_back (project_id, glob, position, mode, max_bytes, deletes)
  select project, r.value ->> 'glob', r.ordinality, r.value ->> 'mode', coalesce((r.value ->> 'max_bytes')::integer, 1048576),
         coalesce((r.value ->> 'deletes')::boolean, false)
  from jsonb_array_elements(rules) with ordinality r;
  insert into preview.run_settings as s (project_id, revision, plain)
  values (project, 1, jsonb_build_object('write_back', is_on))
  on conflict (project_id) do update
  set revision = s.revision + 1, plain = s.plain || jsonb_build_object('write_back', is_on), updated_at = now();
  return jsonb_build_object('project_id', project, 'write_back', is_on, 'rules', jsonb_array_length(rules));
end $$;

-- Takes one kept change into the project, as a save of whoever decides, or drops it.
create function preview.decide_kept(project uuid, kind text, kept_id uuid, take boolean, force boolean) returns jsonb
language plpgsql set search_path = '' as $$
declare
  head public.project_heads;
  kept preview.kept_changes;
  told jsonb;
begin
  select * into head from public.project_heads h where h.project_id = project for no key update;
  select * into kept from preview.kept_changes k
  where k.id = kept_id and k.project_id = project and k.kind = decide_kept.kind for no key update;
  if not found then
    raise exception 'kept_id %: no such % in this project', kept_id, kind using errcode = 'PT404';
  elsif kept.state <> 'open' then
    raise exception 'kept_id %: it was decided already (%)', kept_id, kept.state using errcode = 'PT410';
  end if;
  told := jsonb_build_object('kept_id', kept_id, 'file_path', kept.file_path);
  if take then
    update preview.write_gate g
    set project_id = project, bulk = true, session_id = kept.session_id,
        origin = case when auth.uid() is null then 'api' else 'user' end,
        changes = array[row(case kept.action when 'upsert' then 'update' else 'delete' end, kept.file_path, null, kept.content, null,
                            kept.executable, case when not force then kept.base_version end)::preview.change]
    returning told || jsonb_build_object('revision', g.answer -> 'revision', 'version', g.answer #> '{files,0,version}')
    into strict told;
  end if;
  update preview.kept_changes k
  set state = case when take then 'taken' else 'dropped' end, content = null, decided_at = clock_timestamp(), decided_by = auth.uid()
  where k.id = kept_id;
  return told || jsonb_build_object('state', case when take then 'taken' else 'dropped' end);
end $$;

-- As `preview.write_gate` is: the RPCs have their caller's rights, and the trigger asks whether the caller may.
create view preview.write_back_gate with (security_invoker = true) as
  select null::uuid as project_id, null::text as act, null::jsonb as rules, null::uuid as kept_id, null::boolean as take,
         null::boolean as force, null::jsonb as answer, not row_security_active('public.project_files'::regclass) as unrestricted;
comment on view preview.write_back_gate is 'The door of write-back: `update … set act = rules | conflict | proposal, … returning answer`.';

create function preview.decide() returns trigger
language plpgsql security definer set search_path = '' set plan_cache_mode = 'force_generic_plan' as $$
begin
  if not old.unrestricted then
    if auth.uid() is null or coalesce(auth.jwt() ? 'project_id', false)
       or not coalesce(preview.may_access(new.project_id, auth.uid(), 'write'), false)
    then
      return null;
    elsif new.act = 'rules' and preview.owner_of(new.project_id) is distinct from auth.uid() then
      raise exception 'project_uuid %: only its owner and the service may say what containers give back', new.project_id
        using errcode = 'PT403';
    end if;
  end if;
  case new.act
    when 'rules' then
      new.answer := preview.set_rules(new.project_id, new.rules);
    when 'conflict', 'proposal' then
      new.answer := preview.decide_kept(new.project_id, new.act, new.kept_id, new.take, new.force);
  end case;
  return new;
end $$;
create trigger decide instead of update on preview.write_back_gate for each row execute function preview.decide();

-- ------------------------------------------------------------------------------------------------ the RPCs
create function preview.ask_write_back(project uuid, act text, rules jsonb, kept_id uuid, take boolean, force boolean) returns jsonb
language plpgsql security invoker set search_path = '' as $$
declare
  result jsonb;
begin
  if project is null then
    raise exception 'project_uuid must not be null' using errcode = 'PT400';
  elsif act <> 'rules' and kept_id is null then
    raise exception 'kept_id must not be null' using errcode = 'PT400';
  end if;
  update preview.write_back_gate g
  set project_id = project, act = ask_write_back.act, rules = ask_write_back.rules, kept_id = ask_write_back.kept_id,
      take = ask_write_back.take, force = ask_write_back.force
  returning g.answer into result;
  if not found then
    raise exception 'project_uuid %: no such project, or not yours', project using errcode = 'PT404';
  end if;
  return result;
end $$;

create function public.set_write_back(project_uuid uuid, p_rules jsonb) returns jsonb
language plpgsql security invoker set search_path = '' as $$
begin
  if p_rules is null or jsonb_typeof(p_rules) <> 'array' or jsonb_array_length(p_rules) > 50 then
    raise exception 'p_rules must be a JSON array of at most 50 {glob, mode, max_bytes, deletes}' using errcode = 'PT400';
  end if;
  return preview.ask_write_back(project_uuid, 'rules', p_rules, null, null, null);
end $$;
comment on function public.set_write_back is
  'Say which paths a project''s containers may give back, and as what; an empty array turns write-back off. The owner''s and the service''s.';

create function public.list_write_back(project_uuid uuid)
returns table (glob text, mode text, max_bytes integer, deletes boolean)
language plpgsql stable security invoker set search_path = '' as $$
#variable_conflict use_column
begin
  perform preview.seen_head(project_uuid);
  return query select w.glob, w.mode, w.max_bytes, w.deletes from preview.project_write_back w
    where w.project_id = project_uuid order by w.position;
end $$;
comment on function public.list_write_back is 'The rules of a project''s write-back, in the order in which they are asked.';

create function preview.list_kept(project uuid, kind text, which uuid)
returns table (
  kept_id uuid, file_path text, action text, content text, content_hash text, size_bytes integer, base_version integer,
  current_version integer, session_id uuid, created_at timestamptz
) language plpgsql stable security invoker set search_path = '' as $$
#variable_conflict use_column
begin
  perform preview.seen_head(project);
  return query
    select k.id, k.file_path, k.action, case when k.id = which then k.content end, k.content_hash, k.size_bytes,
           k.base_version, coalesce(f.version, 0), k.session_id, k.created_at
    from preview.kept_changes k
    left join public.project_files f on f.project_id = project and f.file_path = k.file_path and f.is_current_version
    where k.project_id = project and k.kind = list_kept.kind and k.state = 'open' and k.id = coalesce(which, k.id)
    order by k.created_at, k.id;
end $$;

create function public.list_conflicts(project_uuid uuid, p_kept_id uuid default null)
returns table (
  kept_id uuid, file_path text, action text, content text, content_hash text, size_bytes integer, base_version integer,
  current_version integer, session_id uuid, created_at timestamptz
) language plpgsql stable security invoker set search_path = '' as $$
begin
  return query select * from preview.list_kept(project_uuid, 'conflict', p_kept_id);
end $$;
comment on function public.list_conflicts is
  'What tools made and a newer version stands in the way of. With p_kept_id: that one, with its content.';

create function public.list_proposals(project_uuid uuid, p_kept_id uuid default null)
returns table (
  kept_id uuid, file_path text, action text, content text, content_hash text, size_bytes integer, base_version integer,
  current_version integer, session_id uuid, created_at timestamptz
) language plpgsql stable security invoker set search_path = '' as $$
begin
  return query select * from preview.list_kept(project_uuid, 'proposal', p_kept_id);
end $$;
comment on function public.list_proposals is 'What tools propose for files that people write. With p_kept_id: that one, with its content.';

create function public.resolve_conflict(project_uuid uuid, kept_id uuid, p_take text) returns jsonb
language plpgsql security invoker set search_path = '' as $$
begin
  if p_take is null or p_take not in ('kept', 'current') then
    raise exception 'p_take must be kept or current' using errcode = 'PT400';
  end if;
  return preview.ask_write_back(project_uuid, 'conflict', null, kept_id, p_take = 'kept', true);
end $$;
comment on function public.resolve_conflict is 'Write what was kept over the current version (`kept`), or drop it (`current`).';

create function public.accept_proposal(project_uuid uuid, kept_id uuid, p_force boolean default false) returns jsonb
language plpgsql security invoker set search_path = '' as $$
begin
  return preview.ask_write_back(project_uuid, 'proposal', null, kept_id, true, coalesce(p_force, false));
end $$;
comment on function public.accept_proposal is
  'Write a proposal, as a save of whoever accepts it. 409 where the file changed since the tool read it, unless p_force.';

create function public.reject_proposal(project_uuid uuid, kept_id uuid) returns jsonb
language plpgsql security invoker set search_path = '' as $$
begin
  return preview.ask_write_back(project_uuid, 'proposal', null, kept_id, false, false);
end $$;
comment on function public.reject_proposal is 'Drop a proposal; the same content is not proposed again.';

-- ------------------------------------------------------------------------------------------------ forgetting
-- What nobody decided in `kept_changes_kept`, and what was decided as long ago. At most `most` rows a call.
create function preview.forget_kept(most integer default 500) returns integer
language plpgsql set search_path = '' as $$
declare
  gone integer;
begin
  delete from preview.kept_changes k where k.id in (
    select old.id from preview.kept_changes old
    where old.created_at < now() - (select s.kept_changes_kept from preview.settings s)
    order by old.created_at limit most for update skip locked);
  get diagnostics gone = row_count;
  return gone;
end $$;
comment on function preview.forget_kept is 'Forget conflicts and proposals that are old; the orchestrator calls it.';

-- ------------------------------------------------------------------------------------------------ rights
revoke all on preview.project_write_back, preview.kept_changes, preview.write_back_state, preview.write_back_gate
  from public, anon, authenticated, service_role;
revoke all on function preview.glob_problem, preview.glob_pattern, preview.came_before, preview.keep_change, preview.outcome,
  preview.judge_offered, preview.write_offered, preview.take_offered, preview.write_back, preview.set_rules, preview.decide_kept,
  preview.decide, preview.ask_write_back, preview.list_kept, preview.forget_kept from public;
revoke all on function public.set_write_back, public.list_write_back, public.list_conflicts, public.list_proposals,
  public.resolve_conflict, public.accept_proposal, public.reject_proposal from public, anon, authenticated, service_role;

grant usage on schema preview to preview_writer;
grant execute on function preview.write_back to preview_writer;
grant select on preview.project_write_back, preview.kept_changes to authenticated, service_role;
grant select, update (project_id, act, rules, kept_id, take, force) on preview.write_back_gate to authenticated, service_role;
grant execute on function preview.ask_write_back, preview.list_kept to authenticated, service_role;
grant execute on function public.set_write_back, public.list_write_back, public.list_conflicts, public.list_proposals,
  public.resolve_conflict, public.accept_proposal, public.reject_proposal to authenticated, service_role;
grant execute on function preview.forget_kept to service_role;
do $$
declare
  guarded text;
begin
  foreach guarded in array array['project_write_back', 'kept_changes'] loop
    execute format('create policy "members see write-back" on preview.%I for select to authenticated using (%s)', guarded,
      case when to_regprocedure('preview.projects_of(uuid)') is not null then 'project_id in (select preview.my_projects())'
           else 'preview.allows(project_id, ''read'')' end);
    execute format('create policy "a container''s token reads no table" on preview.%I as restrictive for all to authenticated '
                   'using (not coalesce((select auth.jwt()) ? ''project_id'', false))', guarded);
  end loop;
end $$;

notify pgrst, 'reload schema';
