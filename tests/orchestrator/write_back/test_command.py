"""`preview-orchestrator write-back`: rules are set, shown and taken away, and what waits is listed."""

from __future__ import annotations

import json
import uuid

import pytest

from orchestrator_stub.write_back.presets import PRESETS, rules_of
from tests.database.db import connect, make_project, one, upsert
from tests.database.test_write_back import change, offer, session_of
from tests.orchestrator.snapshots.test_history import printed, run


def test_a_preset_is_set_shown_and_taken_away(database: str) -> None:
    with connect(database) as db:
        project = make_project(db)
        own = str(project.id)
        assert printed(database, own, command="write-back")[0].startswith("write-back is off")
        lines = printed(database, own, "--preset", "lock", "--authored", "src/**", command="write-back")
        assert lines[0] == "authored   up to 1048576 bytes  src/**"
        assert len(lines) == 1 + len(PRESETS["lock"])
        assert one(db, "select plain ->> 'write_back' from preview.run_settings") == "true"
        session = session_of(db, project)
        answer = offer(db, session, change("src/a.ts", "new"))
        [line] = [line for line in printed(database, own, command="write-back") if "proposal" in line]
        assert line == f"proposal   {answer['results'][0]['kept_id']}  3 bytes  src/a.ts"
        rules = json.loads(printed(database, own, "--json", command="write-back")[0])
        assert rules[0] == {"glob": "src/**", "mode": "authored", "max_bytes": 1048576, "deletes": False}
        assert printed(database, own, "--off", command="write-back")[0].startswith("write-back is off")
        assert one(db, "select plain ->> 'write_back' from preview.run_settings") == "false"


def test_what_waits_is_shown_taken_and_dropped(database: str) -> None:
    with connect(database) as db:
        project = make_project(db)
        own = str(project.id)
        printed(database, own, "--generated", "gen/**", "--authored", "src/**", command="write-back")
        session = session_of(db, project)
        for path in ("gen/a", "gen/b", "src/c", "src/d"):
            upsert(db, project.id, path, "a person's")
        changes = [change(path, "a tool's", 0) for path in ("gen/a", "gen/b", "src/c", "src/d")]
        a, b, c, d = (each["kept_id"] for each in offer(db, session, *changes)["results"])

        def say(*options: str) -> str:
            return "\n".join(printed(database, own, *options, command="write-back"))

        assert "--take ID" in say()
        assert [say("--show", kept) for kept in (a, c)] == ["a tool's", "a tool's"]
        assert say("--drop", b) == "gen/b: the tool's was dropped"
        assert say("--drop", d) == "src/d: the tool's was dropped"
        assert say("--take", a).startswith("gen/a: the tool's was taken in revision ")
        refused = run("write-back", "--database-url", database, own, "--take", c)
        assert (refused.returncode, "src/c" in refused.stderr) == (1, True), "it changed since"
        assert say("--take", c, "--force").startswith("src/c: the tool's was taken in revision ")
        assert "--take ID" not in say()
        assert say("--show", a) == f"nothing waits under {a}"
        rows = db.execute("select file_path, content from public.project_files_current order by 1").fetchall()
    assert [content for _, content in rows] == ["a tool's", "a person's", "a tool's", "a person's"]


def test_what_cannot_be_set_is_said(database: str) -> None:
    with connect(database) as db:
        own = str(make_project(db).id)
    refused = run("write-back", "--database-url", database, own, "--generated", "src/{a,b}")
    assert (refused.returncode, "braces" in refused.stderr) == (1, True)
    unknown = run("write-back", "--database-url", database, str(uuid.uuid4()), "--preset", "lock")
    assert (unknown.returncode, "no such project" in unknown.stderr) == (1, True)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_rules_that_the_database_takes(database: str, name: str) -> None:
    with connect(database) as db:
        project = make_project(db)
        one(db, "select set_write_back(%s, %s::jsonb)", [project.id, json.dumps(rules_of([name]))])


def test_all_presets_together_fit(database: str) -> None:
    with connect(database) as db:
        rules = rules_of(PRESETS)
        one(db, "select set_write_back(%s, %s::jsonb)", [make_project(db).id, json.dumps(rules)])
    globs = [str(rule["glob"]) for rule in rules]
    assert not [glob for glob in globs if glob.endswith(("package.json", ".npmrc", "*.json"))]
