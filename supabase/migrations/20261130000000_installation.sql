-- Which installation this is: all the orchestrators on this database. Every machine they make carries the id in its name, and
-- they touch no machine that carries another, so that two databases (production's and staging's, say) may share a Fly app or
-- a container engine. Takes no lock on a table that was there before.

create table preview.installation (
  only_row boolean primary key default true check (only_row),
  id uuid not null default gen_random_uuid(),
  -- Machines of sessions from before do not carry the id.
  since timestamptz not null default now()
);
alter table preview.installation enable row level security;
insert into preview.installation default values;
comment on table preview.installation is 'One row. A copy of a database is another installation: give it an id of its own before an orchestrator runs on it.';
