begin;
select plan(18);

insert into auth.users (id, email) values ('11111111-1111-4111-8111-111111111111', 'owner@example.com');
insert into public.user_profiles (id) values ('11111111-1111-4111-8111-111111111111');
insert into public.projects (id, owner_id)
values ('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', '11111111-1111-4111-8111-111111111111');
create function pg_temp.p() returns uuid language sql as $$ select 'aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa'::uuid $$;

select is(public.upsert_project_file(pg_temp.p(), 'src/a.ts', 'one', 'typescript') ->> 'version', '1', 'a new file has version 1');
select is(public.upsert_project_file(pg_temp.p(), 'src/a.ts', 'two', 'typescript') ->> 'revision', '2', 'each write has a revision');
select is(public.upsert_project_file(pg_temp.p(), 'src/a.ts', 'two', 'typescript') ->> 'changed', 'false', 'the same content changes nothing');
select is(public.upsert_project_file(pg_temp.p(), 'src/a.ts', 'two', 'typescript') ->> 'content_hash',
  encode(sha256('two'), 'hex'), 'the hash is made here');
select throws_ok($$ select public.upsert_project_file(pg_temp.p(), 'src/a.ts', 'three', 'typescript', 1) $$, 'PT409',
  'expected_version 1: src/a.ts is at version 2', 'a stale writer is told');
select is((select revision from public.project_heads where project_id = pg_temp.p()), 2::bigint, 'a refusal spends no revision');
select is(public.upsert_project_file(pg_temp.p(), 'src/a.ts', 'three', 'typescript', 2) ->> 'version', '3', 'a current one is let in');

select is(public.delete_project_file(pg_temp.p(), 'src/a.ts') ->> 'is_deleted', 'true', 'a deletion is a tombstone');
select is_empty($$ select * from public.list_current_files(pg_temp.p()) $$, 'a deleted file is not listed');
select throws_ok($$ select public.delete_project_file(pg_temp.p(), 'never') $$, 'PT404', null, 'what never was cannot be deleted');
select throws_ok($$ select public.upsert_project_file(pg_temp.p(), '../x', '', 'text') $$, 'PT400', null, 'hostile paths are refused');

select is(public.apply_project_files(pg_temp.p(), '[{"file_path": "b", "content": "B"}, {"file_path": "c", "content": "C"}]',
  'bulk-1') ->> 'revision', '5', 'a bulk is one revision');
select is(public.apply_project_files(pg_temp.p(), '[{"file_path": "b", "content": "B"}, {"file_path": "c", "content": "C"}]',
  'bulk-1') ->> 'changed', '2', 'a correlation id is answered with its first answer');
select throws_ok($$ select public.upsert_project_file(pg_temp.p(), 'b/below', '', 'text') $$, 'PT409', null,
  'no file is a directory of another');
select is(public.restore_project_file(pg_temp.p(), 'src/a.ts', 1) ->> 'version', '5', 'an earlier version comes back as a new one');

select results_eq(
  $$ select event, (payload ->> 'revision')::int from realtime.messages
     where topic = 'project:' || pg_temp.p() order by 2 $$,
  $$ values ('file:update', 1), ('file:update', 2), ('file:update', 3), ('file:delete', 4), ('bulk:apply', 5), ('file:update', 6) $$,
  'each revision was told once');
select is(public.changes_since(pg_temp.p(), (select epoch::text from public.project_heads where project_id = pg_temp.p()), 4)
  -> 'changes' -> 0 ->> 'file_path', 'b', 'catch-up begins after the revision asked for');
select is(public.changes_since(pg_temp.p(), 'another', 4) ->> 'reason', 'epoch', 'another history needs a snapshot');

select * from finish();
rollback;
