"""History that does not grow: superseded contents become splices, and whatever reads them reads what was written."""

from __future__ import annotations

import random
import uuid
from typing import Any

import psycopg
import pytest

from tests.database.db import Project, apply, connect, delete, head, make_project, one, upsert, user
from tests.database.test_splices import spliced
from tests.database.test_time_travel import Tree, checkpoint, diff, refused, restore, tree
from tests.database.test_writing import sha
from tests.profiles import NIGHTLY

Db = psycopg.Connection[Any]

PATHS = ["a.ts", "src/b.ts", "src/é.ts"]
LINES = [f"  'é{n:04}-\N{GRINNING FACE}': compute({n * 7919 % 1009}),\n" for n in range(500)]


def text(lines: int = 500) -> str:
    return "".join(LINES[:lines])


def edited(before: str, dice: random.Random) -> str:
    """One of what people do: a few characters, a line more, a line less, all anew."""
    at, kind = dice.randrange(len(before) + 1), dice.random()
    if kind < 0.1:
        return "".join(dice.choices(LINES, k=dice.randrange(60)))
    cut = dice.choice([0, 0, 1, 30])
    return before[:at] + dice.choice(["x", "\N{SNOWMAN}", dice.choice(LINES), ""]) + before[at + cut :]


def due(db: Db) -> None:
    """All projects are to be looked through, whatever their age."""
    db.execute("update preview.settings set compact_after = '0'")
    db.execute(
        "insert into preview.compactions (project_id) select project_id from project_heads"
        " on conflict (project_id) do update set due_at = '-infinity'"
    )


def compact(db: Db, most: int = 500) -> int:
    """Contents that became splices until nothing was due."""
    due(db)
    contents = 0
    while done := one(db, "select preview.compact(%s)", [most]):
        contents += done["contents"]
    return contents


def whole(db: Db, project: uuid.UUID, path: str) -> list[int]:
    """Versions whose content is kept as it is."""
    rows = db.execute(
        "select version from project_files where project_id = %s and file_path = %s and content is not null"
        " order by version",
        [project, path],
    )
    return [version for (version,) in rows]


def version(db: Db, project: uuid.UUID, path: str, number: int) -> dict[str, Any]:
    found: dict[str, Any] = one(db, "select public.file_version(%s, %s, %s)", [project, path, number])
    return found


@pytest.mark.parametrize("seed", range(20 if NIGHTLY else 2))
def test_everything_reads_what_was_written(db: Db, project: Project, seed: int) -> None:
    """A model keeps each tree and version; splices are made, history is forgotten and brought back in between."""
    dice = random.Random(seed)
    db.execute(
        "update preview.settings set whole_every = %s, patch_above_bytes = 100", [dice.choice([2, 7, 200])]
    )
    versions: dict[tuple[str, int], str] = {}
    trees: dict[int, Tree] = {0: {}}
    named: set[int] = set()

    def note(changed: dict[str, Any]) -> None:
        now = tree(db, project.id)
        trees[changed["revision"]] = now
        for file in changed["files"]:
            if not file["is_deleted"]:
                versions[file["file_path"], file["version"]] = now[file["file_path"]][0]

    for round_ in range(120):
        now = trees[max(trees)]
        changes: list[dict[str, Any]] = []
        for path in dice.sample(PATHS, dice.randint(1, 2)):
            if path in now and dice.random() < 0.1:
                changes.append({"action": "delete", "file_path": path})
            else:
                before = now[path][0] if path in now else text(40)
                changes.append({"file_path": path, "content": edited(before, dice)})
        note(apply(db, project.id, changes))
        if dice.random() < 0.1:
            compact(db, dice.choice([1, 3, 500]))
        if dice.random() < 0.05:
            note(restore(db, project.id, dice.choice([r for r in trees if r])))
        if dice.random() < 0.1:
            named.add(checkpoint(db, project.id, f"{round_}")["revision"])
    assert compact(db) + one(db, "select count(*) from project_files where splices is not null") > 20
    epoch, revision = head(db, project.id)

    for (path, number), content in versions.items():
        assert version(db, project.id, path, number)["content"] == content, (path, number)
    for start in dice.sample(sorted(trees), 20):
        answer = one(
            db, "select changes_since(%s, %s, %s, p_accept => array['splices'])", [project.id, epoch, start]
        )
        for change in answer.get("changes", []):
            if "splices" in change:
                base = trees[start][change["file_path"]][0]
                assert sha(base) == change["base_hash"]
                assert sha(spliced(base, change["splices"])) == change["content_hash"]
        assert isinstance(diff(db, project.id, start), str)

    # What stays of a history that is forgotten is made whole before what it was made of goes.
    db.execute("update project_files set updated_at = updated_at - interval '2 days'")
    for most in (2, 7, None):
        one(db, "select preview.forget(%s, '1 hour', %s, %s)", [project.id, dice.choice([0, 1, 9]), most])
        compact(db, 3)
    rows = db.execute("select file_path, version from project_files where not is_deleted").fetchall()
    assert 0 < len(rows) < len(versions)
    for path, number in rows:
        assert version(db, project.id, path, number)["content"] == versions[path, number], (path, number)
    for wanted in sorted(named):
        with db.transaction(force_rollback=True):
            restore(db, project.id, wanted)
            assert tree(db, project.id) == trees[wanted]
    assert one(db, "select count(*) from project_files where splices is not null and is_current_version") == 0
    assert head(db, project.id) == (epoch, revision)


def test_every_so_many_stay_whole_and_what_is_not_worth_it(db: Db, project: Project) -> None:
    db.execute("update preview.settings set whole_every = 4")
    for number in range(1, 11):
        upsert(db, project.id, "a", f"// {number}\n{text()}")
    upsert(db, project.id, "a", "something else altogether")
    upsert(db, project.id, "a", f"// 12\n{text()}")
    delete(db, project.id, "a")
    upsert(db, project.id, "a", "14")
    assert compact(db) == 7
    # 10 is before a rewrite and was larger than it, 11 and 12 have nothing to be made of.
    assert whole(db, project.id, "a") == [4, 8, 10, 11, 12, 14]
    assert compact(db) == 0, "nothing is looked at twice"
    assert version(db, project.id, "a", 13)["is_deleted"] is True
    restored = one(db, "select restore_project_file(%s, 'a', 2)", [project.id])
    assert (restored["version"], restored["content_hash"]) == (15, sha(f"// 2\n{text()}"))


def test_only_what_is_old_enough_and_the_rest_later(db: Db, project: Project) -> None:
    due(db)
    for number in range(3):
        upsert(db, project.id, "a", f"// {number}\n{text()}")
    db.execute("update preview.settings set compact_after = '1 hour'")
    assert one(db, "select preview.compact()")["contents"] == 0
    assert one(db, "select preview.compact()") is None, "not due"
    waits = "select due_at > now() + interval '59 minutes' and due_at < 'infinity' from preview.compactions"
    assert one(db, waits) is True
    db.execute("update project_files set created_at = created_at - interval '2 hours'")
    db.execute("update project_heads set updated_at = updated_at - interval '2 hours'")
    db.execute("update preview.compactions set due_at = now()")
    assert one(db, "select preview.compact()")["contents"] == 2
    assert one(db, "select preview.compact()") is None
    assert one(db, "select isfinite(due_at) from preview.compactions") is False, "until its next upkeep"
    db.execute("update preview.settings set compact_after = null")
    db.execute("update preview.compactions set due_at = now()")
    assert one(db, "select preview.compact()") is None, "never"


def test_upkeep_makes_a_project_due(db: Db, project: Project) -> None:
    for number in range(3):
        upsert(db, project.id, "a", f"// {number}\n{text()}")
    db.execute("update preview.settings set compact_after = '0'")
    assert one(db, "select preview.compact()") is None
    db.execute("update project_heads set kept_up_at = '-infinity'")
    one(db, "select preview.keep_up()")
    assert one(db, "select preview.compact()")["contents"] == 2


def test_a_content_is_dropped_only_for_splices_that_give_it_back(db: Db, project: Project) -> None:
    before, after = text(), f"// new\n{text()}"
    found = one(db, "select preview.reverse_splices(%s, %s, %s)", [after, before, sha(before)])
    assert found == '[[0, 7, ""]]'
    assert one(db, "select preview.reverse_splices(%s, %s, %s)", [after, before, sha(after)]) is None
    upsert(db, project.id, "a", before)
    upsert(db, project.id, "a", after)
    db.execute("update project_files set content_hash = repeat('0', 64) where version = 1")
    assert compact(db) == 0
    assert whole(db, project.id, "a") == [1, 2]


def test_what_does_not_have_its_hash_any_more_is_an_error(db: Db, project: Project) -> None:
    for number in range(4):
        upsert(db, project.id, "a", f"// {number}\n{text()}")
    compact(db)
    db.execute("delete from project_files where version = 2")
    refused(db, "XX001", lambda: version(db, project.id, "a", 1), "version 1")
    assert version(db, project.id, "a", 3)["content"].startswith("// 2\n")
    refused(db, "PT404", lambda: version(db, project.id, "a", 2), "no such version")


def test_nobody_waits(db: Db, database: str, project: Project) -> None:
    for number in range(4):
        upsert(db, project.id, "a", f"// {number}\n{text()}")
    due(db)
    with connect(database) as other:
        for each in (db, other):
            each.execute("set lock_timeout = '200ms'")
        with other.transaction():
            upsert(other, project.id, "a", f"// 5\n{text()}")
            assert one(db, "select preview.compact()")["contents"] == 3, "a writer is not in the way"
        due(db)
        with other.transaction():
            assert one(other, "select preview.compact()")["contents"] == 1
            assert upsert(db, project.id, "a", "6")["version"] == 6
            assert one(db, "select preview.compact()") is None, "another project, or nothing"
            db.execute("update project_heads set kept_up_at = '-infinity'")
            assert one(db, "select preview.keep_up()")["versions"] == 0
            late = "select kept_up_at = '-infinity' from project_heads where project_id = %s"
            assert one(db, late, [project.id]) is True, "it stays due"
        for each in (db, other):
            each.execute("reset lock_timeout")


def test_a_version_that_somebody_holds_stays_whole(db: Db, database: str, project: Project) -> None:
    """Whoever deletes the project holds its versions, and will want the row that is held here."""
    for number in range(4):
        upsert(db, project.id, "a", f"// {number}\n{text()}")
    due(db)
    with connect(database) as other, other.transaction():
        other.execute("select from project_files where version = 1 for update")
        db.execute("set lock_timeout = '200ms'")
        assert one(db, "select preview.compact()")["contents"] == 2
    assert whole(db, project.id, "a") == [1, 4]


def test_members_read_old_versions_and_strangers_do_not(db: Db, project: Project) -> None:
    for number in range(3):
        upsert(db, project.id, "a", f"// {number}\n{text()}")
    compact(db)
    with user(db, project.collaborator):
        assert version(db, project.id, "a", 1)["content"] == f"// 0\n{text()}"
        assert restore(db, project.id, 1)["changed"] == 1
    refused(db, "PT400", lambda: one(db, "select file_version(%s, null, 1)", [project.id]), "p_file_path")
    other = make_project(db)
    with pytest.raises(psycopg.Error) as error, user(db, other.owner):
        version(db, project.id, "a", 1)
    assert error.value.sqlstate == "PT404"


def test_ten_thousand_versions_take_four_megabytes(db: Db, project: Project) -> None:
    """Of a file of 20 KB. Fewer where tests are to be short; measured without free space, which later rows use."""
    count = 10_000 if NIGHTLY else 400
    db.execute("update preview.settings set writes_per_minute = 1000000000")
    dice, content = (
        random.Random(1),
        "".join(f"export const value{n} = compute({n * 7919 % 1000});\n" for n in range(480)),
    )
    assert 18_000 < len(content) < 22_000
    for number in range(count):
        at = dice.randrange(len(content))
        content = content[:at] + "x" + content[at + dice.randrange(2) :]
        upsert(db, project.id, "src/page.tsx", content)
        if number % 1000 == 999:
            compact(db)
    compact(db)
    db.execute("vacuum full project_files")
    size = one(db, "select pg_table_size('project_files')")
    assert size <= 4_000_000 * count / 10_000 + 200_000 * (count < 10_000), size
    assert version(db, project.id, "src/page.tsx", 1)["content_hash"] is not None
