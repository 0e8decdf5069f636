"""The examples of turns, run as they stand against the stand-in, by the official clients of JavaScript and Python."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.fakes.serving import Local
from tests.referees.clients import NODE

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.parametrize("language", ["supabase-js", "supabase-py"]),
]

EXAMPLES = Path(__file__).parents[2] / "examples" / "turns"


class Writer:
    """Runs scenarios as a member of a new project."""

    def __init__(self, local: Local, language: str, home: Path) -> None:
        self.local = local
        self.home = home
        self.command = (
            [shutil.which("node") or "node", "scenarios.mjs"]
            if language == "supabase-js"
            else [sys.executable, "scenarios.py"]
        )
        for path in EXAMPLES.iterdir():
            if path.is_file():
                shutil.copy(path, home)
        (home / "node_modules").symlink_to(NODE / "node_modules")

    async def make_project(self) -> None:
        owner = str(uuid4())
        await self.local.sql(
            "insert into auth.users (id, email) values (%s, %s)", owner, f"{owner}@example.com"
        )
        await self.local.sql("insert into public.user_profiles (id) values (%s)", owner)
        rows = await self.local.sql(
            "insert into public.projects (owner_id) values (%s) returning id::text", owner
        )
        self.project = rows[0][0]
        self.environ = {
            "PATH": str(Path(self.command[0]).parent),
            "SUPABASE_URL": self.local.url,
            "SUPABASE_ANON_KEY": self.local.keys.anon_key,
            "ACCESS_TOKEN": self.local.token("authenticated", sub=owner),
            "PROJECT_ID": self.project,
        }

    async def start(self, *scenario: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *self.command, *scenario, cwd=self.home, env=self.environ, stdout=asyncio.subprocess.PIPE
        )

    async def run(self, *scenario: str) -> dict[str, Any]:
        process = await self.start(*scenario)
        async with asyncio.timeout(60):
            said, _ = await process.communicate()
        assert process.returncode == 0, said
        answer: dict[str, Any] = json.loads(said)
        return answer

    async def files(self) -> dict[str, str]:
        query = "select file_path, content from project_files_current where project_id = %s"
        return dict(await self.local.sql(query, self.project))

    async def said(self) -> list[tuple[str, str | None, str | None, int]]:
        """Each message: the event, the turn, the label and how many files."""
        return await self.local.sql(
            "select event, payload ->> 'turn', payload ->> 'label', coalesce(jsonb_array_length(payload -> 'files'), 1)"
            " from realtime.messages where topic = %s order by (payload ->> 'revision')::int",
            f"project:{self.project}",
        )


@pytest.fixture
def writer(local: Local, packages: None, tmp_path: Path, language: str) -> Writer:
    return Writer(local, language, tmp_path)


async def test_forty_files_and_a_deletion_are_one_message(writer: Writer) -> None:
    await writer.make_project()
    answer = await writer.run("forty")
    assert (answer["revision"], answer["changed"]) == (2, 41)
    assert await writer.said() == [
        ("file:update", None, None, 1),
        ("bulk:apply", answer["turn"], "A landing page", 41),
    ]
    assert set(await writer.files()) == {"src/Page.tsx", *(f"src/parts/{n}.tsx" for n in range(1, 40))}


async def test_a_person_in_the_middle_is_merged_with(writer: Writer) -> None:
    await writer.make_project()
    answer = await writer.run("conflict")
    assert (answer["revision"], answer["asked"]) == (3, ["src/Page.tsx"])
    assert await writer.files() == {"src/Page.tsx": "line 0\nline 1\nline 2\n", "src/New.tsx": "new\n"}


async def test_a_writer_that_dies_is_resumed_by_another(writer: Writer) -> None:
    await writer.make_project()
    process = await writer.start("die")
    assert process.stdout is not None
    async with asyncio.timeout(60):
        turn = json.loads(await process.stdout.readline())["turn"]
    process.kill()
    await process.wait()
    assert await writer.files() == {}
    answer = await writer.run("resume", turn)
    assert answer == {"turn": turn, "found": 20, "revision": 1, "changed": 40}
    assert await writer.said() == [("bulk:apply", turn, "In two halves", 40)]


async def test_two_turns_at_once_are_two_revisions(writer: Writer) -> None:
    await writer.make_project()
    answer = await writer.run("two")
    assert sorted(turn["revision"] for turn in answer["ended"]) == [1, 2]
    assert {turn for _, turn, _, _ in await writer.said()} == {turn["turn"] for turn in answer["ended"]}
    assert len(await writer.files()) == 20
