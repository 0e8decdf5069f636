-- What was built and signed, for the next session that wants the same: without it every orchestrator, and every
-- restart of one, builds the archive of every project anew. A cache: it may be emptied at any time.
create table preview.snapshot_offers (
  project_id uuid not null references public.projects (id) on delete cascade,
  -- Epoch, revision and base of the archive, as the orchestrator writes them.
  stamp text not null,
  kept jsonb not null,
  kept_until timestamptz not null,
  primary key (project_id, stamp)
);
create index snapshot_offers_kept_until on preview.snapshot_offers (kept_until);
alter table preview.snapshot_offers enable row level security;
comment on table preview.snapshot_offers is 'Signed URLs and manifests of built snapshots; in Redis instead where the orchestrator has one.';
