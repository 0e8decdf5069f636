-- A turn begun while its project is deleted is refused as any write to it is (410). What else it does is as it was.
create or replace function preview.begin_turn(project uuid, label text, lease_seconds integer, limits preview.settings) returns jsonb
language plpgsql set search_path = '' as $$
declare
  head public.project_heads;
  moment timestamptz;
  place uuid;
  open record;
  begun preview.turns;
begin
  if preview.give_head(project) then
    select * into head from public.project_heads h where h.project_id = project for no key update;
  end if;
  if head.project_id is null then  -- also one that was deleted while we waited for it
    perform preview.refuse_project(project);
  end if;
  moment := clock_timestamp();
  if (select count(*) from preview.turns t where t.project_id = project and t.begun_at > moment - interval '1 minute')
     >= limits.turns_per_minute then
    raise exception 'project_uuid %: more than % turns begun in this minute', project, limits.turns_per_minute
      using errcode = 'PT429', detail = '{"retry_after": 60}', hint = 'Put more saves into one turn.';
  end if;
  select count(*) as n, min(t.expires_at) as first into open from preview.turns t where t.project_id = project and t.state = 'open';
  if open.n >= limits.max_open_turns then
    -- A turn that nobody renews gives its place away, the longest unattended first.
    select t.id into place from preview.turns t
    where t.project_id = project and t.state = 'open' and t.expires_at < moment
    order by t.expires_at limit 1 for no key update skip locked;
    if not found then
      raise exception 'project_uuid %: % turns are open, at most % may be', project, open.n, limits.max_open_turns
        using errcode = 'PT429', hint = 'End or abandon one of them, or wait for the lease of one to run out.',
              detail = jsonb_build_object('retry_after', greatest(1, ceil(extract(epoch from open.first - moment))))::text;
    end if;
    perform preview.close_turn(place, 'reaped', moment);
  end if;
  insert into preview.turns (project_id, epoch, label, begun_by, begun_at, lease, expires_at, kept_until)
  values (project, head.epoch, begin_turn.label, (select auth.uid()), moment, make_interval(secs => lease_seconds),
          moment + make_interval(secs => lease_seconds), moment + limits.turn_kept)
  returning * into begun;
  return jsonb_build_object('turn_id', begun.id, 'expires_at', preview.rfc3339(begun.expires_at));
end $$;
