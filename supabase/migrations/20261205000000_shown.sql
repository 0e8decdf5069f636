-- What is shown: an agent's status says which revision people see and which errors are open. Whoever waits for that is woken,
-- and members hear of it on `preview:{project}`, at most once a second.
--
-- On a live database: two columns are added to preview.sessions as null, which rewrites nothing; a trigger on it waits for
-- its writers, at most for the lock_timeout.
set local lock_timeout = '2s';

alter table preview.sessions add column told jsonb, add column told_at timestamptz;
comment on column preview.sessions.told is 'The last preview:status that members were told.';

create function preview.announce_shown() returns trigger language plpgsql set search_path = '' as $$
begin
  perform pg_notify('preview_shown', new.id::text);
  return null;
end $$;
comment on function preview.announce_shown is 'Wake whoever waits for what is shown.';
create trigger announce_shown after update of status on preview.sessions for each row
  when (old.status -> 'revision' is distinct from new.status -> 'revision'
        or old.status -> 'shown' is distinct from new.status -> 'shown'
        or old.status -> 'errors' is distinct from new.status -> 'errors'
        or old.status -> 'checked' is distinct from new.status -> 'checked')
  execute function preview.announce_shown();

-- The status is the agent's word, and the errors in it the project's: numbers are taken from it and nothing else.
create function preview.tell_shown(session uuid) returns double precision
language plpgsql security invoker set search_path = '' as $$
declare
  one preview.sessions;
  news jsonb;
begin
  select s.* into one from preview.sessions s where s.id = session for update;
  if not found or one.status is null then
    return 0;
  end if;
  news := jsonb_build_object(
    'session_id', one.id,
    'applied', case jsonb_typeof(one.status -> 'revision') when 'number' then one.status -> 'revision' end,
    'shown', case jsonb_typeof(one.status #> '{shown,revision}') when 'number' then one.status #> '{shown,revision}' end,
    'error_count', case jsonb_typeof(one.status -> 'errors') when 'array' then
      (select count(*) from jsonb_array_elements(one.status -> 'errors') e where e ->> 'kind' is distinct from 'console')
      else 0 end);
  if news is not distinct from one.told then
    return 0;
  end if;
  if one.told_at > clock_timestamp() - interval '1 second' then
    return extract(epoch from one.told_at + interval '1 second' - clock_timestamp())::double precision;
  end if;
  update preview.sessions s set told = news, told_at = clock_timestamp() where s.id = session;
  perform preview.publish('preview:' || one.project_id, 'preview:status', news);
  return 0;
end $$;
comment on function preview.tell_shown is 'Tell members what is shown, if it is news; else in how many seconds to ask again, 0 for not at all.';

revoke all on function preview.announce_shown, preview.tell_shown from public;
