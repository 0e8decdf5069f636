-- The few functions of pgTAP that supabase/tests/database uses, under pgTAP's names and with its output, for a PostgreSQL on
-- which the extension is not installed (the embedded one). Where it is installed, the real one runs the same files.
create or replace function extensions.plan(tests integer) returns text language plpgsql as $$
begin
  perform set_config('tap.planned', tests::text, true), set_config('tap.run', '0', true), set_config('tap.failed', '0', true);
  return '1..' || tests;
end $$;

create or replace function extensions.ok(passed boolean, description text) returns text language plpgsql as $$
declare
  number integer := current_setting('tap.run')::integer + 1;
begin
  perform set_config('tap.run', number::text, true);
  if passed is not true then
    perform set_config('tap.failed', (current_setting('tap.failed')::integer + 1)::text, true);
  end if;
  return format('%sok %s - %s', case when passed is true then '' else 'not ' end, number, description);
end $$;

create or replace function extensions.is(have anyelement, want anyelement, description text) returns text language plpgsql as $$
begin
  return extensions.ok(have is not distinct from want, description)
    || case when have is not distinct from want then '' else format(E'\n#   have: %s\n#   want: %s', have, want) end;
end $$;

create or replace function extensions.lives_ok(query text, description text) returns text language plpgsql as $$
begin
  begin
    execute query;
  exception when others then
    return extensions.ok(false, description) || format(E'\n#   died: %s: %s', sqlstate, sqlerrm);
  end;
  return extensions.ok(true, description);
end $$;

-- `message` null: any.
create or replace function extensions.throws_ok(query text, code char(5), message text, description text) returns text
language plpgsql as $$
begin
  begin
    execute query;
  exception when others then
    return extensions.ok(sqlstate = code and (message is null or sqlerrm = message), description)
      || case when sqlstate = code and (message is null or sqlerrm = message) then ''
              else format(E'\n#   caught: %s: %s', sqlstate, sqlerrm) end;
  end;
  return extensions.ok(false, description) || E'\n#   nothing was thrown';
end $$;

create or replace function extensions.results_eq(have text, want text, description text) returns text language plpgsql as $$
declare
  same boolean;
begin
  execute format('select (select array_agg(h::text) from (%s) h) is not distinct from (select array_agg(w::text) from (%s) w)',
    have, want) into same;
  return extensions.ok(same, description);
end $$;

create or replace function extensions.is_empty(query text, description text) returns text language plpgsql as $$
declare
  rows integer;
begin
  execute format('select count(*) from (%s) q', query) into rows;
  return extensions.ok(rows = 0, description);
end $$;

create or replace function extensions.has_table(schema_name name, table_name name, description text) returns text
language sql as $$
  select extensions.ok(to_regclass(format('%I.%I', schema_name, table_name)) is not null, description)
$$;

create or replace function extensions.policies_are(schema_name name, table_name name, wanted name[], description text)
returns text language sql as $$
  select extensions.ok(array_agg(p.polname order by p.polname) = (select array_agg(w order by w) from unnest(wanted) w), description)
  from pg_policy p where p.polrelid = format('%I.%I', schema_name, table_name)::regclass
$$;

create or replace function extensions.finish() returns setof text language plpgsql as $$
begin
  if current_setting('tap.run') <> current_setting('tap.planned') then
    return next format('# Looks like you planned %s tests but ran %s', current_setting('tap.planned'), current_setting('tap.run'));
  end if;
  if current_setting('tap.failed') <> '0' then
    return next format('# Looks like you failed %s tests of %s', current_setting('tap.failed'), current_setting('tap.planned'));
  end if;
end $$;
