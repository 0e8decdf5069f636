-- Updates: which image machines are made of. All orchestrators read it here, so a rollout is one change of one row, and
-- whoever makes a session's machine writes down which image it was.
--
-- On a live database: columns of preview.sessions are added as null or with a constant, which rewrites nothing; the alteration
-- waits for its writers, at most for the lock_timeout.
set local lock_timeout = '2s';

create table preview.rollout (
  one boolean primary key default true check (one),
  image text not null check (char_length(image) between 1 and 512),
  -- What sessions outside the share get, and all when it stops. Null: what each orchestrator's AGENT_IMAGE says.
  former text check (char_length(former) between 1 and 512),
  share double precision not null check (share > 0 and share <= 1),
  -- trying: a session of its own shows whether the image works. rolling: new sessions get it, and running ones as they are idle.
  -- stopped: it did not work, and nobody is given it. done: all of the share have it.
  state text not null check (state in ('trying', 'rolling', 'stopped', 'done')),
  trial uuid,
  problem text,
  started_at timestamptz not null default clock_timestamp()
);
alter table preview.rollout enable row level security;
comment on table preview.rollout is 'The image that machines are made of, and how far its rollout is; at most one row.';
revoke all on preview.rollout from public, anon, authenticated, service_role;

alter table preview.sessions
  add column image text,
  -- What it is given again when `image` does not become ready; null: `image` did, or there is nothing to go back to.
  add column image_before text,
  -- What it gets as soon as an orchestrator comes by: the next generation of its machine.
  add column image_next text,
  -- An image that did not become ready.
  add column image_failed text,
  -- When a rollout replaced the machine that is now becoming ready.
  add column rolled_at timestamptz,
  -- Made by a rollout to try an image on a project; it is nobody's.
  add column trial boolean not null default false;
comment on column preview.sessions.image is 'What its machine is made of; null: none was made, or by an orchestrator from before.';

-- The same session is in every larger share, so raising it moves nobody back. A uuid's first 32 bits are random.
create function preview.in_share(session uuid, share double precision) returns boolean
language sql immutable security invoker set search_path = '' as $$
  select ('x' || left(session::text, 8))::bit(32)::bigint / 4294967296.0 < share
$$;
comment on function preview.in_share is 'Whether a session is among the share that is updated.';

create function preview.choose_image(session uuid, standard text) returns text
language sql volatile security invoker set search_path = '' as $$
  update preview.sessions s set
    image = coalesce(s.image, case when c.new then r.image else coalesce(r.former, standard) end),
    image_before = case when s.image is null and c.new and r.state = 'rolling'
      then nullif(coalesce(r.former, standard), r.image) else s.image_before end
  from (select) always left join preview.rollout r on true,
    lateral (select coalesce(r.state in ('rolling', 'done') and preview.in_share(session, r.share), false) as new) c
  where s.id = session
  returning s.image
$$;
comment on function preview.choose_image is 'What a session''s machine is made of: chosen once a generation, and written down.';

create function preview.stop_rollout(what text, why text) returns void
language sql volatile security invoker set search_path = '' as $$
  update preview.rollout r set state = 'stopped', problem = left(why, 1000) where r.image = what and r.state <> 'stopped';
  update preview.sessions s set image_next = null where s.image_next = what;
$$;
comment on function preview.stop_rollout is 'Give nobody this image any more, and say why.';

create function preview.agent_said(one preview.sessions) returns text
language sql stable security invoker set search_path = '' as $$
  select case when one.status_at >= one.state_since then
    '; its agent says ' || coalesce(one.status ->> 'state', 'nothing')
    || coalesce(': ' || (select string_agg(coalesce(p ->> 'detail', p ->> 'kind'), '; ') from jsonb_array_elements(
      case jsonb_typeof(one.status -> 'problems') when 'array' then one.status -> 'problems' else '[]' end) p), '')
    else '; its agent has said nothing' end
$$;
comment on function preview.agent_said is 'What the machine said of itself while it was to become ready.';

-- One that ran on another image before shows at once that this image is at fault. A new one may never have been able to
-- become ready: three of them, and more than there are ready ones, stop it.
create function preview.fall_back(session uuid, why text) returns boolean
language plpgsql volatile security invoker set search_path = '' as $$
declare
  was preview.sessions;
begin
  select s.* into was from preview.sessions s
    where s.id = session and s.image_before is not null and s.state in ('requested', 'provisioning') and s.expires_at > now()
    for update;
  if not found then
    return false;
  end if;
  update preview.sessions s set
    image = s.image_before, image_before = null, image_failed = s.image, image_next = null, rolled_at = null,
    generation = s.generation + 1, state = 'provisioning', state_since = now(), claimed_until = null, lease_until = null,
    machine_id = null, machine_driver = null, machine_region = null, preview_url = null, health_url = null, problem = null
    where s.id = session;
  if was.rolled_at is not null or (
    select count(*) filter (where s.image_failed = was.image) >= 3
       and count(*) filter (where s.image_failed = was.image) > count(*) filter (where s.image = was.image and s.state = 'ready')
    from preview.sessions s, preview.rollout r where s.state_since >= r.started_at
  ) then
    perform preview.stop_rollout(was.image, format('session %s of project %s: %s%s', session, was.project_id, why, preview.agent_said(was)));
  end if;
  return true;
end $$;
comment on function preview.fall_back is 'Give a session whose new image did not become ready the former one; whether it had one.';

revoke all on function preview.in_share, preview.choose_image, preview.stop_rollout, preview.agent_said, preview.fall_back from public;
