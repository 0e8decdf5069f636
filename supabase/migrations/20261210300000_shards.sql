-- Which database a project is on, where there are several: its id says so (docs/scale). An id whose third group begins with 8, the
-- version that RFC 9562 leaves to whoever makes ids, ends with the database's number in two hexadecimal digits. Every other id is on the
-- first, number 0: so all that was there before a second one came stays where it is.
create function preview.shard_of(id uuid) returns int language sql immutable strict parallel safe set search_path = ''
  as $$ select case when substr(id::text, 15, 1) = '8' then get_byte(uuid_send(id), 15) else 0 end $$;
comment on function preview.shard_of is 'The number of the database that a project''s or a session''s id is on.';

create function preview.id_of_shard(shard int) returns uuid language plpgsql volatile strict parallel safe set search_path = '' as $$
begin
  if shard not between 0 and 255 then
    raise exception 'a database has a number from 0 to 255, not %', shard using errcode = 'numeric_value_out_of_range';
  end if;
  return overlay(overlay(gen_random_uuid()::text placing '8' from 15) placing lpad(to_hex(shard), 2, '0') from 35)::uuid;
end $$;
comment on function preview.id_of_shard is 'A new random id on the database of that number, 0 to 255.';

-- A session's id says the same as its project's, so that whoever has only the session finds the database.
create function preview.mark_session() returns trigger language plpgsql set search_path = '' as $$
begin
  new.id := preview.id_of_shard(preview.shard_of(new.project_id));
  return new;
end $$;
comment on function preview.mark_session is 'Give a new session an id on its project''s database.';
create trigger mark_session before insert on preview.sessions for each row
  when (substr(new.project_id::text, 15, 1) = '8') execute function preview.mark_session();

-- For a product's own table: its default, and a check that no project is made on the wrong database.
revoke all on function preview.shard_of, preview.id_of_shard, preview.mark_session from public, anon, authenticated, service_role;
grant execute on function preview.shard_of, preview.id_of_shard to authenticated, service_role;
