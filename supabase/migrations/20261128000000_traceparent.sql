-- A writer's trace goes with the event: whoever applies it can say which save it was.

-- The W3C `traceparent` of the request, as PostgREST hands its headers on, or what the session set in
-- `preview.traceparent`; null without a valid one. By pattern and not as JSON: a header must not be able to end a save, and
-- a quote inside one is escaped, so that it cannot pass for another header's name.
create function preview.traceparent() returns text language plpgsql stable set search_path = '' as $$
declare
  form constant text := '00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}';
  own text := current_setting('preview.traceparent', true);
  headers text := current_setting('request.headers', true);
begin
  if own ~ ('^' || form || '$') then
    return own;
  end if;
  if strpos(headers, '"traceparent"') > 0 then
    return substring(headers from '"traceparent"\s*:\s*"(' || form || ')"');
  end if;
  return null;
end $$;

revoke all on function preview.traceparent() from public;

create or replace function preview.broadcast(
  project_uuid uuid, bulk boolean, steps preview.step[], head_epoch uuid, head_revision bigint, moment timestamptz,
  sender text, limit_bytes integer
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
