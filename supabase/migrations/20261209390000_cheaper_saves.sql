-- A save of one file does less: its broadcast looks for splices only where a content is replaced, and at the step that it has in place of
-- a table made of all steps. What is sent is as it was.
--
-- On a live database: one function is replaced in place.
set local lock_timeout = '2s';

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
  above integer;
  -- Of each step of a bulk, by its number; null: it has none.
  patches jsonb[];
  patch jsonb;
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
  if bulk then
    above := (select s.patch_above_bytes from preview.settings s);
    select array_agg(case when s.size_bytes > above and s.content is not null and s.was_there then (
                       select preview.patch_of(f.content, f.content_hash, s.content, limit_bytes)
                       from public.project_files f where f.id = s.was_id and f.content is not null) end order by s.ordinality)
    into patches from unnest(steps) with ordinality s;
    select coalesce(sum(octet_length(s.content)), 0) into content_bytes
    from unnest(steps) with ordinality s where patches[s.ordinality] is null;
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
    if step.was_there and step.content is not null then
      select preview.patch_of(f.content, f.content_hash, step.content, limit_bytes) into patch
      from preview.settings s, public.project_files f
      where step.size_bytes > s.patch_above_bytes and f.id = step.was_id and f.content is not null;
    end if;
    message := common || jsonb_build_object(
      'file_path', step.file_path,
      'content', case when patch is null and octet_length(step.content) <= limit_bytes then step.content end,
      'content_hash', step.content_hash, 'version', step.version, 'file_type', step.file_type,
      'size', step.size_bytes, 'encoding', step.encoding) || coalesce(patch, '{}');
    if step.executable then
      message := message || '{"executable": true}'::jsonb;
    end if;
    if octet_length(message::text) > limit_bytes then
      message := (message || '{"content": null}'::jsonb) - 'base_hash' - 'splices';
    end if;
  end if;
  perform preview.publish('project:' || project_uuid, event, message);
end $$;
