-- The topics `project:…` and `preview:…` are the database's alone, whatever else the product's policies allow: what is said there
-- becomes files in previews, and what is heard there is a project's contents. Policies of the product's own are permissive, so each
-- of them opens what it matches; these are restrictive, and hold beside any number of them. Other topics are as they were.
--
-- On a live database: a policy is made under a short exclusive lock on realtime.messages; at most for the lock_timeout.
set local lock_timeout = '2s';

do $$
declare
  other constant text := $q$ topic !~ '^(project|preview):' and coalesce((select realtime.topic()), '') !~ '^(project|preview):' $q$;
begin
  execute format('create policy "only the database speaks on a project''s topics" on realtime.messages as restrictive
    for insert to public with check (%s)', other);
  execute format('create policy "what was said on a project''s topics is not changed" on realtime.messages as restrictive
    for update to public using (%s) with check (%1$s)', other);
  execute format('create policy "what was said on a project''s topics is not removed" on realtime.messages as restrictive
    for delete to public using (%s)', other);

  -- Who hears: those who did, by the same rules. A role of the product's own that is neither does not.
  execute format('create policy "a project''s topics are for members and containers" on realtime.messages as restrictive
    for select to public using ((%s) or pg_has_role(current_user, ''authenticated'', ''usage'')
      or pg_has_role(current_user, ''preview_agent'', ''usage''))', other);
  execute format('create policy "a container hears no project but its own" on realtime.messages as restrictive
    for select to preview_agent using ((%s) or (topic = (select realtime.topic())
      and topic = ''project:'' || ((select auth.jwt()) ->> ''project_id'')))', other);
  execute format('create policy "members hear no projects but theirs" on realtime.messages as restrictive
    for select to authenticated using ((%s) or (topic = (select realtime.topic()) and case
      when (select auth.jwt()) ? ''project_id'' then topic = ''project:'' || ((select auth.jwt()) ->> ''project_id'')
      else (select preview.allows(
        substring((select realtime.topic()) from ''^(?:project|preview):([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})$'')::uuid, ''read''))
    end))', other);
end $$;
