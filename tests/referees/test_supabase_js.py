"""The official JavaScript client's other two doors, RPC and storage, against the stand-in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest
import pytest_asyncio

from tests.fakes.serving import Local
from tests.referees.clients import SupabaseJs

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUCKET = "project-snapshots"


@pytest_asyncio.fixture(loop_scope="module")
async def client(local: Local, packages: None) -> AsyncIterator[SupabaseJs]:
    running = SupabaseJs(local)
    await running.start()
    await running.command("auth", token=local.keys.service_key)
    yield running
    await running.stop()


async def test_rpc_and_select(local: Local, client: SupabaseJs) -> None:
    owner = uuid4()
    await local.sql("insert into auth.users (id, email) values (%s, %s)", owner, f"{owner}@example.com")
    await local.sql("insert into public.user_profiles (id) values (%s)", owner)
    rows = await local.sql("insert into public.projects (owner_id) values (%s) returning id::text", owner)
    project = rows[0][0]
    await client.command("auth", token=local.token("authenticated", sub=str(owner)))

    async def save(content: str, expected: int | None) -> dict[str, object]:
        args = {
            "project_uuid": project,
            "p_file_path": "src/a.ts",
            "p_content": content,
            "p_file_type": "typescript",
        }
        answer: dict[str, object] = await client.command(
            "rpc", name="upsert_project_file", args={**args, "expected_version": expected}
        )
        return answer

    first = await save("one", None)
    assert first["status"] == 200
    assert first["error"] is None
    late = await save("two", 7)
    assert late["status"] == 409
    assert isinstance(late["error"], dict)
    assert late["error"]["code"] == "PT409"
    assert late["error"]["details"]
    listed = await client.command("rpc", name="list_current_files", args={"project_uuid": project})
    assert [(f["file_path"], f["version"]) for f in listed["data"]] == [("src/a.ts", 1)]
    selected = await client.command(
        "select",
        **{
            "from": "project_files_current",
            "columns": "file_path,version",
            "filter": {"project_id": project},
        },
    )
    assert selected == {"data": [{"file_path": "src/a.ts", "version": 1}], "error": None}
    gone = await client.command(
        "rpc", name="delete_project_file", args={"project_uuid": project, "p_file_path": "src/a.ts"}
    )
    assert gone["status"] == 200


async def test_storage(local: Local, client: SupabaseJs) -> None:
    at = {"bucket": BUCKET, "path": "p/1.txt"}
    up = await client.command("upload", **at, text="hello", upsert=False)
    assert up["error"] is None
    assert up["data"]["path"] == "p/1.txt"
    again = await client.command("upload", **at, text="other", upsert=False)
    assert again["error"] == {"message": "The resource already exists", "statusCode": "409"}
    assert (await client.command("upload", **at, text="other", upsert=True))["error"] is None
    assert await client.command("download", **at) == {"text": "other", "error": None}
    signed = await client.command("sign", **at, seconds=60)
    async with httpx.AsyncClient() as nobody:
        assert (await nobody.get(signed["data"]["signedUrl"])).text == "other"
    missing = await client.command("sign", bucket=BUCKET, path="nothing", seconds=60)
    assert missing["error"] == {"message": "Object not found", "statusCode": "404"}
    assert await client.command("list", bucket=BUCKET, path="p") == {"data": ["1.txt"], "error": None}
    assert (await client.command("remove", bucket=BUCKET, paths=["p/1.txt"]))["data"] == ["p/1.txt"]
    assert (await client.command("download", **at))["text"] is None
