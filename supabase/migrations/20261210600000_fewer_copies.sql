-- Splices are found with fewer copies of the texts. Their equal ends were found by halves of copies of both, some ten times the size of
-- the file; they are compared in pieces now, each byte once. A save of 1.5 MB took 1.11 times as long with splices as without.
--
-- On a live database: functions are replaced in place.
set local lock_timeout = '2s';

-- How many bytes are equal after `at_a` of `a` and `at_b` of `b`, at most `most`. A piece is as large as the allocator hands out without
-- asking the system; the one that differs is halved, so that all comparing is memcmp's.
create function preview.equal_after(a bytea, at_a integer, b bytea, at_b integer, most integer) returns integer
language plpgsql immutable strict parallel safe set search_path = '' as $$
declare
  piece constant integer := 65536;
  low integer := 0;
  high integer;
  middle integer;
begin
  loop
    if low >= most then
      return most;
    end if;
    high := least(low + piece, most);
    exit when substring(a from at_a + low + 1 for high - low) <> substring(b from at_b + low + 1 for high - low);
    low := high;
  end loop;
  while high - low > 1 loop
    middle := low + (high - low) / 2;
    if substring(a from at_a + low + 1 for middle - low) = substring(b from at_b + low + 1 for middle - low) then
      low := middle;
    else
      high := middle;
    end if;
  end loop;
  return low;
end $$;

-- The same before `at_a` and `at_b`.
create function preview.equal_before(a bytea, at_a integer, b bytea, at_b integer, most integer) returns integer
language plpgsql immutable strict parallel safe set search_path = '' as $$
declare
  piece constant integer := 65536;
  low integer := 0;
  high integer;
  middle integer;
begin
  loop
    if low >= most then
      return most;
    end if;
    high := least(low + piece, most);
    exit when substring(a from at_a - high + 1 for high - low) <> substring(b from at_b - high + 1 for high - low);
    low := high;
  end loop;
  while high - low > 1 loop
    middle := low + (high - low) / 2;
    if substring(a from at_a - middle + 1 for middle - low) = substring(b from at_b - middle + 1 for middle - low) then
      low := middle;
    else
      high := middle;
    end if;
  end loop;
  return low;
end $$;

-- As it was, but for how equal ends are found.
create or replace function preview.splices_of(before text, after text, most integer default 24) returns jsonb
language plpgsql immutable parallel safe set search_path = '' as $$
declare
  a constant bytea := convert_to(before, 'UTF8');
  b constant bytea := convert_to(after, 'UTF8');
  -- Quadruples that are still to be done, the leftmost on top: a from, a to, b from, b to.
  todo integer[] := array[0, octet_length(a), 0, octet_length(b)];
  depth integer := 4;
  a1 integer;
  a2 integer;
  b1 integer;
  b2 integer;
  trimmed integer;
  rest bytea;
  anchor integer;
  at_b integer;
  at_a integer;
  budget bigint := 4::bigint * octet_length(a) + 1048576;
  inserted bigint := 0;
  found jsonb := '[]';
begin
  if a is null or b is null then
    return null;
  end if;
  while depth > 0 loop
    a1 := todo[depth - 3];
    a2 := todo[depth - 2];
    b1 := todo[depth - 1];
    b2 := todo[depth];
    depth := depth - 4;
    trimmed := preview.equal_after(a, a1, b, b1, least(a2 - a1, b2 - b1));
    a1 := a1 + trimmed;
    b1 := b1 + trimmed;
    trimmed := preview.equal_before(a, a2, b, b2, least(a2 - a1, b2 - b1));
    a2 := a2 - trimmed;
    b2 := b2 - trimmed;
    continue when a1 = a2 and b1 = b2;
    rest := substring(a from a1 + 1 for a2 - a1);
    at_a := 0;
    for try in 0..13 loop  -- at the middle, the quarters and the eighths
      anchor := case when try < 7 then 256 else 48 end;
      continue when a2 - a1 < anchor or b2 - b1 < anchor or budget < a2 - a1;
      at_b := b1 + ((b2 - b1)::bigint * (array[4, 2, 6, 1, 3, 5, 7])[try % 7 + 1] / 8)::integer - anchor / 2;
      continue when at_b < b1 or at_b + anchor > b2;
      budget := budget - (a2 - a1);
      at_a := position(substring(b from at_b + 1 for anchor) in rest);
      exit when at_a > 0;
    end loop;
    if at_a > 0 then
      at_a := a1 + at_a - 1;
      if depth > 4 * most then
        return null;
      end if;
      todo[depth + 1 : depth + 8] := array[at_a, a2, at_b, b2, a1, at_a, b1, at_b];
      depth := depth + 8;
    else
      -- What lies before and behind is equal on both sides, so both ends move alike.
      while a1 > 0 and b1 > 0 and not (preview.begins_character(a, a1) and preview.begins_character(b, b1)) loop
        a1 := a1 - 1;
        b1 := b1 - 1;
      end loop;
      while not (preview.begins_character(a, a2) and preview.begins_character(b, b2)) loop
        a2 := a2 + 1;
        b2 := b2 + 1;
      end loop;
      inserted := inserted + (b2 - b1);
      found := found || jsonb_build_array(
        jsonb_build_array(a1, a2 - a1, convert_from(substring(b from b1 + 1 for b2 - b1), 'UTF8')));
      if jsonb_array_length(found) > most or inserted > 0 and 2 * inserted >= octet_length(b) then
        return null;
      end if;
    end if;
  end loop;
  return found;
end $$;

drop function preview.common_prefix(bytea, bytea);
drop function preview.common_suffix(bytea, bytea, integer);

revoke all on function preview.equal_after, preview.equal_before from public;
grant execute on function preview.equal_after, preview.equal_before to authenticated, service_role;
