-- Content that readers cannot be given: its object in Storage is gone, or holds other bytes than its hash says, or an archive with it
-- is larger than Storage takes. The file is then left out of snapshots and answers and named there, so that the project opens with everything else.
--
-- On a live database: one new table; nothing that exists is changed.
set local lock_timeout = '2s';

-- Whoever builds an archive finds out by reading; the next one need not read it all again to know. Forgotten once it was read well.
create table preview.unavailable_content (
  project_id uuid not null references public.project_heads (project_id) on delete cascade,
  content_hash text not null,
  reason text not null check (reason in ('lost', 'wrong_bytes', 'no_room')),
  found_at timestamptz not null default now(),
  primary key (project_id, content_hash)
);
alter table preview.unavailable_content enable row level security;
revoke all on preview.unavailable_content from public, anon, authenticated, service_role;
comment on table preview.unavailable_content is 'Hashes whose object in project-assets is gone, holds other bytes or has no room in an archive, as the orchestrator found it.';

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
comment on function preview.unavailable is 'Why a current file is left out of what readers get: too_deep, lost, wrong_bytes, no_room; null when it is not.';

-- What is written in one statement has to be done within the 8 seconds that hosted PostgREST gives a member's. 60 MB took 8 to 11 on two
-- cores; whoever set another limit keeps it.
alter table preview.settings alter column max_bulk_bytes set default 33554432;
update preview.settings set max_bulk_bytes = 33554432 where max_bulk_bytes = 67108864;

-- Every limit of what is written, in one place to read: those that are set, and those that are rules.
create view preview.limits with (security_invoker = true) as
  select v.name, v.value from preview.settings s, lateral (values
    ('path.bytes', 1024::bigint), ('path.segment_bytes', 255), ('path.segments', 64),
    ('file.bytes', s.max_file_bytes), ('bulk.files', s.max_bulk_files), ('bulk.bytes', s.max_bulk_bytes),
    ('asset.bytes', (select b.file_size_limit from storage.buckets b where b.id = 'project-assets'))
  ) as v (name, value);
revoke all on preview.limits from public, anon, authenticated, service_role;
comment on view preview.limits is 'What a project may hold, in bytes and numbers: what the database refuses, and so what every reader has to take.';
