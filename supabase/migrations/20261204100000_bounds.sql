-- Bounds on what a session may cost, and the moment at which an archive was begun.
--
-- On a live database: columns of small tables of ours, added without rewriting them.
set local lock_timeout = '2s';

alter table preview.sessions
  -- The user who asked for it, as their token named them, while it is not over: users have a bounded number of sessions at a time.
  -- Null: the service asked.
  add column requested_by text,
  -- Bytes of archives stored at its request, as of `stored_at`; they are forgiven at a steady rate (`snapshots/allowance.py`).
  add column stored_bytes double precision not null default 0,
  add column stored_at timestamptz not null default now();
create index sessions_of_a_user on preview.sessions (requested_by) where requested_by is not null;

-- When an orchestrator took the request. One that waited long is not, by that, one whose orchestrator was killed.
alter table public.project_snapshots add column taken_at timestamptz;
