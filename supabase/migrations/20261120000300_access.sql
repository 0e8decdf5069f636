-- Who may do what. Row level security on every table; only what is granted here is possible.
--
-- A member of a project is its owner or a collaborator. Members read everything of it and write through the RPCs. The
-- service role reads everything and writes files through the same RPCs. A preview container reads one topic.
--
-- On a live database: policies and grants are catalog changes, nothing is scanned or rewritten; on tables that were there
-- before, the lock_timeout makes us the one who gives up.
set local lock_timeout = '2s';

-- As on Supabase, whatever is made in `public` starts out open to all: close it, then name what is meant.
revoke all on public.user_profiles, public.projects, public.project_collaborators, public.project_files,
  public.project_files_current, public.project_heads from public, anon, authenticated, service_role;

grant select, insert (id, display_name), update (display_name) on public.user_profiles to authenticated;
grant select, insert (id, owner_id, name), update (name), delete on public.projects to authenticated;
grant select, insert (project_id, user_id, added_by), delete on public.project_collaborators to authenticated;
grant select on public.project_files, public.project_files_current, public.project_heads to authenticated, service_role;
grant all on public.user_profiles, public.projects, public.project_collaborators to service_role;

alter table public.user_profiles enable row level security;
alter table public.projects enable row level security;
alter table public.project_collaborators enable row level security;
alter table public.project_files enable row level security;
alter table public.project_heads enable row level security;

-- The caller's projects, by two indexes; policies on what belongs to a project ask this once for each statement.
create function preview.owned_projects() returns setof uuid
language sql stable security invoker set search_path = '' as $$
  select p.id from public.projects p where p.owner_id = (select auth.uid())
$$;
create function preview.my_projects() returns setof uuid
language sql stable security invoker set search_path = '' as $$
  select preview.owned_projects()
  union all
  select c.project_id from public.project_collaborators c where c.user_id = (select auth.uid())
$$;
revoke all on function preview.owned_projects, preview.my_projects from public;
grant execute on function preview.owned_projects, preview.my_projects to authenticated;

create policy "a profile is its user's" on public.user_profiles for all to authenticated
  using (id = (select auth.uid())) with check (id = (select auth.uid()));

create policy "members see their projects" on public.projects for select to authenticated
  using (owner_id = (select auth.uid()) or id in (
    select c.project_id from public.project_collaborators c where c.user_id = (select auth.uid())));
create policy "a project is made by its owner" on public.projects for insert to authenticated
  with check (owner_id = (select auth.uid()));
create policy "the owner changes the project" on public.projects for update to authenticated
  using (owner_id = (select auth.uid())) with check (owner_id = (select auth.uid()));
create policy "the owner deletes the project" on public.projects for delete to authenticated
  using (owner_id = (select auth.uid()));

-- `projects` is asked through the function alone: its own policy looks here, and PostgreSQL refuses the circle.
create policy "collaborators see themselves, owners whom they added" on public.project_collaborators for select to authenticated
  using (user_id = (select auth.uid()) or added_by = (select auth.uid()));
create policy "the owner adds collaborators" on public.project_collaborators for insert to authenticated
  with check (added_by = (select auth.uid()) and project_id in (select preview.owned_projects()));
create policy "owners remove collaborators, who may also leave" on public.project_collaborators for delete to authenticated
  using (user_id = (select auth.uid()) or added_by = (select auth.uid()));

create policy "members read files" on public.project_files for select to authenticated
  using (project_id in (select preview.my_projects()));
create policy "members read heads" on public.project_heads for select to authenticated
  using (project_id in (select preview.my_projects()));

-- Where a token for a container must carry the role `authenticated` (a hosted Realtime that knows no other), its claim
-- `project_id` turns it away from everything but its topic. (Not `session_id`: a user's own token has one as well.)
do $$
declare
  guarded text;
begin
  foreach guarded in array array[
    'public.user_profiles', 'public.projects', 'public.project_collaborators', 'public.project_files',
    'public.project_heads', 'storage.objects'
  ] loop
    execute format(
      'create policy "a container''s token reads no table" on %s as restrictive for all to authenticated '
      'using (not coalesce((select auth.jwt()) ? ''project_id'', false))', guarded);
  end loop;
end $$;

-- ------------------------------------------------------------------------------------------------ realtime
do $$
begin
  execute format('grant preview_agent to authenticator');
  if exists (select from pg_roles where rolname = 'supabase_realtime_admin') then
    execute format('grant preview_agent to supabase_realtime_admin');
  end if;
exception when insufficient_privilege then
  raise warning 'preview_agent could not be granted to the API''s roles (%). Use tokens with the role authenticated.', sqlerrm;
end $$;
grant usage on schema realtime to preview_agent;
grant select on realtime.messages to preview_agent;
do $$
begin
  if not has_table_privilege('preview_agent', 'realtime.messages', 'select') then
    raise warning 'preview_agent may not read realtime.messages on this server. Use tokens with the role authenticated.';
  end if;
end $$;

-- Realtime asks with the topic in a setting and a row of that topic; the row is held to it too, lest somebody who could set
-- the one read all the others.
create policy "a container hears its project" on realtime.messages for select to preview_agent
  using (extension = 'broadcast' and topic = (select realtime.topic())
    and (select realtime.topic()) = 'project:' || ((select auth.jwt()) ->> 'project_id'));
create policy "members hear their projects" on realtime.messages for select to authenticated
  using (extension = 'broadcast' and topic = (select realtime.topic()) and case
    when (select auth.jwt()) ? 'project_id'
      then (select realtime.topic()) = 'project:' || ((select auth.jwt()) ->> 'project_id')
    else substring((select realtime.topic()) from '^project:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$')::uuid
      in (select preview.my_projects())
  end);

-- ------------------------------------------------------------------------------------------------ storage
insert into storage.buckets (id, name, public, file_size_limit) values
  ('project-snapshots', 'project-snapshots', false, null),
  ('project-assets', 'project-assets', false, 52428800),  -- 50 MB: Supabase's own default, and the free plan's most
  ('preview-bundles', 'preview-bundles', false, null)
on conflict (id) do nothing;

-- project-assets/{project_id}/{sha256}: an object is its hash, so it is added and read, never changed.
create policy "members read assets" on storage.objects for select to authenticated
  using (bucket_id = 'project-assets' and (storage.foldername(name))[1] in (select m::text from preview.my_projects() m));
create policy "members add assets" on storage.objects for insert to authenticated
  with check (bucket_id = 'project-assets' and (storage.foldername(name))[1] in (select m::text from preview.my_projects() m)
    and name ~ '^[^/]+/[0-9a-f]{64}$');
