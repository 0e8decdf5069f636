begin;
select plan(21);

insert into auth.users (id, email) values
  ('11111111-1111-4111-8111-111111111111', 'owner@example.com'), ('22222222-2222-4222-8222-222222222222', 'stranger@example.com');
insert into public.user_profiles (id) values
  ('11111111-1111-4111-8111-111111111111'), ('22222222-2222-4222-8222-222222222222');
insert into public.projects (id, owner_id)
values ('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', '11111111-1111-4111-8111-111111111111');
select public.upsert_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'x', 'text') is not null;

select policies_are('public', 'project_files', array['members read files', 'a container''s token reads no table'],
  'files have a policy to read and none to write');

set local role authenticated;
set local request.jwt.claims = '{"role": "authenticated", "sub": "11111111-1111-4111-8111-111111111111", "session_id": "s"}';
select is((select count(*)::int from public.project_files), 1, 'the owner reads');
select lives_ok($$ select public.upsert_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'y', 'text') $$, 'the owner writes');
select throws_ok($$ update public.project_files set content = 'z' $$, '42501', null, 'not past the RPCs');
select throws_ok($$ delete from public.project_files $$, '42501', null, 'nor deletes');
select throws_ok($$ select public.prune_project_history('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', '1 day', 1) $$, '42501', null,
  'forgetting is for the service');

set local request.jwt.claims = '{"role": "authenticated", "sub": "22222222-2222-4222-8222-222222222222"}';
select is_empty($$ select id from public.project_files $$, 'a stranger reads nothing');
select is_empty($$ select id from public.projects $$, 'nor sees the project');
select throws_ok($$ select public.upsert_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'z', 'text') $$, 'PT404', null,
  'nor writes');
select throws_ok($$ select public.create_project_snapshot('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa') $$, 'PT404', null,
  'nor asks for a snapshot');

set local request.jwt.claims =
  '{"role": "authenticated", "sub": "11111111-1111-4111-8111-111111111111", "project_id": "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"}';
select is_empty($$ select id from public.project_files $$, 'a container''s token reads no table, whoever it says it is');

set local role anon;
set local request.jwt.claims = '{"role": "anon"}';
select throws_ok($$ select 1 from public.project_files $$, '42501', null, 'anon reads nothing');
select throws_ok($$ select public.list_current_files('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa') $$, '42501', null, 'anon calls nothing');

reset role;
grant usage on schema extensions to preview_agent;  -- to call these very functions
set local role preview_agent;
set local request.jwt.claims = '{"role": "preview_agent", "project_id": "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"}';
set local realtime.topic = 'project:aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa';
select is((select count(*)::int from realtime.messages), 2, 'a container hears its project');
select throws_ok($$ insert into realtime.messages (topic, extension) values ('x', 'broadcast') $$, '42501', null, 'and says nothing');
select throws_ok($$ select 1 from public.project_files $$, '42501', null, 'and reads no file');
select throws_ok($$ select 1 from public.projects $$, '42501', null, 'and no project');
select throws_ok($$ select public.upsert_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'z', 'text') $$, '42501', null,
  'and writes none');
set local realtime.topic = 'project:bbbbbbbb-bbbb-4bbb-8bbb-bbbbbbbbbbbb';
select is((select count(*)::int from realtime.messages), 0, 'another project''s topic is not for it');

set local role service_role;
set local request.jwt.claims = '{"role": "service_role"}';
select lives_ok($$ select public.upsert_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'b', 'z', 'text') $$, 'the service writes');
select throws_ok($$ update public.project_heads set revision = 0 $$, '42501', null, 'by the RPCs as everybody');

reset role;
select * from finish();
rollback;
