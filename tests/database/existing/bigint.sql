-- A product whose projects are numbered.
create table public.projects (
  id bigint generated always as identity primary key,
  user_id uuid not null references auth.users (id)
);
create function public.rename_project(project bigint, new_name text) returns text language sql as $$ select new_name $$;
