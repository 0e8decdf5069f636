-- A project is as large as its readers take, and no larger: files, bytes and the bytes of all paths are counted with each commit,
-- and the commit that would pass a limit is refused. Before, the 50,001st file was saved, and no machine could open the project.
--
-- On a live database: a new table, and three columns of the one row of settings. A project from before is counted by its own next save;
-- one that is too large already can still delete, and save whatever makes it no larger.
set local lock_timeout = '2s';

-- Beside the head and not in it: a second update of one row in a transaction has its foreign keys checked again, and the head's
-- leads to the product's table, of which a save locks nothing. Guarded by the head's lock, which every writer holds.
create table preview.project_totals (
  project_id uuid primary key references public.project_heads (project_id) on delete cascade,
  files bigint not null,
  bytes bigint not null,
  path_bytes bigint not null
) with (fillfactor = 50);  -- updated by every write
alter table preview.project_totals enable row level security;
revoke all on preview.project_totals from public, anon, authenticated, service_role;
comment on table preview.project_totals is
  'Current files of each project, their bytes and those of their paths. No row: not counted yet. Whoever changes project_files by hand deletes the row.';

alter table preview.settings
  -- Each costs a machine an inode and 400 bytes of memory; large projects have a few thousand.
  add column max_project_files integer not null default 50000 check (max_project_files > 0),
  -- A machine's disk is a few GB, and node_modules has to fit beside the project.
  add column max_project_bytes bigint not null default 1073741824 check (max_project_bytes > 0),
  -- A snapshot's manifest names them all, and a machine holds it in memory whole: 50,000 paths of 167 bytes.
  add column max_project_path_bytes bigint not null default 8388608 check (max_project_path_bytes > 0);

create or replace view preview.limits with (security_invoker = true) as
  select v.name, v.value from preview.settings s, lateral (values
    ('path.bytes', 1024::bigint), ('path.segment_bytes', 255), ('path.segments', 64),
    ('file.bytes', s.max_file_bytes), ('bulk.files', s.max_bulk_files), ('bulk.bytes', s.max_bulk_bytes),
    ('project.files', s.max_project_files), ('project.bytes', s.max_project_bytes), ('project.path_bytes', s.max_project_path_bytes),
    ('asset.bytes', (select b.file_size_limit from storage.buckets b where b.id = 'project-assets'))
  ) as v (name, value);

-- As it was, but: a text too may have no room in an archive, where the texts alone are more than Storage takes of one object.
create or replace function preview.unavailable(project uuid, path text, hash text, is_binary boolean) returns text
language sql stable set search_path = '' as $$
  select case
    when octet_length(path) - octet_length(replace(path, '/', '')) >= 64 then 'too_deep'
    when is_binary and not exists (select from storage.objects o
                                   where o.bucket_id = 'project-assets' and o.name = project || '/' || hash) then 'lost'
    else (select u.reason from preview.unavailable_content u where u.project_id = project and u.content_hash = hash)
  end
$$;

-- What a project holds, or what is added to it.
create type preview.totals as (files bigint, bytes bigint, path_bytes bigint);

-- Refuses `total` where `added` makes it larger and it is over a limit.
create function preview.check_totals(project uuid, total preview.totals, added preview.totals, turn uuid default null) returns void
language plpgsql stable set search_path = '' as $$
declare
  over record;
begin
  select l.* into over from preview.settings s, lateral (values
    ('project.files', 'files', total.files, added.files, s.max_project_files::bigint),
    ('project.bytes', 'bytes', total.bytes, added.bytes, s.max_project_bytes),
    ('project.path_bytes', 'bytes of paths', total.path_bytes, added.path_bytes, s.max_project_path_bytes)
  ) as l (name, noun, would_be, more, most)
  where l.would_be > l.most and l.more > 0 limit 1;
  if found then
    raise exception 'project_uuid %: the project would have % %, at most % are taken', project, over.would_be, over.noun, over.most
      using errcode = 'PT413',
            detail = (jsonb_build_object('limit', over.name, 'most', over.most, 'would_be', over.would_be)
              || case when turn is not null then jsonb_build_object('turn_id', turn) else '{}' end)::text,
            hint = 'Delete files first: build output, caches and dependencies need not be in a project. A deletion is always taken. '
                   'Whoever runs the database may raise the limit in preview.settings.';
  end if;
end $$;

-- What is in the table now. For projects that were never counted, and for whoever doubts a count.
create function preview.counted(project uuid) returns preview.totals
language sql stable set search_path = '' as $$
  select count(*), coalesce(sum(f.size_bytes), 0)::bigint, coalesce(sum(octet_length(f.file_path)), 0)::bigint
  from public.project_files f where f.project_id = project and f.is_current_version and not f.is_deleted
$$;

-- Each version knows which one it supersedes, so what a commit adds follows from what it inserts. Its writer holds the head's lock.
create function preview.count_files() returns trigger
language plpgsql security definer set search_path = '' set enable_seqscan = off as $$
declare
  commit record;
  added preview.totals;
  total preview.totals;
begin
  for commit in
    select w.project_id, sum((not w.is_deleted)::int - was.live) as files, sum(w.size_bytes - was.bytes) as bytes,
           sum(octet_length(w.file_path) * ((not w.is_deleted)::int - was.live)) as path_bytes
    from written w
    cross join lateral (
      select coalesce(max((not f.is_deleted)::int), 0) as live, coalesce(max(f.size_bytes), 0) as bytes
      from public.project_files f where f.id = w.parent_version_id
    ) was
    where w.is_current_version
    group by w.project_id
  loop
    added := row(commit.files, commit.bytes, commit.path_bytes);
    continue when added = row(0, 0, 0)::preview.totals;
    update preview.project_totals t
    set files = t.files + added.files, bytes = t.bytes + added.bytes, path_bytes = t.path_bytes + added.path_bytes
    where t.project_id = commit.project_id
    returning t.files, t.bytes, t.path_bytes into total;
    if not found then
      perform from public.project_heads h where h.project_id = commit.project_id for no key update;
      total := preview.counted(commit.project_id);
      insert into preview.project_totals values (commit.project_id, total.files, total.bytes, total.path_bytes);
    end if;
    perform preview.check_totals(commit.project_id, total, added);
  end loop;
  return null;
end $$;
create trigger count_files after insert on public.project_files
  referencing new table as written
  for each statement execute function preview.count_files();

-- ------------------------------------------------------------------------------------------------ turns
create index turn_changes_assets_idx on preview.turn_changes (turn_id) where content is null and action = 'update';

-- What ends refused should be refused when it is staged, not minutes later. First by the most that the turn can add, then exactly.
create function preview.check_staged() returns trigger
language plpgsql security definer set search_path = '' set enable_seqscan = off set enable_sort = off as $$
declare
  limits preview.settings;
  total preview.totals;
  added record;
begin
  select * into strict limits from preview.settings;
  select t.files, t.bytes, t.path_bytes into total from preview.project_totals t where t.project_id = new.project_id;
  if total.files + new.files <= limits.max_project_files and total.path_bytes + new.files * 1024 <= limits.max_project_path_bytes
     and total.bytes + new.bytes + (
       select coalesce(sum((o.metadata ->> 'size')::bigint), 0) from preview.turn_changes c, storage.objects o
       where c.turn_id = new.id and c.content is null and c.action = 'update'
         and o.bucket_id = 'project-assets' and o.name = new.project_id || '/' || c.content_hash
     ) <= limits.max_project_bytes then
    return new;
  elsif total.files is null then
    total := preview.counted(new.project_id);
  end if;
  select sum(now_live - was_live) as files, sum(c.bytes - coalesce(f.size_bytes, 0)) as bytes,
         sum(octet_length(c.file_path) * (now_live - was_live)) as path_bytes,
         bool_or(c.action = 'update' and c.staged_at = c.latest) as grows into added
  from (
    select t.*, max(t.staged_at) over () as latest, case
             when t.action = 'delete' then 0 when t.content is not null then t.size_bytes
             else coalesce((select (o.metadata ->> 'size')::bigint from storage.objects o
                            where o.bucket_id = 'project-assets' and o.name = new.project_id || '/' || t.content_hash), 0) end as bytes
    from preview.turn_changes t where t.turn_id = new.id
  ) c
  left join lateral (
    select at.file_path, at.size_bytes, at.is_deleted from public.project_files at
    where at.project_id = new.project_id and at.is_current_version and at.file_path >= c.file_path
    order by at.file_path limit 1
  ) f on f.file_path = c.file_path
  cross join lateral (select (c.action = 'update')::int as now_live, coalesce((not f.is_deleted)::int, 0) as was_live) n;
  -- A deletion is taken, whatever others have added meanwhile.
  if added.grows then
    perform preview.check_totals(
      new.project_id, row(total.files + added.files, total.bytes + added.bytes, total.path_bytes + added.path_bytes)::preview.totals,
      row(added.files, added.bytes, added.path_bytes)::preview.totals, new.id);
  end if;
  return new;
end $$;
create trigger check_staged before update of files, bytes on preview.turns
  for each row execute function preview.check_staged();

revoke all on function preview.check_totals, preview.counted, preview.count_files, preview.check_staged from public;
