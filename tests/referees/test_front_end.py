"""examples/front-end, run as it stands against the stand-in and a control plane: supabase-js and supabase-py."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from orchestrator_stub.local_supabase.auth import hash_password
from orchestrator_stub.machines.driver import MachineSpec
from tests.database.db import connect
from tests.referees.clients import NODE
from tests.system.plane import Plane, eventually, running_plane

EXAMPLES = Path(__file__).parents[2] / "examples" / "front-end"
TSC = (
    "--strict",
    "--skipLibCheck",
    "--target",
    "es2022",
    "--module",
    "nodenext",
    "--lib",
    "es2022,dom,dom.asynciterable",
)
PASSWORD = "the local user's"


def compiled(home: Path) -> list[str]:
    """editor.ts, type-checked against the client's own types."""
    (home / "package.json").write_text('{"type": "module"}')
    (home / "node_modules").symlink_to(NODE / "node_modules")
    return ["node", str(NODE / "node_modules" / "typescript" / "bin" / "tsc"), *TSC, "editor.ts"]


async def serve_the_session(plane: Plane) -> None:
    """The machine's part: it says that it serves."""

    async def made() -> list[MachineSpec]:
        return list(plane.driver.made.values())

    [spec] = await eventually("a machine is made", made, 60)
    answer = await plane.http.put(
        f"/v1/sessions/{spec.session_id}/status",
        json={"state": "serving", "revision": 0},
        headers={"authorization": f"Bearer {spec.env['REALTIME_TOKEN']}"},
    )
    assert answer.is_success, answer.text


async def run(command: list[str], home: Path, environ: dict[str, str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, cwd=home, env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(120):
        said, complained = await process.communicate()
    assert process.returncode == 0, (said + complained).decode()
    return said.decode()


@pytest.mark.parametrize("language", ["supabase-js", "supabase-py"])
async def test_an_editor_does_all_that_the_guide_says(
    database: str, tmp_path: Path, packages: None, language: str
) -> None:
    home = tmp_path / "home"
    shutil.copytree(EXAMPLES, home)
    user, email = uuid4(), f"{uuid4().hex[:8]}@example.com"
    with connect(database) as db:
        made = "insert into auth.users (id, email, encrypted_password) values (%s, %s, %s)"
        db.execute(made, [user, email, hash_password(PASSWORD)])
        db.execute("insert into public.user_profiles (id) values (%s)", [user])
        row = db.execute(
            "insert into public.projects (owner_id) values (%s) returning id::text", [user]
        ).fetchone()
        assert row is not None
        project = row[0]
        async with running_plane(database, tmp_path, create_wait=0) as plane, asyncio.TaskGroup() as tasks:
            tasks.create_task(serve_the_session(plane))
            environ = {
                "PATH": str(Path(shutil.which("node") or "node").parent),
                "SUPABASE_URL": plane.url, "SUPABASE_ANON_KEY": plane.keys.anon_key,
                "EMAIL": email, "PASSWORD": PASSWORD, "PROJECT_ID": project,
            }  # fmt: skip
            if language == "supabase-js":
                await run(compiled(home), home, environ)
                said = await run(["node", "walk.mjs"], home, environ)
            else:
                said = await run([sys.executable, "walk.py"], home, environ)
        assert json.loads(said) == {
            "saved": 1, "merged": 2, "asked": ["one\n"], "many": 4, "binary": 6, "restored": 3, "turn": 2,
            "session": project,
        }  # fmt: skip
        files = db.execute(
            "select file_path, content from public.project_files_current where project_id = %s", [project]
        ).fetchall()
        assert dict(files) == {
            "src/b.ts": "one\nmine\n", "src/c.ts": "c\n", "logo.png": None, "icon.png": None,
            "src/Page.tsx": "page\n", "src/Part.tsx": "part\n",
        }  # fmt: skip
        events = db.execute(
            "select event, count(*) from realtime.messages where topic = %s group by 1",
            [f"project:{project}"],
        ).fetchall()
        assert dict(events) == {"file:update": 4, "file:delete": 1, "bulk:apply": 5}
