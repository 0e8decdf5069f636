-- The outbox: where `preview.settings.transport` says so, a project's events also leave, or leave instead, through a table that the
-- relay (`preview-orchestrator relay`) empties into NATS. A row is written in the transaction of its save, so it is there exactly when
-- the save is; nothing is announced, because NOTIFY would have every commit of the database wait for every other.
--
-- On a live database: one column is added to a small table of ours without rewriting it, one function is replaced, and nothing
-- changes until somebody sets the transport.
set local lock_timeout = '2s';

alter table preview.settings
  -- Which way a project's events take to its agents; `both` while agents move from the one to the other.
  add column transport text not null default 'realtime' check (transport in ('realtime', 'nats', 'both'));

create table preview.outbox (
  -- Given under the lock of the project's head: within a project their order is that of the revisions.
  id bigint generated always as identity primary key,
  project_id uuid not null,
  -- The share of the relay that owns it: the last hex digit of the project's id.
  bucket smallint generated always as (get_byte(uuid_send(project_id), 15) & 15) stored,
  event text not null,
  -- What makes a second delivery of the same event none.
  message_id text not null,
  payload text not null,
  created_at timestamptz not null default clock_timestamp()
) with (
  -- It is emptied as fast as it fills: what is dead must go before it is more than what lives.
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0,
  autovacuum_vacuum_insert_threshold = -1, autovacuum_analyze_threshold = 1000000
);
alter table preview.outbox enable row level security;
comment on table preview.outbox is 'Events on their way to NATS: the relay deletes each once NATS has stored it.';

-- What is for members goes to browsers, which Realtime serves; only what is for agents has two ways.
create or replace function preview.publish(topic text, event text, payload jsonb) returns void
language plpgsql security invoker set search_path = '' as $$
declare
  way text;
  project text;
begin
  if topic like 'project:%' then
    select s.transport into way from preview.settings s;
  end if;
  if way is distinct from 'nats' then
    perform realtime.send(payload, event, topic, true);
  end if;
  if way in ('nats', 'both') then
    project := substr(topic, 9);
    insert into preview.outbox (project_id, event, message_id, payload) values (
      project::uuid, event,
      project || ':' || coalesce((payload ->> 'epoch') || ':' || (payload ->> 'revision'), gen_random_uuid()::text), payload::text);
  end if;
end $$;

revoke all on preview.outbox from public;
revoke all on function preview.publish from public;
