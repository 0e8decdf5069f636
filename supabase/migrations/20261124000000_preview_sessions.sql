-- The control plane's own state: sessions and their machines. The schema `preview` is not exposed through the
-- API; only the orchestrator, which connects as the database's owner, reads and writes it.
create schema if not exists preview;
revoke all on schema preview from public;

create table preview.sessions (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.projects (id) on delete cascade,
  state text not null default 'requested'
    check (state in ('requested', 'provisioning', 'ready', 'draining', 'gone', 'failed')),
  generation integer not null default 1 check (generation > 0),
  -- What the caller sent as Idempotency-Key: the same key is the same session, for ever.
  idempotency_key text unique check (char_length(idempotency_key) between 1 and 255),
  created_at timestamptz not null default now(),
  expires_at timestamptz not null,
  state_since timestamptz not null default now(),
  -- One orchestrator's turn at making or ending the machine; another may take over once it has passed.
  claimed_by text,
  claimed_until timestamptz,
  -- Renewed by the agent's status; the sweeper ends what let it lapse.
  lease_until timestamptz,
  machine_driver text,
  machine_id text,
  machine_region text,
  preview_url text,
  health_url text,
  problem text,
  -- The agent's last status, as it sent it.
  status jsonb,
  status_at timestamptz
);
create index sessions_by_project on preview.sessions (project_id, created_at desc);
create index sessions_not_ended on preview.sessions (state_since) where state not in ('gone', 'failed');
alter table preview.sessions enable row level security;
comment on table preview.sessions is 'One running preview of one project; its life is the table in orchestrator_stub/sessions.py.';
