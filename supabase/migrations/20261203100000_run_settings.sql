-- Run settings: what a product knows of a project and a machine cannot guess (which directory to preview, by which command, with
-- which variables). Of the project, and of one session, whose own win.
--
-- On a live database: one new table, and a column that is null in every row there is, so nothing is rewritten.
set local lock_timeout = '2s';

-- Only the orchestrator, which connects as the database's owner, reads and writes it; who may ask for that is its API's to decide.
create table preview.run_settings (
  project_id uuid primary key references public.project_heads (project_id) on delete cascade,
  -- Grows with each change: the answer to a heartbeat names it, so that an agent knows when to ask.
  revision bigint not null default 0 check (revision >= 0),
  -- What is no secret, by name.
  plain jsonb not null default '{}' check (jsonb_typeof(plain) = 'object'),
  -- `env:NAME` and `npmrc`, each encrypted for itself with the project and the name: the database has no key to them.
  sealed jsonb not null default '{}' check (jsonb_typeof(sealed) = 'object'),
  updated_at timestamptz not null default now()
);
alter table preview.run_settings enable row level security;
revoke all on preview.run_settings from public, anon, authenticated, service_role;
comment on table preview.run_settings is 'What starts a project''s preview, and its secrets, encrypted; written through the session API.';

alter table preview.sessions
  add column run jsonb check (jsonb_typeof(run) = 'object');
comment on column preview.sessions.run is 'The session''s own run settings, in the form {plain, sealed}; null: it has none.';
