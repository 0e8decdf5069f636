-- The door: the host name under which a browser reaches a project's preview, and a version that takes access back.
--
-- On a live database: one new table; a column with a constant default, which rewrites nothing; two triggers, which wait for
-- the writers of their tables, at most for the lock_timeout.
set local lock_timeout = '2s';

create table preview.doors (
  project_id uuid primary key references public.project_heads (project_id) on delete cascade,
  -- 96 random bits: who has not been given it does not guess it. It stays the project's, so that what browsers keep for it, and
  -- what is registered for OAuth, outlives sessions.
  label text not null unique check (label ~ '^p[0-9a-f]{24}$')
);
alter table preview.doors enable row level security;
revoke all on preview.doors from public, anon, authenticated, service_role;
comment on table preview.doors is 'The first label of the host name of a project''s preview; made when it is first asked for.';

alter table preview.sessions add column door_version integer not null default 0;
comment on column preview.sessions.door_version is 'Codes and cookies of the door carry it; when it grows, those of before are over.';

create function preview.door_label(project uuid) returns text
language sql volatile security invoker set search_path = '' as $$
  with made as (
    insert into preview.doors (project_id, label)
    -- A random UUID without the digits that say that it is one.
    select project, 'p' || substr(h, 1, 12) || substr(h, 21, 12)
    from (select replace(gen_random_uuid()::text, '-', '') as h) one
    where not exists (select from preview.doors d where d.project_id = project)
    -- Two that ask at once get the label of one of them.
    on conflict (project_id) do update set label = preview.doors.label
    returning label)
  select label from made union all select d.label from preview.doors d where d.project_id = project limit 1
$$;
comment on function preview.door_label is 'The label of a project''s preview, made if it has none. The project must have a head.';

-- One row for each label and each of its project's sessions that are not over, newest first; a label that is nobody's has none.
create function preview.door_standing(labels text[]) returns table (
  label text, project_id uuid, session_id uuid, state text, preview_url text, machine_driver text, machine_id text,
  door_version integer, expires_at double precision, run jsonb)
language sql stable security invoker set search_path = '' as $$
  select d.label, d.project_id, s.id, s.state, s.preview_url, s.machine_driver, s.machine_id, s.door_version,
    extract(epoch from s.expires_at)::double precision,
    coalesce(r.plain, '{}') || coalesce(s.run -> 'plain', '{}')
  from preview.doors d
  left join preview.sessions s on s.project_id = d.project_id and s.state not in ('gone', 'failed')
  left join preview.run_settings r on r.project_id = d.project_id
  where d.label = any (labels)
  order by d.label, s.created_at desc, s.id
$$;
comment on function preview.door_standing is 'What the door goes by: which sessions stand behind each label.';

create function preview.announce_door() returns trigger language plpgsql set search_path = '' as $$
begin
  perform pg_notify('preview_door', new.project_id::text);
  return null;
end $$;
comment on function preview.announce_door is 'Wake the doors: who may see what, or where it is, has changed.';
create trigger announce_door_insert after insert on preview.sessions for each row execute function preview.announce_door();
create trigger announce_door after update of state, preview_url, door_version, expires_at on preview.sessions for each row
  when ((old.state, old.preview_url, old.door_version, old.expires_at)
        is distinct from (new.state, new.preview_url, new.door_version, new.expires_at))
  execute function preview.announce_door();
create trigger announce_door after update of plain on preview.run_settings for each row
  when (old.plain is distinct from new.plain)
  execute function preview.announce_door();

revoke all on function preview.door_label, preview.door_standing, preview.announce_door from public;
