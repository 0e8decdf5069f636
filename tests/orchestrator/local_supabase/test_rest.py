"""RPC and select in PostgREST's form."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from tests.fakes.serving import Local

pytestmark = pytest.mark.asyncio(loop_scope="module")

HASH = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
"""SHA-256 of `hello`."""


@pytest_asyncio.fixture(loop_scope="module")
async def project(local: Local) -> UUID:
    return await new_project(local)


async def new_project(local: Local, owner: UUID | None = None) -> UUID:
    owner = owner or uuid4()
    await local.sql("insert into auth.users (id, email) values (%s, %s)", owner, f"{owner}@example.com")
    await local.sql("insert into public.user_profiles (id) values (%s)", owner)
    rows = await local.sql("insert into public.projects (owner_id) values (%s) returning id", owner)
    found: UUID = rows[0][0]
    return found


def user(local: Local, sub: UUID) -> dict[str, str]:
    token = local.token("authenticated", sub=str(sub))
    return {"apikey": local.keys.anon_key, "authorization": f"Bearer {token}"}


async def test_a_save_and_what_it_answers(local: Local, project: UUID) -> None:
    save = {
        "project_uuid": str(project),
        "p_file_path": "src/a.ts",
        "p_content": "hello",
        "p_file_type": "typescript",
    }
    answer = await local.http.post("/rest/v1/rpc/upsert_project_file", json=save)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    body = answer.json()
    assert (body["file_path"], body["version"], body["content_hash"]) == ("src/a.ts", 1, HASH)
    listed = await local.http.post("/rest/v1/rpc/list_current_files", json={"project_uuid": str(project)})
    assert [(f["file_path"], f["version"], f["content_hash"]) for f in listed.json()] == [
        ("src/a.ts", 1, HASH)
    ]


async def test_a_conflict_is_409_with_the_head_in_details(local: Local, project: UUID) -> None:
    save = {"project_uuid": str(project), "p_file_path": "a", "p_content": "hello", "p_file_type": "text"}
    await local.http.post("/rest/v1/rpc/upsert_project_file", json=save)
    late = {**save, "p_content": "other", "expected_version": 7}
    answer = await local.http.post("/rest/v1/rpc/upsert_project_file", json=late)
    assert answer.status_code == 409
    body = answer.json()
    assert set(body) == {"code", "details", "hint", "message"}
    assert body["code"] == "PT409"
    assert HASH in body["details"]


async def test_the_database_decides_who_may_write(local: Local) -> None:
    owner, stranger = uuid4(), uuid4()
    project = await new_project(local, owner)
    save = {"project_uuid": str(project), "p_file_path": "a", "p_content": "hello", "p_file_type": "text"}
    rpc = "/rest/v1/rpc/upsert_project_file"
    assert (await local.http.post(rpc, json=save, headers=user(local, owner))).status_code == 200
    assert (await local.http.post(rpc, json=save, headers=user(local, stranger))).status_code == 404
    anonymous = {"apikey": local.keys.anon_key, "authorization": f"Bearer {local.keys.anon_key}"}
    refused = await local.http.post(rpc, json=save, headers=anonymous)
    assert (refused.status_code, refused.json()["code"]) == (401, "42501")
    container = local.token(project_id=str(project))
    answer = await local.http.post(
        rpc, json=save, headers={"apikey": local.keys.anon_key, "authorization": f"Bearer {container}"}
    )
    assert answer.status_code == 403
    seen = await local.http.get("/rest/v1/projects?select=id", headers=user(local, owner))
    assert seen.json() == [{"id": str(project)}]
    assert (await local.http.get("/rest/v1/projects?select=id", headers=user(local, stranger))).json() == []


async def test_bad_requests_say_what_is_wrong(local: Local) -> None:
    unknown = await local.http.post("/rest/v1/rpc/no_such_function", json={"a": 1})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "PGRST202")
    unknown = await local.http.post("/rest/v1/rpc/list_current_files", json={"wrong_name": "x"})
    assert (unknown.status_code, unknown.json()["code"]) == (404, "PGRST202")
    assert "list_current_files(project_uuid, p_turn_id)" in unknown.json()["hint"]
    hidden = await local.http.post("/rest/v1/rpc/pg_sleep", json={"seconds": 1})
    assert hidden.status_code == 404
    malformed = await local.http.post("/rest/v1/rpc/list_current_files", content=b"{")
    assert (malformed.status_code, malformed.json()["code"]) == (400, "PGRST102")
    not_a_uuid = await local.http.post("/rest/v1/rpc/list_current_files", json={"project_uuid": "x"})
    assert (not_a_uuid.status_code, not_a_uuid.json()["code"]) == (400, "22P02")


async def test_who_is_nobody(local: Local) -> None:
    path = "/rest/v1/rpc/list_current_files"
    bare = {"apikey": "", "authorization": ""}
    assert (await local.http.post(path, json={}, headers=bare)).status_code == 401
    wrong = {"apikey": "wrong", "authorization": ""}
    assert (await local.http.post(path, json={}, headers=wrong)).json()["message"] == "Invalid API key"
    for token, code in ((local.token(ttl=-60), "PGRST303"), (local.token()[:-5] + "AAAAA", "PGRST301")):
        answer = await local.http.post(path, json={}, headers={"authorization": f"Bearer {token}"})
        assert (answer.status_code, answer.json()["code"]) == (401, code)
        assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_roles_beyond_the_api_are_out_of_reach(local: Local) -> None:
    """The project's secret signs it, and still `authenticator` was not granted it."""
    superuser = {"authorization": f"Bearer {local.token('postgres')}"}
    answer = await local.http.get("/rest/v1/projects", headers=superuser)
    assert (answer.status_code, answer.json()["code"]) == (403, "42501")


async def test_selecting(local: Local, project: UUID) -> None:
    for path in ("a.ts", "b.ts", "c.css"):
        save = {"project_uuid": str(project), "p_file_path": path, "p_content": path, "p_file_type": "text"}
        assert (await local.http.post("/rest/v1/rpc/upsert_project_file", json=save)).status_code == 200
    view = "/rest/v1/project_files_current"

    async def paths(query: str) -> list[str]:
        answer = await local.http.get(f"{view}?select=file_path&project_id=eq.{project}&{query}")
        assert answer.status_code == 200, answer.text
        return [row["file_path"] for row in answer.json()]

    assert await paths("order=file_path.desc") == ["c.css", "b.ts", "a.ts"]
    assert await paths("file_path=in.(a.ts,c.css)&order=file_path") == ["a.ts", "c.css"]
    assert await paths("file_path=like.%25.ts&order=file_path&limit=1&offset=1") == ["b.ts"]
    assert await paths("file_path=neq.a.ts&order=file_path") == ["b.ts", "c.css"]
    single = {"accept": "application/vnd.pgrst.object+json"}
    one = await local.http.get(
        f"{view}?select=version&project_id=eq.{project}&file_path=eq.a.ts", headers=single
    )
    assert one.json() == {"version": 1}
    many = await local.http.get(f"{view}?project_id=eq.{project}", headers=single)
    assert (many.status_code, many.json()["code"]) == (406, "PGRST116")
    for query in ("file_path=zz.1", "select=a;drop", "limit=x", "no_such_column=eq.1"):
        assert (await local.http.get(f"{view}?{query}")).status_code == 400
    assert (await local.http.get("/rest/v1/no_such_view")).status_code == 404


async def test_get_calls_only_what_cannot_write(local: Local, project: UUID) -> None:
    listed = await local.http.get(f"/rest/v1/rpc/list_current_files?project_uuid={project}")
    assert (listed.status_code, listed.json()) == (200, [])
    writing = await local.http.get(f"/rest/v1/rpc/delete_project_file?project_uuid={project}&p_file_path=a")
    assert writing.status_code == 405


async def test_functions_that_change_under_it(local: Local) -> None:
    """Nothing is remembered of a schema; every return type has PostgREST's form."""

    async def call(**arguments: object) -> tuple[int, object]:
        answer = await local.http.post("/rest/v1/rpc/shifting", json=arguments)
        return answer.status_code, answer.json() if answer.content else None

    await local.sql(
        "create function public.shifting(a int) returns int language sql stable as 'select a + 1'"
    )
    assert await call(a=1) == (200, 2)
    assert (await call())[0] == 404
    await local.sql("drop function public.shifting")
    assert (await call(a=1))[0] == 404
    await local.sql(
        "create function public.shifting(b text default 'x') returns setof text"
        " language sql as 'select b union all select b'"
    )
    assert await call() == (200, ["x", "x"])
    assert await call(b="y") == (200, ["y", "y"])
    await local.sql("drop function public.shifting")
    await local.sql("create function public.shifting(b text) returns void language sql as 'select 1'")
    assert await call(b="y") == (204, None)
    await local.sql("drop function public.shifting")
    await local.sql(
        "create function public.shifting(b text) returns table(x int, y text) language sql as 'select 1, b'"
    )
    assert await call(b="y") == (200, [{"x": 1, "y": "y"}])
    await local.sql("drop function public.shifting")
    reads_only = "as $$ select current_setting('transaction_read_only') $$"
    for volatility, wanted in (("stable", "on"), ("volatile", "off")):
        await local.sql(
            f"create or replace function public.mode() returns text language sql {volatility} {reads_only}"
        )
        assert (await local.http.post("/rest/v1/rpc/mode")).json() == wanted
    await local.sql("drop function public.mode")
    await local.sql("create function public.shifting(b text) returns text language sql as 'select b'")
    assert (await call(b="a\0b"))[0] == 400
    await local.sql("drop function public.shifting")


async def test_a_page_of_another_origin_may_call(local: Local, project: UUID) -> None:
    path, origin = "/rest/v1/rpc/list_current_files", {"origin": "https://editor.example"}
    asking = {
        **origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "apikey,authorization,content-type,x-client-info",
    }
    allowed = await local.http.options(path, headers=asking)
    assert allowed.status_code == 200
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "apikey" in allowed.headers["access-control-allow-headers"]
    answer = await local.http.post(path, json={"project_uuid": str(project)}, headers=origin)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
    refused = await local.http.post(path, json={"project_uuid": "x"}, headers=origin)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (400, "*")
    await local.sql("insert into storage.buckets (id, name) values ('kept', 'kept')")
    for at in ("/storage/v1/bucket/kept", path):
        assert (await local.http.options(at)).status_code == 204
    assert (await local.http.get("/storage/v1/bucket/kept")).status_code == 200


RPC = "/rest/v1/rpc/list_current_files"


async def three(local: Local, project: UUID) -> dict[str, str]:
    for path, content in (("a.ts", "1"), ("b.css", "22"), ("c.ts", "333")):
        save = {"project_uuid": str(project), "p_file_path": path, "p_content": content}
        await local.http.post("/rest/v1/rpc/upsert_project_file", json=save)
    return {"project_uuid": str(project)}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("select=file_path,size_bytes&file_path=eq.c.ts", [{"file_path": "c.ts", "size_bytes": 3}]),
        ("select=file_path&order=file_path.desc", [{"file_path": p} for p in ("c.ts", "b.css", "a.ts")]),
        ("select=file_path&file_type=eq.typescript&limit=1&offset=1", [{"file_path": "c.ts"}]),
        ("select=version&size_bytes=gt.1&size_bytes=lt.3", [{"version": 1}]),
    ],
)
async def test_what_a_function_returns_is_selected_filtered_and_ordered(
    local: Local, project: UUID, query: str, expected: list[dict[str, object]]
) -> None:
    arguments = await three(local, project)
    assert (await local.http.post(f"{RPC}?{query}", json=arguments)).json() == expected
    got = await local.http.get(f"{RPC}?project_uuid={project}&{query}")
    assert got.json() == expected, "by GET, what is no argument is a filter"


async def test_rows_are_counted_when_asked(local: Local, project: UUID) -> None:
    arguments = await three(local, project)
    for ask, expected in (({"prefer": "count=exact"}, "1-1/3"), ({}, "1-1/*")):
        answer = await local.http.post(f"{RPC}?limit=1&offset=1", json=arguments, headers=ask)
        assert answer.headers["content-range"] == expected
    table = f"/rest/v1/project_files_current?project_id=eq.{project}&file_type=eq.typescript"
    answer = await local.http.head(table, headers={"prefer": "count=exact"})
    assert (answer.status_code, answer.headers["content-range"], answer.content) == (200, "0-1/2", b"")
    part = await local.http.get(f"{table}&limit=1", headers={"prefer": "count=exact"})
    assert (part.status_code, part.headers["content-range"]) == (206, "0-0/2")
    none = await local.http.get(f"{table}&version=gt.9", headers={"prefer": "count=exact"})
    assert (none.status_code, none.headers["content-range"]) == (200, "*/0")


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("or=(version.eq.1,version.eq.2)", "or"), ("select=a(b)", "a(b)"), ("version=not.eq.1", "not.eq.1"),
        ("limit=-1", "limit"), ("limit=9999999999999999999999", "limit"), ("order=a;b", "a;b"),
    ],
)  # fmt: skip
async def test_what_is_not_served_is_refused_by_its_name(
    local: Local, project: UUID, query: str, name: str
) -> None:
    arguments = await three(local, project)
    for answer in (
        await local.http.post(f"{RPC}?{query}", json=arguments),
        await local.http.get(f"/rest/v1/project_files_current?{query}"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (400, "PGRST100")
        assert name in answer.json()["message"]


async def test_a_value_is_no_table(local: Local, project: UUID) -> None:
    """Ignored, a `limit` here would be an answer to another question."""
    save = {"project_uuid": str(project), "p_file_path": "a", "p_content": "x"}
    for query in ("select=version", "limit=1", "version=eq.1", "order=version"):
        answer = await local.http.post(f"/rest/v1/rpc/upsert_project_file?{query}", json=save)
        assert (answer.status_code, answer.json()["code"]) == (400, "PGRST100")
        assert query.partition("=")[0] in answer.json()["message"]
    assert await local.sql("select count(*) from public.project_files") == [(0,)], "nothing was done"


@pytest.mark.parametrize(
    ("method", "at"),
    [("POST", "rest/v1/projects"), ("PATCH", "rest/v1/projects"), ("DELETE", "rest/v1/projects"),
     ("GET", "rest/v1/"), ("POST", "functions/v1/hello"), ("POST", "graphql/v1")],
)  # fmt: skip
async def test_what_is_not_served_says_its_name(local: Local, method: str, at: str) -> None:
    answer = await local.http.request(method, f"/{at}")
    assert answer.status_code == 501
    assert f"{method} /{at}" in answer.json()["message"]
