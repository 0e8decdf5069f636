-- Members hear that something waits for a decision: `write_back:kept { proposals, conflicts }` on `preview:{project}`, the numbers of
-- what is open, when write-back kept something and when somebody decided. Once a transaction, at its end, whatever an offer has in it.
--
-- On a live database: a trigger on preview.kept_changes is made, which waits for its writers, at most for the lock_timeout.
set local lock_timeout = '2s';

create function preview.tell_kept() returns trigger
language plpgsql security definer set search_path = '' as $$
declare
  told constant text := pg_current_xact_id() || ' ' || new.project_id;
begin
  if current_setting('preview.kept_told', true) is distinct from told then
    perform set_config('preview.kept_told', told, true);
    perform preview.publish('preview:' || new.project_id, 'write_back:kept', (
      select jsonb_build_object('proposals', count(*) filter (where k.kind = 'proposal'),
                                'conflicts', count(*) filter (where k.kind = 'conflict'))
      from preview.kept_changes k where k.project_id = new.project_id and k.state = 'open'));
  end if;
  return null;
end $$;
comment on function preview.tell_kept is 'Tell members how many proposals and conflicts of their project are open.';

-- Deferred: an offer of fifty files is fifty rows, and what is told is told of all of them.
create constraint trigger tell_kept after insert or update of state on preview.kept_changes
  deferrable initially deferred for each row execute function preview.tell_kept();

revoke all on function preview.tell_kept from public, anon, authenticated, service_role;
