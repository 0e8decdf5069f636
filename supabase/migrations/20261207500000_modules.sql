-- Dependency layers: archives of node_modules, by a key that only the agents can make and that says nothing here. A project's own
-- are written from its machines and read by them alone; those without a project are the operator's, and read by all.
--
-- On a live database: a bucket and two new tables, so nothing is rewritten.
set local lock_timeout = '2s';

do $$
begin
  if exists (select from storage.buckets b where b.id = 'preview-modules' and b.public) then
    raise exception 'the bucket preview-modules is public: everybody would read what projects have installed'
      using hint = 'Make it private, or give it another name, and migrate again.';
  end if;
end $$;
insert into storage.buckets (id, name, public, file_size_limit) values ('preview-modules', 'preview-modules', false, null)
on conflict (id) do nothing;

-- The objects of a layer are {project_id|shared}/{key}/{id}.{number}: what no row names is deleted some hours later.
create table preview.modules (
  id uuid primary key default gen_random_uuid(),
  -- Null: shared, made by the operator's own command.
  project_id uuid references public.project_heads (project_id) on delete cascade,
  key text not null check (key ~ '^[0-9a-f]{40}$'),
  -- Whose machine sends it; null: none did.
  session_id uuid,
  -- [{sha256, size}], in order; null while it is being sent.
  parts jsonb check (jsonb_typeof(parts) = 'array'),
  size_bytes bigint not null default 0 check (size_bytes >= 0),
  created_at timestamptz not null default now(),
  used_at timestamptz not null default now()
);
-- Whoever is first has it: a layer is never replaced.
create unique index modules_whole on preview.modules (project_id, key) nulls not distinct where parts is not null;
create unique index modules_sending on preview.modules (session_id, key) where parts is null;
create index modules_key on preview.modules (key) where parts is not null;
create index modules_used on preview.modules (used_at);
create index modules_project on preview.modules (project_id, created_at);

-- What a project's last install came to: its next machine is told at its creation.
create table preview.project_modules (
  project_id uuid primary key references public.project_heads (project_id) on delete cascade,
  module_id uuid not null references preview.modules (id) on delete cascade
);
create index project_modules_module on preview.project_modules (module_id);

alter table preview.modules enable row level security;
alter table preview.project_modules enable row level security;
revoke all on preview.modules, preview.project_modules from public, anon, authenticated, service_role;
comment on table preview.modules is 'Archives of node_modules, in the bucket preview-modules; written through the session API.';
comment on table preview.project_modules is 'The layer that each project used last.';
