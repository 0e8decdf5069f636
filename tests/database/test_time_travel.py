"""Time travel: any revision is what it was, brought back in one commit, told as a diff, and kept by checkpoints."""

from __future__ import annotations

import random
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.database.db import (
    Json,
    Project,
    acting_as,
    apply,
    begin,
    changes_since,
    connect,
    delete,
    end,
    files,
    hash_of,
    head,
    make_project,
    messages,
    one,
    upsert,
    user,
)
from tests.database.test_writing import sha
from tests.profiles import NIGHTLY, examples

Db = psycopg.Connection[Any]
Tree = dict[str, tuple[str, bool]]
"""Path → content, executable."""

PATHS = ["a.ts", "b.ts", "src/c.ts", "src/d e.ts", "src/é/f.ts", "g"]
IN_THE_WAY = {"g": "g/h.ts", "g/h.ts": "g"}


def refused(db: Db, sqlstate: str, call: Callable[[], object], names: str) -> None:
    """The call is refused with this SQLSTATE, says why, and leaves the connection as it was."""
    with pytest.raises(psycopg.Error) as error, db.transaction():
        call()
    assert (error.value.sqlstate, names in (error.value.diag.message_primary or "")) == (sqlstate, True), (
        error.value
    )


def restore(db: Db, project: uuid.UUID, revision: int | None, correlation: str | None = None) -> Json:
    answer: Json = one(db, "select public.restore_project(%s, %s, %s)", [project, revision, correlation])
    return answer


def checkpoint(db: Db, project: uuid.UUID, name: str | None) -> Json:
    answer: Json = one(db, "select public.create_checkpoint(%s, %s)", [project, name])
    return answer


def checkpoints(db: Db, project: uuid.UUID) -> list[tuple[str | None, int, bool]]:
    query = "select name, revision, automatic from public.list_checkpoints(%s)"
    return db.execute(query.encode(), [project]).fetchall()


def diff(db: Db, project: uuid.UUID, start: int | None, upto: int | None = None) -> str:
    return str(one(db, "select public.diff_project(%s, %s, %s)", [project, start, upto]))


def tree(db: Db, project: uuid.UUID) -> Tree:
    rows = db.execute(
        "select file_path, content, executable from public.project_files_current where project_id = %s",
        [project],
    )
    return {path: (content, executable) for path, content, executable in rows}


def edit_at_random(db: Db, project: uuid.UUID, dice: random.Random, now: Tree) -> Tree:
    """One commit of one to three files, of any kind; the tree after it."""
    after, changes = dict(now), []
    for path in dice.sample([*PATHS, "g/h.ts"], dice.randint(1, 3)):
        other = IN_THE_WAY.get(path)
        if path in after and dice.random() < 0.3:
            del after[path]
            changes.append({"action": "delete", "file_path": path})
        elif other not in after:
            text = f"{dice.randrange(30)}\n" * dice.choice([0, 1, 4]) + "a line\n" * dice.choice([0, 40])
            after[path] = (text, dice.random() < 0.2)
            changes.append({"file_path": path, "content": after[path][0], "executable": after[path][1]})
    apply(db, project, changes)
    return after


def test_any_revision_is_brought_back(db: Db, project: Project) -> None:
    """A model keeps every tree; what is restored is a revision as well, and can be restored itself."""
    dice = random.Random(0x7E57)
    db.execute("update preview.settings set writes_per_minute = 1000000")
    model: dict[int, Tree] = {}
    now: Tree = {}
    db.execute("update preview.settings set compact_after = '0'")
    db.execute("insert into preview.compactions (project_id) values (%s)", [project.id])
    for n in range(1200 if NIGHTLY else 150):
        now = edit_at_random(db, project.id, dice, now)
        model[head(db, project.id)[1]] = now
        if n % 60 == 59:  # most of what is brought back is kept as splices by then
            db.execute("update preview.compactions set due_at = now()")
            one(db, "select preview.compact()")
    assert one(db, "select count(*) from project_files where splices is not null") > n / 10
    for _ in range(1000 if NIGHTLY else 60):
        revision = dice.choice(sorted(model))
        answer = restore(db, project.id, revision)
        assert tree(db, project.id) == model[revision]
        same = answer["changed"] == 0
        assert answer["restored"] == revision
        model[answer["revision"]] = model[revision] if not same else model[answer["revision"]]
    assert one(db, "select public.project_tree_hash(%s)", [project.id]) == hash_of(files(db, project.id))
    first, *_ = model
    assert changes_since(db, project.id, head(db, project.id)[0], first)["kind"] == "changes"


def test_it_is_one_commit_like_any_other(db: Db, project: Project) -> None:
    with user(db, project.owner):
        upsert(db, project.id, "a.ts", "1")
        upsert(db, project.id, "b.ts", "1")
        upsert(db, project.id, "a.ts", "2")
        delete(db, project.id, "b.ts")
        upsert(db, project.id, "c.ts", "new")
    with user(db, project.collaborator):
        answer = restore(db, project.id, 2, "once")
        assert restore(db, project.id, 2, "once") == answer, "asked again, it is answered again"
    assert (answer["revision"], answer["changed"], answer["restored"]) == (6, 3, 2)
    assert files(db, project.id) == {"a.ts": sha("1"), "b.ts": sha("1")}
    event, payload = messages(db, project.id)[-1]
    assert (event, payload["revision"], payload["sender"]) == ("bulk:apply", 6, str(project.collaborator))
    assert [(f["action"], f["file_path"], f["version"]) for f in payload["files"]] == [
        ("update", "a.ts", 3),
        ("update", "b.ts", 3),
        ("delete", "c.ts", 2),
    ]
    assert restore(db, project.id, 6)["changed"] == 0
    assert head(db, project.id)[1] == 6, "what changes nothing is no revision"
    refused(db, "PT422", lambda: restore(db, project.id, 3, "once"), "correlation")


def test_what_cannot_be_brought_back_is_refused(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    upsert(db, project.id, "a", "2")
    for revision, state, word in (
        (3, "PT404", "at revision 2"),
        (0, "PT400", "1 or more"),
        (None, "PT400", "null"),
    ):
        refused(db, state, lambda revision=revision: restore(db, project.id, revision), word)
    refused(db, "PT404", lambda: restore(db, uuid.uuid4(), 1), "project_uuid")
    refused(db, "PT400", lambda: restore(db, project.id, 1, ""), "correlation")
    db.execute("update preview.settings set max_bulk_files = 1")
    apply(db, project.id, [{"file_path": "b", "content": "b"}])
    apply(db, project.id, [{"file_path": "c", "content": "c"}])
    refused(db, "PT413", lambda: restore(db, project.id, 1), "3 files")
    assert files(db, project.id).keys() == {"a", "b", "c"}


# --- checkpoints, and what is forgotten


def test_checkpoints_are_named_listed_and_removed(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    first = checkpoint(db, project.id, "before the redesign")
    assert first["revision"] == 1
    assert checkpoint(db, project.id, "before the redesign") == first, (
        "made again at the same revision, it is the same"
    )
    upsert(db, project.id, "a", "2")
    refused(db, "PT409", lambda: checkpoint(db, project.id, "before the redesign"), "revision 1")
    checkpoint(db, project.id, "é")
    assert checkpoints(db, project.id) == [("é", 2, False), ("before the redesign", 1, False)]
    removed = one(db, "select public.delete_checkpoint(%s, 'é')", [project.id])
    assert removed == {"name": "é", "deleted": True}
    assert one(db, "select public.delete_checkpoint(%s, 'é')", [project.id])["deleted"] is False
    for name in ("", "x" * 201, None):
        refused(db, "PT400", lambda name=name: checkpoint(db, project.id, name), "p_name")
    db.execute("update preview.settings set max_checkpoints = 1")
    refused(db, "PT413", lambda: checkpoint(db, project.id, "one more"), "at most 1")


def test_each_turns_end_is_a_checkpoint_and_the_last_fifty_stay(db: Db, project: Project) -> None:
    db.execute("update preview.settings set automatic_checkpoints = 3")
    for n in range(5):
        turn = begin(db, project.id, f"turn {n}")
        upsert(db, project.id, "a", str(n), turn=turn)
        end(db, project.id, turn)
        end(db, project.id, turn)
    checkpoint(db, project.id, "named")
    empty = begin(db, project.id)
    end(db, project.id, empty)
    found = db.execute(
        "select name, revision, label, turn_id is null from public.list_checkpoints(%s)", [project.id]
    ).fetchall()
    assert found[0][:2] == ("named", 5) or found[1][:2] == ("named", 5)
    assert sorted(f[1:] for f in found if f[0] is None) == [
        (3, "turn 2", False),
        (4, "turn 3", False),
        (5, "turn 4", False),
    ]
    assert one(db, "select automatic_checkpoints from preview.settings") == 3


@pytest.mark.parametrize("seed", range(20 if NIGHTLY else 3))
def test_what_a_checkpoint_needs_is_never_forgotten(db: Db, project: Project, seed: int) -> None:
    """Whatever is forgotten around it, in steps of any size; every other revision is right or refused."""
    dice = random.Random(seed)
    model: dict[int, Tree] = {}
    kept: dict[int, Tree] = {}
    now: Tree = {}
    for n in range(60):
        now = edit_at_random(db, project.id, dice, now)
        model[head(db, project.id)[1]] = now
        if dice.random() < 0.1:
            checkpoint(db, project.id, f"{n}")
            kept[head(db, project.id)[1]] = now
    db.execute(
        "update public.project_files set created_at = created_at - interval '2 days',"
        " updated_at = updated_at - interval '2 days'"
    )
    for most in (2, 7, None):
        one(db, "select preview.forget(%s, '1 hour', %s, %s)", [project.id, dice.choice([0, 1]), most])
    assert one(db, "select count(*) from project_files") < sum(1 for _ in model) * 2
    refusals: dict[int, str | None] = {}
    for revision, wanted in sorted(model.items()):
        try:
            with db.transaction(force_rollback=True):
                restore(db, project.id, revision)
                assert tree(db, project.id) == wanted, revision
        except psycopg.Error as error:
            refusals[revision] = error.sqlstate
    assert set(refusals.values()) <= {"PT410"}
    assert refusals.keys().isdisjoint(kept)
    one(
        db,
        "select count(public.delete_checkpoint(%s, name)) from public.list_checkpoints(%s)",
        [project.id] * 2,
    )
    one(db, "select preview.forget(%s, '1 hour', 0, null)", [project.id])
    assert one(db, "select count(*) from project_files where not is_current_version") == 0


# --- the difference

LINES = st.lists(
    st.sampled_from(
        [
            "a\n",
            "b\n",
            "    deep\n",
            "\n",
            "é\N{SNOWMAN}\n",
            "x" * 60 + "\n",
            "-\n",
            "+ b\n",
            "\\ no\n",
            "\r\n",
        ]
    ),
    max_size=40,
)
TEXTS = st.builds(lambda lines, last: "".join(lines) + last, LINES, st.sampled_from(["", "end", "é"]))


@pytest.fixture(scope="module")
def kept(shared_database: str) -> Iterator[Db]:
    with connect(shared_database) as db:
        yield db


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repository")
    subprocess.run(["git", "init", "-q", str(path)], check=True)
    return path


def applied(repository: Path, before: dict[str, str], patch: str) -> dict[str, str]:
    """What `git apply` makes of these files with this patch."""
    for path in repository.rglob("*"):
        if ".git" not in path.parts and path.is_file():
            path.unlink()
    for name, text in before.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_bytes(text.encode())
    if patch:
        done = subprocess.run(
            ["git", "apply", "--whitespace=nowarn", "-"],
            input=patch.encode(),
            cwd=repository,
            capture_output=True,
        )
        assert done.returncode == 0, (done.stderr.decode(), patch)
    return {
        str(path.relative_to(repository)): path.read_bytes().decode()
        for path in repository.rglob("*")
        if ".git" not in path.parts and path.is_file()
    }


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, str]:
    before = draw(TEXTS)
    lines = before.splitlines(keepends=True)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(lines)))
        lines[at : at + draw(st.integers(0, 3))] = draw(LINES)[:3]
    return before, "".join(lines)


@given(pair=edited() | st.tuples(TEXTS, TEXTS))
@examples(60, 1_000)
def test_a_difference_is_what_git_applies(kept: Db, repository: Path, pair: tuple[str, str]) -> None:
    before, after = pair
    patch = one(
        kept,
        "select preview.file_diff('d/f', %s, %s, true, true, false, false, true, %s)",
        [before, after, before == after],
    )
    changed = "" if before == after else patch
    assert applied(repository, {"d/f": before}, changed) == {"d/f": after}


def test_the_difference_of_two_revisions(db: Db, project: Project, repository: Path) -> None:
    long = "".join(f"line {n}\n" for n in range(100))
    before = {"src/é f.ts": long, 'q"x': "1\n", "gone": "1", "same": "s", "mode": "m\n", "empty": ""}
    apply(db, project.id, [{"file_path": p, "content": c} for p, c in before.items()])
    after = {
        **before,
        "src/é f.ts": long.replace("line 7\n", "seven\n").replace("line 90\n", ""),
        'q"x': "2\n",
        "new": "n",
    }
    del after["gone"]
    changes = [{"file_path": p, "content": c} for p, c in after.items() if before.get(p) != c]
    apply(
        db,
        project.id,
        [
            *changes,
            {"action": "delete", "file_path": "gone"},
            {"file_path": "mode", "content": "m\n", "executable": True},
        ],
    )
    with user(db, project.collaborator):
        forward, back = diff(db, project.id, 1), diff(db, project.id, 2, 1)
    assert applied(repository, before, forward) == after
    assert applied(repository, after, back) == before
    assert forward.count("@@ -") == 2 + 1 + 1 + 1
    assert "old mode 100644\nnew mode 100755\n" in forward
    assert "-line 7\n+seven\n" in forward
    assert diff(db, project.id, 2, 2) == ""
    assert applied(repository, {}, diff(db, project.id, 0, 1)) == before
    digest = sha("binary")
    db.execute(
        "insert into storage.objects (bucket_id, name, metadata) values ('project-assets', %s, '{\"size\": 6}')",
        [f"{project.id}/{digest}"],
    )
    apply(
        db,
        project.id,
        [{"file_path": "logo.png", "content": None, "content_hash": digest, "encoding": "base64"}],
    )
    assert "Binary files /dev/null and b/logo.png differ\n" in diff(db, project.id, 2)
    for revisions, state in (((None, 1), "PT400"), ((-1, 1), "PT400"), ((1, 99), "PT404")):
        refused(db, state, lambda revisions=revisions: diff(db, project.id, *revisions), "")


# --- the log


def test_the_log_says_who_did_what_in_which_turn(db: Db, project: Project) -> None:
    with user(db, project.owner):
        upsert(db, project.id, "a", "12345")
    with user(db, project.collaborator):
        turn = begin(db, project.id, "make it blue")
        upsert(db, project.id, "a", "1234567", turn=turn)
        upsert(db, project.id, "b", "1", turn=turn)
        end(db, project.id, turn)
        delete(db, project.id, "b")
        query = (
            "select revision, changed_by, label, turn_id::text, files, bytes, changes"
            " from public.list_commits(%s, %s, %s)"
        )
        found = db.execute(query.encode(), [project.id, 10, None]).fetchall()
        assert [row[:6] for row in found] == [
            (3, project.collaborator, None, None, 1, 0),
            (2, project.collaborator, "make it blue", turn, 2, 8),
            (1, project.owner, None, None, 1, 5),
        ]
        assert found[1][6] == [
            {"action": "update", "file_path": "a", "version": 2, "size_bytes": 7},
            {"action": "create", "file_path": "b", "version": 1, "size_bytes": 1},
        ]
        assert [row[0] for row in db.execute(query.encode(), [project.id, 1, 3]).fetchall()] == [2]
    db.execute("delete from preview.turns")
    assert db.execute(query.encode(), [project.id, 1, 3]).fetchall()[0][2:4] == ("make it blue", turn)
    refused(db, "PT400", lambda: db.execute(query.encode(), [project.id, 0, None]), "p_limit")


def test_a_large_commit_is_counted_and_its_first_hundred_files_named(db: Db, project: Project) -> None:
    apply(db, project.id, [{"file_path": f"{n:03}", "content": "x"} for n in range(150)])
    row = db.execute("select files, bytes, changes from public.list_commits(%s)", [project.id]).fetchone()
    assert row is not None
    assert row[:2] == (150, 150)
    assert [each["file_path"] for each in row[2]] == [f"{n:03}" for n in range(100)]


def test_writers_and_whoever_goes_back_forgets_or_keeps_wait_for_each_other_in_one_order(
    database: str, db: Db, project: Project
) -> None:
    """Sixteen at once, each on a connection of its own: no circle, no hole in the revisions, one tree in the end."""
    upsert(db, project.id, "a", "0")

    def work(number: int) -> None:
        with connect(database) as own:
            for n in range(6):
                match number % 4:
                    case 0:
                        upsert(own, project.id, f"{number % 3}", f"{number} {n}")
                    case 1:
                        try:
                            restore(own, project.id, head(own, project.id)[1])
                        except psycopg.Error as error:
                            if (
                                error.sqlstate != "PT410"
                            ):  # somebody wrote, and somebody forgot what was before
                                raise
                    case 2:
                        checkpoint(own, project.id, f"{number} {n}")
                    case _:
                        one(own, "select public.prune_project_history(%s, '0', 0)", [project.id])
                        turn = begin(own, project.id)
                        upsert(own, project.id, "b", f"{number} {n}", turn=turn)
                        end(own, project.id, turn, force=True)

    with ThreadPoolExecutor(16) as threads:
        for done in [threads.submit(work, number) for number in range(16)]:
            done.result()
    revisions = {payload["revision"] for _, payload in messages(db, project.id)}
    assert revisions == set(range(1, head(db, project.id)[1] + 1))
    assert one(db, "select public.project_tree_hash(%s)", [project.id]) == hash_of(files(db, project.id))


# --- rights


def test_strangers_and_containers_get_nothing_of_it(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    checkpoint(db, project.id, "mine")
    other = make_project(db)
    with user(db, project.stranger):
        assert one(db, "select count(*) from preview.checkpoints") == 0
        gate = (
            "update preview.history_gate set project_id = %s, act = 'restore', revision = 1 returning answer"
        )
        assert db.execute(gate.encode(), [project.id]).fetchall() == []
    with user(db, other.owner):
        refused(db, "PT404", lambda: checkpoint(db, project.id, "not mine"), "not yours")
    with acting_as(db, "authenticated", sub=project.owner, project_id=project.id):
        assert one(db, "select count(*) from preview.checkpoints") == 0
        assert db.execute(gate.encode(), [project.id]).fetchall() == []
    for column in ("answer = '{}'", "unrestricted = true"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), user(db, project.owner):
            db.execute(f"update preview.history_gate set {column}".encode())
    with acting_as(db, "service_role"):
        assert restore(db, project.id, 1)["changed"] == 0
        assert checkpoint(db, project.id, "the service's")["revision"] == 1
    with pytest.raises(psycopg.errors.InsufficientPrivilege), user(db, project.owner):
        db.execute(
            "insert into preview.checkpoints (project_id, revision, created_at) values (%s, 1, now())",
            [project.id],
        )
