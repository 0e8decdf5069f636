-- Adopts a `project_files` of an older shape, one row for a file, whatever its columns were called: the path as file_path,
-- path, filename or name; the contents as content, code or source; the kind as file_type, type or language. Each file becomes
-- version 1 of revision 1. A row that cannot be a file here is kept, whole, with the reason.
--
-- On a live database: writers of the old shape were turned away when the first migration renamed the table, so nothing moves
-- meanwhile; the new table is only appended to, and its readers wait for nobody. Without an old table, this does nothing.
set local lock_timeout = '2s';

create table preview.legacy_rejects (
  id bigint generated always as identity primary key,
  reason text not null,
  legacy jsonb not null
);
alter table preview.legacy_rejects enable row level security;
comment on table preview.legacy_rejects is 'Rows of the older project_files that could not be adopted, and why.';
revoke all on preview.legacy_rejects from public;

do $$
begin
  if to_regclass('preview.project_files_legacy') is null then
    return;
  end if;
  create temporary table adopted on commit drop as
    select raw, project_id, owner_id, content, path, file_type, created_by, created_at, updated_at,
           row_number() over (partition by project_id, path order by updated_at desc, raw ->> 'id') as age,
           case
             when owner_id is null then 'its project does not exist'
             when raw ->> 'type' in ('directory', 'folder') then 'a directory, not a file'
             when content is null then 'it has no content'
             when path is null then 'it has no path'
             when preview.path_problem(path) is not null then 'its path cannot be used: ' || preview.path_problem(path)
           end as reason
    from (
      select l.raw, p.id as project_id, p.owner_id,
             coalesce(l.raw ->> 'content', l.raw ->> 'code', l.raw ->> 'source') as content,
             normalize(regexp_replace(
               replace(coalesce(l.raw ->> 'file_path', l.raw ->> 'path', l.raw ->> 'filename', l.raw ->> 'name'), '\', '/'),
               '^(\.?/)+', '')) collate "C" as path,
             coalesce(l.raw ->> 'file_type', l.raw ->> 'type', l.raw ->> 'language') as file_type,
             coalesce(u.id, p.owner_id) as created_by,
             coalesce((l.raw ->> 'created_at')::timestamptz, now()) as created_at,
             coalesce((l.raw ->> 'updated_at')::timestamptz, (l.raw ->> 'created_at')::timestamptz, now()) as updated_at
      from (select to_jsonb(old) as raw from preview.project_files_legacy old) l
      left join public.projects p on p.id::text = l.raw ->> 'project_id'
      left join public.user_profiles u on u.id::text = coalesce(l.raw ->> 'created_by', l.raw ->> 'user_id')
    ) found;
  update adopted set reason = 'a newer row has the same path' where reason is null and age > 1;
  update adopted a set reason = 'a file of that name would be a directory of another'
  where a.reason is null and exists (
    select from adopted below
    where below.reason is null and below.project_id = a.project_id
      and below.path > a.path || '/' and below.path < a.path || '0');

  insert into public.project_files (project_id, file_path, file_type, content, content_hash, version, created_by,
                                    last_modified_by, created_at, updated_at, revision, size_bytes)
  select project_id, path, coalesce(nullif(file_type, ''), preview.file_type_of(path)), content,
         encode(sha256(convert_to(content, 'UTF8')), 'hex'), 1, created_by, created_by, created_at, updated_at, 1,
         octet_length(content)
  from adopted where reason is null;
  insert into preview.legacy_rejects (reason, legacy) select reason, raw from adopted where reason is not null;
  update public.project_heads h set revision = 1, updated_at = now()
  where exists (select from public.project_files f where f.project_id = h.project_id);
  drop table preview.project_files_legacy;
end $$;
