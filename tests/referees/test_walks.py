"""Official clients do what their documentation shows; docs/stand-in.md has the numbers of this run."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator_stub.local_supabase.auth import hash_password
from tests.fakes.serving import Local
from tests.referees.clients import NODE

pytestmark = pytest.mark.asyncio(loop_scope="module")

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "stand-in.md"
NOT_SERVED = {
    "supabase-js": {
        "storage transform", "storage purgeCache", "storage getBucketLifecycle", "auth signUp", "auth signInWithOtp",
        "auth updateUser", "rest insert", "rest update", "rest delete", "functions invoke",
    },
    "supabase-py": {"storage transform", "auth sign_up", "rest insert"},
}  # fmt: skip
"""Methods whose walk is that they are refused by name."""


def part_of(method: str) -> str:
    return method.partition(" ")[0].replace("functions", "rest")


async def walk(local: Local, command: list[str]) -> dict[str, str | None]:
    """Method → why it failed."""
    user, email = str(uuid4()), f"{uuid4().hex[:8]}@example.com"
    made = "insert into auth.users (id, email, encrypted_password) values (%s, %s, %s)"
    await local.sql(made, user, email, hash_password("secret"))
    await local.sql("insert into public.user_profiles (id) values (%s)", user)
    [[project]] = await local.sql(
        "insert into public.projects (owner_id) values (%s) returning id::text", user
    )
    process = await asyncio.create_subprocess_exec(
        *command, local.url, local.keys.anon_key, local.keys.service_key, email, "secret", project,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(120):
        said, _ = await process.communicate()
    assert process.returncode == 0
    return {line["method"]: line["failure"] for line in map(json.loads, said.splitlines())}


@pytest.mark.parametrize("client", ["supabase-js", "supabase-py"])
async def test_a_walk_through_the_documentation(local: Local, packages: None, client: str) -> None:
    script = (
        [sys.executable, str(HERE / "walk.py")]
        if client == "supabase-py"
        else ["node", str(NODE / "walk.mjs")]
    )
    outcome = await walk(local, script)
    assert {method: failure for method, failure in outcome.items() if failure} == {}
    assert NOT_SERVED[client] <= set(outcome)
    served = Counter(part_of(method) for method in outcome if method not in NOT_SERVED[client])
    refused = Counter(map(part_of, NOT_SERVED[client]))
    row = re.search(rf"^\| `{client}` .*$", PAGE.read_text(), re.MULTILINE)
    cells = [f"{served[part]} of {served[part] + refused[part]}" for part in ("storage", "auth", "rest")]
    assert row is not None
    assert [cell.strip() for cell in row[0].split("|")[2:-1]] == cells
