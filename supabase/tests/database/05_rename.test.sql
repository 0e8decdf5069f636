begin;
select plan(9);

insert into auth.users (id, email) values
  ('11111111-1111-4111-8111-111111111111', 'owner@example.com'), ('22222222-2222-4222-8222-222222222222', 'stranger@example.com');
insert into public.user_profiles (id) values
  ('11111111-1111-4111-8111-111111111111'), ('22222222-2222-4222-8222-222222222222');
insert into public.projects (id, owner_id)
values ('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', '11111111-1111-4111-8111-111111111111');

set local role authenticated;
set local request.jwt.claims = '{"role": "authenticated", "sub": "11111111-1111-4111-8111-111111111111"}';
select lives_ok($$ select public.upsert_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'x') $$, 'there is a file');
select is(public.rename_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'b', 1) ->> 'revision', '2', 'a rename is one revision');
select results_eq(
  $$ select file_path from public.project_files_current where project_id = 'aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa' $$,
  $$ values ('b') $$, 'the file has its new name alone');
select results_eq(
  $$ select old.file_path from public.project_files new join public.project_files old on old.id = new.renamed_from
     where new.file_path = 'b' and new.is_current_version $$,
  $$ values ('a') $$, 'and its version says what it was');
select throws_ok($$ select public.rename_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'b', 'c', 7) $$, 'PT409', null,
  'not when it is at another version');
select throws_ok($$ select public.rename_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'c') $$, 'PT404', null,
  'not when it is not there');
select throws_ok($$ update public.project_files set renamed_from = null $$, '42501', null, 'no way past the function');

set local request.jwt.claims = '{"role": "authenticated", "sub": "22222222-2222-4222-8222-222222222222"}';
select throws_ok($$ select public.rename_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'b', 'c') $$, 'PT404', null,
  'a stranger is told of no project');
reset role;
select results_eq(
  $$ select event, (payload ->> 'revision')::int from realtime.messages
     where topic = 'project:aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa' order by 2 $$,
  $$ values ('file:update', 1), ('bulk:apply', 2) $$, 'each revision was told once');

select * from finish();
rollback;
