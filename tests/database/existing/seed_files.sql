-- A product with the design document's own table of files, and what such a table comes to hold.
create table public.user_profiles (id uuid primary key references auth.users (id) on delete cascade);
create table public.projects (id uuid primary key default gen_random_uuid(),
  owner_id uuid not null references public.user_profiles (id) on delete cascade, name text);
create table public.project_files (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.projects (id) on delete cascade,
  file_path text not null,
  file_type text not null,
  content text,
  content_hash text,
  version integer not null default 1,
  parent_version_id uuid references public.project_files (id),
  is_current_version boolean not null default true,
  created_by uuid not null references public.user_profiles (id),
  last_modified_by uuid references public.user_profiles (id),
  created_at timestamptz default now(),
  updated_at timestamptz default now(),
  unique (project_id, file_path, version)
);
create index project_files_project_id_idx on public.project_files (project_id);
create view public.project_files_now as select * from public.project_files where is_current_version = true;
insert into auth.users (id) values ('00000000-0000-4000-8000-000000000001'), ('00000000-0000-4000-8000-000000000002');
insert into public.user_profiles (id) select id from auth.users;
insert into public.projects (id, owner_id) values
  ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000001');
insert into storage.buckets (id, name) values ('project-assets', 'project-assets');
insert into storage.objects (bucket_id, name, metadata) values
  ('project-assets', '00000000-0000-4000-8000-0000000000a1/' || repeat('a', 64), '{"size": 7}');
insert into public.project_files (id, project_id, file_path, file_type, content, content_hash, version, is_current_version,
                                  created_by, last_modified_by, created_at)
select ('00000000-0000-4000-8000-0000000000' || id)::uuid, '00000000-0000-4000-8000-0000000000a1', path, kind, content, hash,
       version, is_current, ('00000000-0000-4000-8000-00000000000' || author)::uuid,
       '00000000-0000-4000-8000-000000000001', '2026-01-01'::timestamptz + minute * interval '1 minute'
from (values
  ('b1', 'src/a.ts', 'typescript', 'one', null, 1, false, 1, 1),
  ('b2', 'src/a.ts', 'typescript', 'two', repeat('0', 64), 2, true, 2, 3),
  ('b3', 'gone', 'text', 'was', null, 1, false, 1, 2),
  ('b4', 'gone', 'text', null, null, 2, true, 1, 4),
  ('b5', 'unmarked', 'text', 'was', null, 3, false, 1, 5),
  ('b6', 'rolled/back', 'text', 'good', null, 1, true, 1, 6),
  ('b7', 'rolled/back', 'text', 'bad', null, 2, false, 1, 7),
  ('b8', 'logo.png', 'image', null, repeat('a', 64), 1, true, 1, 8),
  ('b9', 'lost.png', 'image', null, repeat('b', 64), 1, true, 1, 9)
) f(id, path, kind, content, hash, version, is_current, author, minute);
