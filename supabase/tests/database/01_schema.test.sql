begin;
select plan(15);

select has_table('public', 'project_files', 'files are there');
select has_table('public', 'project_heads', 'heads are there');
select has_table('public', 'project_snapshots', 'snapshot requests are there');

select is(
  (select string_agg(attname, ' ' order by attnum) from pg_attribute
   where attrelid = 'public.project_files'::regclass and attnum > 0 and not attisdropped),
  'id project_id file_path file_type content content_hash version parent_version_id is_current_version created_by '
  'last_modified_by created_at updated_at revision is_deleted size_bytes encoding executable renamed_from origin contributors session_id splices',
  'the seed''s columns, then ours');

select is((select count(*)::int from pg_constraint where conrelid = 'public.project_files'::regclass and contype = 'u'
  and pg_get_constraintdef(oid) = 'UNIQUE (project_id, file_path, version)'), 1, 'a version is there once');

select is((select count(*)::int from pg_indexes where schemaname = 'public' and tablename = 'project_files' and indexdef ~ columns), 1,
  'index on ' || columns)
from unnest(array['\(project_id\)$', '\(project_id, file_path\)$', '\(project_id, is_current_version\)$',
  '^CREATE UNIQUE .*\(project_id, file_path\) WHERE is_current_version$',
  '\(project_id, revision\) WHERE is_current_version$']) as columns;

select is((select reloptions::text from pg_class where oid = 'public.project_files_current'::regclass),
  '{security_invoker=true}', 'the view reads with its reader''s rights');
select is((select bool_and(relrowsecurity) from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r'),
  true, 'row level security is on for every table');
select results_eq($$ select id, public from storage.buckets where id in ('project-snapshots', 'project-assets', 'preview-bundles', 'preview-modules') order by id $$,
  $$ values ('preview-bundles', false), ('preview-modules', false), ('project-assets', false), ('project-snapshots', false) $$, 'the buckets are there, private');
select is((select rolcanlogin or rolbypassrls or rolsuper from pg_roles where rolname = 'preview_agent'), false,
  'the container''s role is nobody');
select is(preview.path_problem('src/../../etc/passwd'), 'dot_segment', 'hostile paths have a name');

select * from finish();
rollback;
