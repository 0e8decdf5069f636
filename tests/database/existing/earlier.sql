-- A product (`user_id.sql`, say) as an unreleased earlier version of ours left it: its column renamed, its grants taken away, a
-- trigger and policies on its tables, and the files in a table that has the name of ours.
create schema preview;
create table public.projects (
  id uuid primary key default gen_random_uuid(),
  owner_id uuid not null,
  name text not null,
  published boolean not null default false,
  constraint projects_owner_id_fkey foreign key (owner_id) references auth.users (id) on delete cascade
);
create index projects_owner_id_idx on public.projects (owner_id);
create table public.user_profiles (id uuid primary key references auth.users (id) on delete cascade, display_name text);
create table public.project_collaborators (project_id uuid, user_id uuid);
create index project_collaborators_user_id_idx on public.project_collaborators (user_id);
create table public.project_heads (project_id uuid primary key references public.projects (id), revision bigint not null);
create table public.project_files (
  id uuid primary key,
  project_id uuid not null references public.projects (id) on delete cascade,
  file_path text not null,
  content text,
  version integer not null,
  is_current_version boolean not null,
  revision bigint not null,
  is_deleted boolean not null,
  created_by uuid not null references public.user_profiles (id),
  created_at timestamptz not null default now()
);
create index project_files_project_id_idx on public.project_files (project_id);
create view public.project_files_current as select * from public.project_files where is_current_version and not is_deleted;
create function public.list_current_files(project_uuid uuid) returns setof text language sql as $$
  select file_path from public.project_files_current where project_id = project_uuid
$$;
create function preview.give_head() returns trigger language plpgsql as $$ begin return null; end $$;
create trigger give_head after insert on public.projects for each row execute function preview.give_head();
revoke all on public.projects, public.user_profiles from anon, authenticated;
grant select, insert (id, owner_id, name), update (name), delete on public.projects to authenticated;
grant select, insert (id, display_name), update (display_name) on public.user_profiles to authenticated;
alter table public.projects enable row level security;
create policy "the owner changes the project" on public.projects for update to authenticated using (owner_id = auth.uid());
create policy "members read assets" on storage.objects for select to authenticated using (bucket_id = 'project-assets');
create function public.rename_project(project uuid, new_name text) returns text language sql as $$
  update public.projects set name = new_name where id = project returning name
$$;
insert into auth.users (id) values ('00000000-0000-4000-8000-000000000001');
insert into public.user_profiles (id) select id from auth.users;
insert into public.projects (id, owner_id, name) values
  ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000001', 'theirs');
insert into public.project_files (id, project_id, file_path, content, version, is_current_version, revision, is_deleted, created_by)
select f.id::uuid, '00000000-0000-4000-8000-0000000000a1', f.path, f.content, f.version, f.is_current, f.revision, f.content is null,
       '00000000-0000-4000-8000-000000000001'
from (values
  ('00000000-0000-4000-8000-0000000000f1', 'src/a.ts', 'one', 1, false, 1),
  ('00000000-0000-4000-8000-0000000000f2', 'src/a.ts', 'two', 2, true, 3),
  ('00000000-0000-4000-8000-0000000000f3', 'b', 'B', 1, false, 2),
  ('00000000-0000-4000-8000-0000000000f4', 'b', null, 2, true, 4)) f(id, path, content, version, is_current, revision);
create schema if not exists supabase_migrations;
create table supabase_migrations.schema_migrations (version text not null primary key, statements text[], name text);
insert into supabase_migrations.schema_migrations (version, name) values
  ('20260101000000', 'the_products_own'), ('20261120000000', 'project_files'), ('20261120000100', 'writing');
