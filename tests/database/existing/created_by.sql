-- A product that says `created_by`, without row level security, an index on it, or the API's roles: its backend alone reads it.
create table public.projects (
  title text not null,
  created_by uuid references auth.users (id),
  id uuid not null,
  constraint a_project_is_unique unique (id)
);
revoke all on public.projects from anon, authenticated, service_role;
create function public.rename_project(project uuid, new_name text) returns text language sql security definer as $$
  update public.projects set title = new_name where id = project returning title
$$;
insert into auth.users (id) values
  ('00000000-0000-4000-8000-000000000001'), ('00000000-0000-4000-8000-000000000002');
insert into public.projects (title, created_by, id) values
  ('theirs', '00000000-0000-4000-8000-000000000001', '00000000-0000-4000-8000-0000000000a1');
