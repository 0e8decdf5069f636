begin;
select plan(22);

insert into auth.users (id, email) values
  ('11111111-1111-4111-8111-111111111111', 'owner@example.com'), ('22222222-2222-4222-8222-222222222222', 'stranger@example.com');
insert into public.user_profiles (id) values
  ('11111111-1111-4111-8111-111111111111'), ('22222222-2222-4222-8222-222222222222');
insert into public.projects (id, owner_id)
values ('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', '11111111-1111-4111-8111-111111111111');

select has_table('preview', 'turns', 'turns are there');
select has_table('preview', 'turn_changes', 'and what they hold');
select policies_are('preview', 'turns', array['members see turns', 'a container''s token reads no table'], 'turns are read, not written');
select policies_are('preview', 'turn_changes', array['members see what a turn holds', 'a container''s token reads no table'],
  'what they hold as well');
select is((select count(*)::int from pg_proc where pronamespace = 'public'::regnamespace and proname = name), 1,
  name || ' is there in one form') from unnest(array['upsert_project_file', 'delete_project_file', 'apply_project_files', 'list_current_files']) name;

set local role authenticated;
set local request.jwt.claims = '{"role": "authenticated", "sub": "11111111-1111-4111-8111-111111111111"}';
select set_config('t.turn', public.begin_turn('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'forty files') ->> 'turn_id', true) is not null;
select is(public.upsert_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', 'x', p_turn_id => current_setting('t.turn')::uuid)
  -> 'staged', 'true', 'a save is staged');
select is((select count(*)::int from public.list_current_files('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa')), 0, 'and not seen');
select is((select count(*)::int from public.list_current_files('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', current_setting('t.turn')::uuid)),
  1, 'but by its turn');
select throws_ok($$ update preview.turns set state = 'ended' $$, '42501', null, 'no way past the RPCs');

set local request.jwt.claims = '{"role": "authenticated", "sub": "22222222-2222-4222-8222-222222222222"}';
select is_empty($$ select id from preview.turns $$, 'a stranger sees no turn');
select is_empty($$ select turn_id from preview.turn_changes $$, 'nor what it holds');
select throws_ok($$ select public.begin_turn('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa') $$, 'PT404', null, 'nor begins one');
select throws_ok($$ select public.end_turn('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', current_setting('t.turn')::uuid) $$, 'PT404', null,
  'nor ends one');

set local role anon;
set local request.jwt.claims = '{"role": "anon"}';
select throws_ok($$ select public.begin_turn('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa') $$, '42501', null, 'anon begins none');

reset role;
grant usage on schema extensions to preview_agent;
select preview.publish('preview:aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'preview:status', '{}');
set local role preview_agent;
set local request.jwt.claims = '{"role": "preview_agent", "project_id": "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"}';
set local realtime.topic = 'preview:aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa';
select is((select count(*)::int from realtime.messages), 0, 'the members'' topic is not for a container');
set local role authenticated;
set local request.jwt.claims = '{"role": "authenticated", "sub": "11111111-1111-4111-8111-111111111111"}';
select is((select count(*)::int from realtime.messages), 1, 'it is for members');
select is(public.end_turn('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', current_setting('t.turn')::uuid) ->> 'revision', '1', 'the end is one revision');
select throws_ok($$ select public.delete_project_file('aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa', 'a', p_turn_id => current_setting('t.turn')::uuid) $$,
  'PT410', null, 'after which the turn is over');
reset role;
select is((select payload ->> 'label' from realtime.messages where event = 'bulk:apply'), 'forty files', 'the message says which');

select * from finish();
rollback;
