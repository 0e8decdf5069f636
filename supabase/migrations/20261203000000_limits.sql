-- Content that readers cannot be given: its object in Storage is gone, or holds other bytes than its hash says. The file is then left
-- out of snapshots and answers and named there, so that the project opens with everything else.
--
-- On a live database: one new table; nothing that exists is changed.
set local lock_timeout = '2s';

-- Whoever builds an archive finds out by reading; the next one need not read it all again to know. Forgotten once it was read well.
create table preview.unavailable_content (
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  content_hash text not null,
  reason text not null check (reason in ('lost', 'wrong_bytes')),
  found_at timestamptz not null default now(),
  primary key (project_id, content_hash)
);
alter table preview.unavailable_content enable row level security;
revoke all on preview.unavailable_content from public, anon, authenticated, service_role;
comment on table preview.unavailable_content is 'Hashes whose object in project-assets is gone or holds other bytes, as the orchestrator found it.';

-- Why a current file cannot be given to readers; null: it can. A path deeper than 64 segments is from before that was refused.
create function preview.unavailable(project uuid, path text, hash text, is_binary boolean) returns text
language sql stable set search_path = '' as $$
  select case
    when octet_length(path) - octet_length(replace(path, '/', '')) >= 64 then 'too_deep'
    when not is_binary then null
    when not exists (select from storage.objects o
                     where o.bucket_id = 'project-assets' and o.name = project || '/' || hash) then 'lost'
    else (select u.reason from preview.unavailable_content u where u.project_id = project and u.content_hash = hash)
  end
$$;
revoke all on function preview.unavailable from public;
comment on function preview.unavailable is 'Why a current file is left out of what readers get: too_deep, lost, wrong_bytes; null when it is not.';
