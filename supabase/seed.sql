-- A user with a project and three files, for `supabase db reset` and a look around.
insert into auth.users (id, email) values ('00000000-0000-4000-8000-000000000001', 'ada@example.com') on conflict do nothing;
insert into public.user_profiles (id, display_name) values ('00000000-0000-4000-8000-000000000001', 'Ada') on conflict do nothing;
insert into public.projects (id, owner_id, name)
values ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000001', 'hello') on conflict do nothing;
select public.apply_project_files('00000000-0000-4000-8000-0000000000a1', '[
  {"file_path": "package.json", "content": "{\"name\": \"hello\", \"private\": true, \"type\": \"module\"}\n"},
  {"file_path": "index.html", "content": "<!doctype html>\n<div id=\"root\"></div>\n<script type=\"module\" src=\"/src/main.js\"></script>\n"},
  {"file_path": "src/main.js", "content": "document.querySelector(\"#root\").textContent = \"hello\";\n"}
]'::jsonb, 'seed');
