-- A product whose projects have a `user_id`, with policies, column grants, a trigger, a view and functions of its own; nobody
-- may read `user_id` but through them.
create table public.projects (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references auth.users (id) on delete cascade,
  name text not null,
  slug text unique,
  published boolean not null default false
);
comment on table public.projects is 'The product''s own.';
create index projects_user_id_idx on public.projects (user_id);
create function public.slug_of_a_project() returns trigger language plpgsql as $$
begin
  new.slug := coalesce(new.slug, lower(new.name));
  return new;
end $$;
create trigger slug_of_a_project before insert on public.projects for each row execute function public.slug_of_a_project();
alter table public.projects enable row level security;
create policy "published ones are everybody's to read" on public.projects for select to anon, authenticated using (published or user_id = auth.uid());
create policy "owners change theirs" on public.projects for update to authenticated using (user_id = auth.uid());
revoke all on public.projects from anon, authenticated;
grant select (id, name, slug, published) on public.projects to anon, authenticated;
grant update (name, slug) on public.projects to authenticated;
create view public.published_projects as select id, slug from public.projects where published;
create function public.publish(project uuid) returns boolean language sql security definer set search_path = '' as $$
  update public.projects set published = true where id = project and user_id = auth.uid() returning published
$$;
create function public.rename_project(project uuid, new_name text) returns text language sql as $$
  update public.projects set name = new_name where id = project returning name
$$;
insert into auth.users (id) values
  ('00000000-0000-4000-8000-000000000001'), ('00000000-0000-4000-8000-000000000002');
insert into public.projects (id, user_id, name, published) values
  ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000001', 'theirs', true);
