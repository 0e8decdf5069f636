-- A door that runs by itself cannot wake a machine: it notes that somebody wants to see the session, and the next sweep of an
-- orchestrator wakes it.
--
-- On a live database: a column is added as null, which rewrites nothing.
set local lock_timeout = '2s';

alter table preview.sessions add column wake_wanted_at timestamptz;
comment on column preview.sessions.wake_wanted_at is 'When a door last had somebody who wanted to see the sleeping session.';
