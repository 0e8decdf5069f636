-- Splices: a small change of a large file travels as what changed. An event and an answer of `changes_since` carry, instead of a
-- content above `settings.patch_above_bytes`, `content: null, base_hash, splices: [[offset, delete, "insert"], …]`: what to cut out of
-- the bytes whose hash is `base_hash`, and what to put there. A reader that does not know them sees `content: null`, which is
-- a file by reference, as it always was. One line of a lock file of 388 KB is 154 bytes, which went by reference before.
--
-- Sections: settings · splices · the broadcast · catch-up
--
-- On a live database: one column of a one-row table, and functions. `changes_since` is dropped and made again with one more optional
-- argument, `p_accept`; whoever was granted it keeps that.
set local lock_timeout = '2s';

-- ------------------------------------------------------------------------------------------------ settings
alter table preview.settings
  -- Below it a content is one or two packets anyway. Null: never.
  add column patch_above_bytes integer default 16384 check (patch_above_bytes >= 0);

-- ------------------------------------------------------------------------------------------------ splices
-- How many bytes are equal at the beginning of both, and at the end of both (at most `most`): by halves, so that the comparing is
-- memcmp's and not ours.
create function preview.common_prefix(a bytea, b bytea) returns integer
language plpgsql immutable strict parallel safe set search_path = '' as $$
declare
  low integer := 0;
  high integer := least(octet_length(a), octet_length(b));
  middle integer;
begin
  if substring(a for high) = substring(b for high) then
    return high;
  end if;
  while high - low > 1 loop
    middle := low + (high - low) / 2;
    if substring(a from low + 1 for middle - low) = substring(b from low + 1 for middle - low) then
      low := middle;
    else
      high := middle;
    end if;
  end loop;
  return low;
end $$;

create function preview.common_suffix(a bytea, b bytea, most integer) returns integer
language plpgsql immutable strict parallel safe set search_path = '' as $$
declare
  of_a constant integer := octet_length(a);
  of_b constant integer := octet_length(b);
  low integer := 0;
  high integer := most;
  middle integer;
begin
  if substring(a from of_a - high + 1) = substring(b from of_b - high + 1) then
    return high;
  end if;
  while high - low > 1 loop
    middle := low + (high - low) / 2;
    if substring(a from of_a - middle + 1 for middle - low) = substring(b from of_b - middle + 1 for middle - low) then
      low := middle;
    else
      high := middle;
    end if;
  end loop;
  return low;
end $$;

-- Whether a character begins at this byte, or the text ends there.
create function preview.begins_character(a bytea, at integer) returns boolean
language plpgsql immutable strict parallel safe set search_path = '' as $$
begin
  return at >= octet_length(a) or get_byte(a, at) & 192 <> 128;
end $$;

-- What makes `after` of `before`: [[offset, delete, "insert"], …], in UTF-8 bytes of `before`, ascending, not overlapping and never
-- inside a character. Null: more than `most`, or half of `after` and more would have to be inserted.
--
-- Ends that are equal fall away. From what is left, 256 bytes (then 48) of `after` are looked for in `before`; where they are found,
-- what lies on either side is treated alike. The looking is bounded by four times the size of `before` and a
-- megabyte: a file that was written anew is searched in vain.
create function preview.splices_of(before text, after text, most integer default 24) returns jsonb
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  a constant bytea := convert_to(before, 'UTF8');
  b constant bytea := convert_to(after, 'UTF8');
  -- Quadruples that are still to be done, the leftmost on top: a from, a to, b from, b to.
  todo integer[] := array[0, octet_length(a), 0, octet_length(b)];
  depth integer := 4;
  a1 integer;
  a2 integer;
  b1 integer;
  b2 integer;
  trimmed integer;
  rest bytea;
  other bytea;
  anchor integer;
  at_b integer;
  at_a integer;
  budget bigint := 4::bigint * octet_length(a) + 1048576;
  inserted bigint := 0;
  found jsonb := '[]';
begin
  if a is null or b is null then
    return null;
  end if;
  while depth > 0 loop
    a1 := todo[depth - 3];
    a2 := todo[depth - 2];
    b1 := todo[depth - 1];
    b2 := todo[depth];
    depth := depth - 4;
    rest := substring(a from a1 + 1 for a2 - a1);
    other := substring(b from b1 + 1 for b2 - b1);
    trimmed := preview.common_prefix(rest, other);
    a1 := a1 + trimmed;
    b1 := b1 + trimmed;
    trimmed := preview.common_suffix(rest, other, least(a2 - a1, b2 - b1));
    a2 := a2 - trimmed;
    b2 := b2 - trimmed;
    continue when a1 = a2 and b1 = b2;
    rest := substring(a from a1 + 1 for a2 - a1);
    at_a := 0;
    for try in 0..13 loop  -- at the middle, the quarters and the eighths
      anchor := case when try < 7 then 256 else 48 end;
      continue when a2 - a1 < anchor or b2 - b1 < anchor or budget < a2 - a1;
      at_b := b1 + ((b2 - b1)::bigint * (array[4, 2, 6, 1, 3, 5, 7])[try % 7 + 1] / 8)::integer - anchor / 2;
      continue when at_b < b1 or at_b + anchor > b2;
      budget := budget - (a2 - a1);
      at_a := position(substring(b from at_b + 1 for anchor) in rest);
      exit when at_a > 0;
    end loop;
    if at_a > 0 then
      at_a := a1 + at_a - 1;
      if depth > 4 * most then
        return null;
      end if;
      todo[depth + 1 : depth + 8] := array[at_a, a2, at_b, b2, a1, at_a, b1, at_b];
      depth := depth + 8;
    else
      -- What lies before and behind is equal on both sides, so both ends move alike.
      while a1 > 0 and b1 > 0 and not (preview.begins_character(a, a1) and preview.begins_character(b, b1)) loop
        a1 := a1 - 1;
        b1 := b1 - 1;
      end loop;
      while not (preview.begins_character(a, a2) and preview.begins_character(b, b2)) loop
        a2 := a2 + 1;
        b2 := b2 + 1;
      end loop;
      inserted := inserted + (b2 - b1);
      found := found || jsonb_build_array(
        jsonb_build_array(a1, a2 - a1, convert_from(substring(b from b1 + 1 for b2 - b1), 'UTF8')));
      if jsonb_array_length(found) > most or inserted > 0 and 2 * inserted >= octet_length(b) then
        return null;
      end if;
    end if;
  end loop;
  return found;
end $$;
comment on function preview.splices_of is
  'What makes `after` of `before`: [[offset, delete, "insert"], …] in UTF-8 bytes of `before`; null: it is not worth it.';

-- What an update carries instead of its content; null: the content is as good. `most`: bytes that it may have.
create function preview.patch_of(before text, base_hash text, after text, most integer) returns jsonb
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  splices jsonb := preview.splices_of(before, after);
begin
  if octet_length(splices::text) < least(octet_length(after) / 2, most) then
    return jsonb_build_object('content', null, 'base_hash', base_hash, 'splices', splices);
  end if;
  return null;
end $$;

-- ------------------------------------------------------------------------------------------------ the broadcast
-- As it was, but with splices where they are much smaller. Above the limit the contents go by reference, then the splices too; a bulk
-- whose references are still too many is a doorbell, and the log says the rest.
create or replace function preview.broadcast(
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
  above integer := (select s.patch_above_bytes from preview.settings s);
  -- Of each step, by its number; null: it has none.
  patches jsonb[];
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
  select array_agg(case when s.size_bytes > above and s.content is not null and s.was_there then (
                     select preview.patch_of(f.content, f.content_hash, s.content, limit_bytes)
                     from public.project_files f where f.id = s.was_id and f.content is not null) end order by s.ordinality)
  into patches from unnest(steps) with ordinality s;
  select coalesce(sum(octet_length(s.content)), 0) into content_bytes
  from unnest(steps) with ordinality s where patches[s.ordinality] is null;
  if bulk then
    event := 'bulk:apply';
    -- With contents, with splices alone, with references alone.
    for form in 0..2 loop
      continue when form = 0 and content_bytes > limit_bytes;
      select common || jsonb_build_object('files', jsonb_agg(preview.entry_of(
        s.file_path, s.action = 'delete', case when form = 0 then s.content end, s.content_hash, s.version,
        s.encoding, s.executable) || coalesce(case when form < 2 then patches[s.ordinality] end, '{}'))) into message
      from unnest(steps) with ordinality s;
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
      'file_path', step.file_path, 'content', case when content_bytes <= limit_bytes and patches[1] is null then step.content end,
      'content_hash', step.content_hash, 'version', step.version, 'file_type', step.file_type,
      'size', step.size_bytes, 'encoding', step.encoding) || coalesce(patches[1], '{}');
    if step.executable then
      message := message || '{"executable": true}'::jsonb;
    end if;
    if octet_length(message::text) > limit_bytes then
      message := (message || '{"content": null}'::jsonb) - 'base_hash' - 'splices';
    end if;
  end if;
  perform preview.publish('project:' || project_uuid, event, message);
end $$;

-- ------------------------------------------------------------------------------------------------ catch-up
create temporary table granted_before on commit drop as
  select a.grantee, a.is_grantable from pg_proc p cross join lateral aclexplode(p.proacl) a
  where p.oid = 'public.changes_since(uuid,text,bigint,text[],bigint)'::regprocedure
    and a.privilege_type = 'EXECUTE' and a.grantee <> p.proowner and a.grantee <> 0;
drop function public.changes_since(uuid, text, bigint, text[], bigint);

-- As it was, but that whoever says `splices` in `p_accept` gets them for files that changed since, from the version that was current
-- at their revision. What is asked for by path is always whole: it is asked for because what is there is not what it should be.
create function public.changes_since(
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
             from (select b.content, b.content_hash from public.project_files b
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
comment on function public.changes_since is 'What became of each path after `revision`; the latest of each, tombstones included.';

-- Members may not read `preview.settings`, and this number is no secret.
create function preview.patches_above() returns integer
language sql stable security definer set search_path = '' as $$
  select s.patch_above_bytes from preview.settings s
$$;

revoke all on function preview.common_prefix, preview.common_suffix, preview.begins_character, preview.splices_of, preview.patch_of,
  preview.patches_above from public;
grant execute on function preview.common_prefix, preview.common_suffix, preview.begins_character, preview.splices_of, preview.patch_of,
  preview.patches_above to authenticated, service_role;
revoke all on function public.changes_since from public, anon, authenticated, service_role;
do $$
declare
  earlier record;
begin
  for earlier in select g.grantee::regrole as who, g.is_grantable from granted_before g loop
    execute format('grant execute on function public.changes_since to %s%s', earlier.who,
                   case when earlier.is_grantable then ' with grant option' else '' end);
  end loop;
end $$;

notify pgrst, 'reload schema';
