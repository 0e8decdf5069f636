-- A product as the design document found it: profiles, and projects that name their owner `owner_id`.
create table public.user_profiles (
  id uuid primary key references auth.users (id) on delete cascade,
  full_name text,
  created_at timestamptz not null default now()
);
create table public.projects (
  id uuid primary key default gen_random_uuid(),
  owner_id uuid not null references public.user_profiles (id) on delete cascade,
  name text not null,
  created_at timestamptz not null default now()
);
create index projects_of_their_owners on public.projects (owner_id);
alter table public.user_profiles enable row level security;
alter table public.projects enable row level security;
create policy "own profile" on public.user_profiles for select to authenticated using (id = auth.uid());
create policy "own projects" on public.projects for all to authenticated using (owner_id = auth.uid()) with check (owner_id = auth.uid());
create function public.rename_project(project uuid, new_name text) returns text language sql as $$
  update public.projects set name = new_name where id = project and owner_id = auth.uid() returning name
$$;
insert into auth.users (id) values
  ('00000000-0000-4000-8000-000000000001'), ('00000000-0000-4000-8000-000000000002');
insert into public.user_profiles (id) select id from auth.users;
insert into public.projects (id, owner_id, name) values
  ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000001', 'theirs');
