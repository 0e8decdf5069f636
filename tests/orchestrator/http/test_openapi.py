"""Schemathesis against the running service, over the document it serves itself: every check it has, every phase.

Two runs, for the two kinds of caller: the agent's calls always name its own session, which nobody ends meanwhile; the
product's calls make, list and end sessions of a project that exists, in sequences that Schemathesis finds itself.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.system.plane import running_plane

AGENT = "sessions/[^/]+/(run|sync|token|status)$"

CONFIG = """
continue-on-failure = true
[generation]
database = "none"
[auth.openapi.service]
bearer = "{service}"
[auth.openapi.session]
bearer = "{session}"
[parameters]
{parameters}
[[operations]]
include-path-regex = "/projects/|/v1/sessions$"
[operations.checks]
# A command has to be words of a shell, a root a path that a project may have: no schema says that.
positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 403, 404, 409, 410, 413, 503]
[checks]
# 410: over for good, which no change to the request would help.
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 410, 413, 415]
positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 410, 503]
"""


@pytest.mark.parametrize("caller", ["agent", "product"])
@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.nightly)])
async def test_the_service_is_what_its_document_says(
    database: str, tmp_path: Path, caller: str, long: bool
) -> None:
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"src/a.ts": "a\n", "src/b.ts": "b\n"})
        answer = await plane.http.post("/v1/sessions", json={"project_id": str(project.id)})
        session_id = answer.json()["session_id"]
        parameters = (
            {"path.session_id": session_id}
            if caller == "agent"
            # Nobody waits for what is never shown.
            else {
                "body.project_id": str(project.id),
                "path.project_id": str(project.id),
                "query.wait": "0",
            }
        )
        config = tmp_path / "schemathesis.toml"
        config.write_text(
            CONFIG.format(
                service=plane.keys.service_key,
                session=plane.driver.made[answer.json()["machine"]["id"]].env["REALTIME_TOKEN"],
                parameters="\n".join(f'"{name}" = "{value}"' for name, value in parameters.items()),
            )
        )
        code, said = await schemathesis(
            tmp_path,
            *("--config-file", str(config), "run", f"{plane.url}/openapi.json", "--no-color"),
            # Ending a session twice, and looking at one that has ended, are answered on purpose.
            *("--checks", "all", "--exclude-checks", "use_after_free"),
            *("--include-path-regex" if caller == "agent" else "--exclude-path-regex", AGENT),
            *("--max-examples", "500" if long else "10", *([] if long else ["--generation-deterministic"])),
        )
        assert code == 0, said
        print(said)


async def schemathesis(directory: Path, *arguments: str) -> tuple[int, str]:
    """One run of its command line, which keeps what it finds below `directory`; the exit code and what it said."""
    process = await asyncio.create_subprocess_exec(
        str(Path(sys.executable).with_name("schemathesis")),
        *arguments,
        cwd=directory,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()
