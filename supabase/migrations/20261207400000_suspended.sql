-- Sleep and wake: a session whose machine is suspended, and what decides about it.
--
-- On a live database: columns are added as null, which rewrites nothing; the new check is one reading of preview.sessions. Orchestrators
-- of the release before do not know the state, so nobody may be put to sleep before the last of them is replaced.
set local lock_timeout = '2s';

alter table preview.sessions
  drop constraint sessions_state_check,
  add constraint sessions_state_check
    check (state in ('requested', 'provisioning', 'ready', 'suspended', 'draining', 'gone', 'failed')),
  -- When somebody last had the preview open, as far as the agent or a door knows.
  add column viewed_at timestamptz,
  -- When its machine was woken, until its agent says that it serves what the database has.
  add column woken_at timestamptz;
comment on column preview.sessions.woken_at is 'Its machine was woken then and has not yet said that all is right; null: it is not waking.';
