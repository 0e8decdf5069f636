-- A product whose projects have no owner: who may do what stands in a table of members, and the product says so itself.
create table public.projects (id uuid primary key, name text);
create table public.members (
  project_id uuid not null references public.projects (id) on delete cascade,
  user_id uuid not null,
  role text not null,
  primary key (project_id, user_id)
);
create table public.user_profiles (handle text primary key, user_id uuid);
create function public.rename_project(project uuid, new_name text) returns text language sql security definer as $$
  update public.projects set name = new_name where id = project returning name
$$;
insert into auth.users (id) values
  ('00000000-0000-4000-8000-000000000001'), ('00000000-0000-4000-8000-000000000002'),
  ('00000000-0000-4000-8000-000000000003');
insert into public.projects (id, name) values ('00000000-0000-4000-8000-0000000000a1', 'theirs');
insert into public.members (project_id, user_id, role) values
  ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000001', 'editor'),
  ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000003', 'guest');
