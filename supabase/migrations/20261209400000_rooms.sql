-- Rooms: several people in one file (docs/rooms.md). One orchestrator has a file's room at a time, by a lease; whoever has a code may
-- come in; and the room's saves are ordinary ones of the member who typed last.
--
-- On a live database: two new tables, a sequence, functions, a trigger on `project_heads` that waits for the writers of it, and
-- policies of one more topic, made under a short exclusive lock on realtime.messages; at most for the lock_timeout.
set local lock_timeout = '2s';

-- ------------------------------------------------------------------------------------------------ who has a room
create sequence preview.room_generations as bigint;
create table preview.rooms (
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  file_path text not null check (octet_length(file_path) <= 1024),
  -- Of a room among all that the file ever had: a browser that outlived one does not take the next for it.
  generation bigint not null,
  server uuid not null,
  address text not null check (octet_length(address) between 1 and 500),
  lease_until timestamptz not null,
  primary key (project_id, file_path)
);
alter table preview.rooms enable row level security;
revoke all on preview.rooms from public, anon, authenticated, service_role;
revoke all on sequence preview.room_generations from public, anon, authenticated, service_role;
comment on table preview.rooms is 'Which orchestrator has the room of which file, and until when unless it says so again.';

create table preview.room_codes (
  digest bytea primary key check (octet_length(digest) = 32),
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  file_path text not null check (octet_length(file_path) <= 1024),
  user_id uuid not null,
  expires_at timestamptz not null
);
create index room_codes_user_idx on preview.room_codes (user_id);
create index room_codes_project_idx on preview.room_codes (project_id);
create index room_codes_expires_at_idx on preview.room_codes (expires_at);
alter table preview.room_codes enable row level security;
revoke all on preview.room_codes from public, anon, authenticated, service_role;
comment on table preview.room_codes is 'The SHA-256 of each code that lets a member into a room; it goes when it is used.';

-- ------------------------------------------------------------------------------------------------ codes
create function preview.give_room_code(p_digest bytea, p_project uuid, p_path text, p_user uuid, p_seconds integer, p_most integer)
returns boolean language plpgsql volatile security invoker set search_path = '' as $$
begin
  delete from preview.room_codes c where c.expires_at < now();
  if (select count(*) from preview.room_codes c where c.user_id = p_user) >= p_most then
    return false;
  end if;
  insert into preview.room_codes (digest, project_id, file_path, user_id, expires_at)
  select p_digest, h.project_id, p_path, p_user, now() + make_interval(secs => p_seconds)
  from public.project_heads h where h.project_id = p_project;
  return found;
end $$;
comment on function preview.give_room_code is 'Keep a code for a while; false: the user has as many as one may, or there is no project.';

-- Whose code it is; nothing: it is none, not for this file, expired, or was used. A code that is tried elsewhere is over, too.
create function preview.take_room_code(p_digest bytea, p_project uuid, p_path text) returns uuid
language sql volatile security invoker set search_path = '' as $$
  with taken as (delete from preview.room_codes c where c.digest = p_digest returning c.*)
  select t.user_id from taken t where t.project_id = p_project and t.file_path = p_path and t.expires_at >= now()
$$;
comment on function preview.take_room_code is 'Use a code up: the user whose it is, if it is good.';

-- ------------------------------------------------------------------------------------------------ the lease
-- The room is the caller's with a new generation, unless somebody else's lease still holds: then theirs is the row.
create function preview.claim_room(p_project uuid, p_path text, p_server uuid, p_address text, p_seconds double precision)
returns preview.rooms language plpgsql volatile security invoker set search_path = '' as $$
declare
  held preview.rooms;
begin
  delete from preview.rooms r where r.project_id = p_project and r.lease_until < now() - interval '1 day' and r.file_path <> p_path;
  insert into preview.rooms as r (project_id, file_path, generation, server, address, lease_until)
  select h.project_id, p_path, nextval('preview.room_generations'), p_server, p_address, now() + make_interval(secs => p_seconds)
  from public.project_heads h where h.project_id = p_project
  on conflict (project_id, file_path) do update
    set generation = excluded.generation, server = excluded.server, address = excluded.address, lease_until = excluded.lease_until
    where r.lease_until < now() or r.server = excluded.server
  returning * into held;
  if not found then
    select * into held from preview.rooms r where r.project_id = p_project and r.file_path = p_path;
  end if;
  return held;
end $$;
comment on function preview.claim_room is 'Take a file''s room if nobody has it; the row says who does.';

-- Who of `p_users` may write to the project, at this moment.
create function preview.room_members(p_project uuid, p_users uuid[]) returns uuid[]
language sql stable security invoker set search_path = '' as $$
  select coalesce(array_agg(u.id order by u.n), '{}') from unnest(p_users) with ordinality u (id, n)
  where coalesce(preview.may_access(p_project, u.id, 'write'), false)
    and not exists (select from preview.deleted_projects d where d.project_id = p_project)
$$;
comment on function preview.room_members is 'Those of the users who may write to the project, in their order.';

-- The leases go on: for each the generation if it is still the caller's.
create function preview.renew_rooms(p_server uuid, p_generations bigint[], p_seconds double precision) returns setof bigint
language sql volatile security invoker set search_path = '' as $$
  update preview.rooms r set lease_until = now() + make_interval(secs => p_seconds)
  where r.server = p_server and r.generation = any (p_generations)
  returning r.generation
$$;
comment on function preview.renew_rooms is 'Prolong the rooms that are still the caller''s, and say which.';

-- ------------------------------------------------------------------------------------------------ saving
-- The room's save: the lease is checked under the head's lock, inside the write's transaction, so an orchestrator that was thought
-- dead and comes back writes nothing. Then the ordinary RPC as the member who typed last and still may; the others of them are the
-- contributors. Answers {fenced}, {nobody} or the RPC's answer. It leaves the transaction with that member's role.
create function preview.save_room(
  p_project uuid, p_path text, p_generation bigint, p_content text, p_version integer, p_typed uuid[], p_correlation_id text
) returns jsonb language plpgsql volatile security invoker set search_path = '' as $$
declare
  typed uuid[];
begin
  perform from public.project_heads h where h.project_id = p_project for no key update;
  perform from preview.rooms r
  where r.project_id = p_project and r.file_path = p_path and r.generation = p_generation for share;
  if not found then
    return '{"fenced": true}';
  end if;
  typed := preview.room_members(p_project, p_typed);
  if cardinality(typed) = 0 then
    return '{"nobody": true}';
  end if;
  perform set_config('preview.origin', 'room', true), set_config('preview.contributors', typed::text, true),
    set_config('request.jwt.claims',
      jsonb_build_object('sub', typed[cardinality(typed)], 'role', 'authenticated')::text, true),
    set_config('role', 'authenticated', true);
  return public.upsert_project_file(p_project, p_path, p_content,
    expected_version => p_version, p_correlation_id => p_correlation_id);
end $$;
comment on function preview.save_room is 'Save a room''s text as who typed last, if the room is still the caller''s.';

-- ------------------------------------------------------------------------------------------------ what others save
create function preview.announce_to_rooms() returns trigger language plpgsql set search_path = '' as $$
begin
  if exists (select from preview.rooms r where r.project_id = new.project_id) then
    perform pg_notify('preview_rooms', new.project_id::text);
  end if;
  return null;
end $$;
comment on function preview.announce_to_rooms is 'Tell the rooms of a project that somebody saved something.';
alter function preview.announce_to_rooms security definer;
create trigger announce_to_rooms after update of revision on public.project_heads for each row
  when (old.revision is distinct from new.revision) execute function preview.announce_to_rooms();

revoke all on function preview.give_room_code, preview.take_room_code, preview.claim_room, preview.room_members,
  preview.renew_rooms, preview.save_room, preview.announce_to_rooms from public, anon, authenticated, service_role;

-- ------------------------------------------------------------------------------------------------ presence
-- Who has which file open is said by the editors themselves, as presence on `open:PROJECT`: a topic of its own, because on the
-- project's and the preview's only the database speaks. Members say and hear it, nobody else does, whatever the product's own
-- policies open; and nothing but presence.
do $$
declare
  theirs constant text := $q$ topic = (select realtime.topic()) and extension = 'presence'
    and not coalesce((select auth.jwt()) ? 'project_id', false)
    and (select preview.allows(
      substring((select realtime.topic()) from '^open:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$')::uuid, 'read')) $q$;
  other constant text := $q$ topic !~ '^open:' and coalesce((select realtime.topic()), '') !~ '^open:' $q$;
begin
  -- In the policy that is there: each one more would be asked beside it for every row.
  execute format('alter policy "members hear their projects" on realtime.messages using ((%s) or (%s))', (
    select pg_get_expr(p.polqual, p.polrelid) from pg_policy p
    where p.polrelid = 'realtime.messages'::regclass and p.polname = 'members hear their projects'), theirs);
  execute format('create policy "members say what they have open" on realtime.messages for insert to authenticated with check (%s)',
    theirs);
  execute format('create policy "who has a file open is for members" on realtime.messages as restrictive for select to public
    using ((%s) or pg_has_role(current_user, ''authenticated'', ''usage''))', other);
  execute format('create policy "who has a file open is said by members" on realtime.messages as restrictive for insert to public
    with check ((%s) or pg_has_role(current_user, ''authenticated'', ''usage''))', other);
  execute format('create policy "members see nobody but theirs" on realtime.messages as restrictive for select to authenticated
    using ((%s) or (%s))', other, theirs);
  execute format('create policy "members say it to nobody but theirs" on realtime.messages as restrictive for insert to authenticated
    with check ((%s) or (%s))', other, theirs);
end $$;
notify pgrst, 'reload schema';
