-- A person can go: what they wrote in projects of others stays there, as its owner's. Where a version's author must be somebody
-- (`user_profiles`), an account that had written into another's project could not be deleted at all.
--
-- On a live database: one new function.
set local lock_timeout = '2s';

-- One project and at most `p_most` of its versions a call, under the head's lock as whoever writes: to be called until it says 0.
-- Then the account can be deleted, and their own projects go with it.
create function public.forget_author(p_user uuid, p_most integer default 1000) returns integer
language plpgsql security definer set search_path = '' as $$
declare
  project uuid;
  heir uuid;
  changed integer;
begin
  if p_user is null then
    raise exception 'p_user must not be null' using errcode = 'PT400';
  elsif p_most is null or p_most < 1 then
    raise exception 'p_most must be 1 or more' using errcode = 'PT400';
  end if;
  for project in
    select w.project_id from (
      select distinct f.project_id from public.project_files f where f.created_by = p_user or f.last_modified_by = p_user offset 0
    ) w
    where preview.owner_of(w.project_id) is distinct from p_user
  loop
    perform from public.project_heads h where h.project_id = project for no key update;
    continue when not found;  -- deleted at this moment
    heir := preview.owner_of(project);
    update public.project_files f
    set created_by = case when f.created_by = p_user then heir else f.created_by end,
        last_modified_by = case when f.last_modified_by = p_user then heir else f.last_modified_by end
    where f.id in (
      select theirs.id from public.project_files theirs
      where theirs.project_id = project and (theirs.created_by = p_user or theirs.last_modified_by = p_user) limit p_most);
    get diagnostics changed = row_count;
    return changed;
  end loop;
  update preview.turns t set begun_by = null where t.begun_by = p_user;
  return 0;
end $$;
comment on function public.forget_author is
  'What a person wrote in projects of others becomes the owners'': call it until it returns 0, then delete the account.';

revoke all on function public.forget_author from public, anon, authenticated, service_role;
grant execute on function public.forget_author to service_role;
notify pgrst, 'reload schema';
