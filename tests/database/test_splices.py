"""Splices: what they make of a text is the other text, whatever the two are; who gets them, and who gets the whole."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
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
    head,
    messages,
    one,
    upsert,
    user,
)
from tests.database.test_writing import sha
from tests.profiles import examples

Db = psycopg.Connection[Any]

CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
"""Of all planes; PostgreSQL's text has no NUL."""

LINES = [f"  '{n:05}-\N{SNOWMAN}\N{GRINNING FACE}': ['é', {n * 7919}],\n" for n in range(1200)]
BIG = "".join(LINES)
"""Some 50 KB, of characters with one to four bytes."""


def spliced(before: str, splices: list[list[Any]]) -> str:
    """As a reader applies them; every rule of the form is held."""
    base, parts, at = before.encode(), [], 0
    for offset, cut, insert in splices:
        assert at <= offset <= offset + cut <= len(base)
        parts += [base[at:offset], insert.encode()]
        at = offset + cut
    return b"".join([*parts, base[at:]]).decode()


@st.composite
def pairs(draw: st.DrawFn) -> tuple[str, str]:
    """A text, and what a few edits make of it: long enough for its middle to be found again."""
    before = draw(st.text(CHARACTERS, max_size=30)) + "".join(
        draw(st.lists(st.sampled_from(LINES[:200]), max_size=120))
    )
    after = before
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(after)))
        cut = draw(st.sampled_from([0, 1, 2, 40, 4000]))
        after = after[:at] + draw(st.text(CHARACTERS, max_size=20)) + after[at + cut :]
    return before, after


@pytest.fixture(scope="module")
def kept(shared_database: str) -> Iterator[Db]:
    """One connection for all examples of a property."""
    with connect(shared_database) as db:
        yield db


@given(pair=pairs() | st.tuples(st.text(CHARACTERS, max_size=12), st.text(CHARACTERS, max_size=12)))
@examples(150, 5_000)
def test_splices_make_the_one_of_the_other(kept: Db, pair: tuple[str, str]) -> None:
    found = one(kept, "select preview.splices_of(%s, %s)", list(pair))
    if found is not None:
        assert spliced(pair[0], found) == pair[1]
        inserted = sum(len(insert.encode()) for _, _, insert in found)
        assert 2 * inserted < len(pair[1].encode()) or inserted == 0


def test_small_edits_of_large_files_are_few_bytes(kept: Db) -> None:
    lock = json.dumps(
        {
            "packages": {
                f"node_modules/p{n}": {"version": f"1.{n}.0", "integrity": sha(str(n))} for n in range(4000)
            }
        },
        indent=2,
    )
    edits = {
        "one line": lock.replace("1.2000.0", "1.2000.1"),
        "five places": lock.replace("1.10.0", "9")
        .replace("1.900.0", "9")
        .replace("1.1900.0", "9")
        .replace("1.3000.0", "9")
        .replace("1.3999.0", "9"),
        "appended": lock + "\n",
        "cut off": lock[:-300_000],
        "nothing": lock,
    }
    for name, after in edits.items():
        found = one(kept, "select preview.splices_of(%s, %s)", [lock, after])
        assert spliced(lock, found) == after
        assert len(json.dumps(found)) < 600, name
    dice = random.Random(1)
    anew = "".join(chr(dice.randrange(32, 0x2000)) for _ in range(100_000))
    assert one(kept, "select preview.splices_of(%s, %s)", [lock, anew]) is None
    assert one(kept, "select preview.splices_of(%s, %s)", ["", "new"]) is None
    assert one(kept, "select preview.splices_of(%s, %s)", ["all of it", ""]) == [[0, 9, ""]]
    assert one(kept, "select preview.splices_of(%s, %s)", ["", ""]) == []
    assert one(kept, "select preview.splices_of(null, %s)", ["x"]) is None


def patched(payload: Json, before: str, after: str) -> bool:
    """Whether a payload says `after` by splices of `before`; it says nothing wrong in either case."""
    assert payload["content_hash"] == sha(after)
    if "splices" not in payload:
        assert "base_hash" not in payload
        return False
    assert (payload["content"], payload["base_hash"], payload["encoding"]) == (None, sha(before), "utf-8")
    assert spliced(before, payload["splices"]) == after
    return True


def test_an_update_of_a_large_file_is_splices(db: Db, project: Project) -> None:
    edited = BIG.replace("00600", "00600!")
    upsert(db, project.id, "big.ts", BIG)
    upsert(db, project.id, "big.ts", edited)
    upsert(db, project.id, "small.ts", "1")
    upsert(db, project.id, "small.ts", "2")
    first, second, *small = (payload for _, payload in messages(db, project.id))
    assert first["content"] == BIG
    assert patched(second, BIG, edited)
    assert second["size"] == len(edited.encode())
    assert len(json.dumps(second)) < 1000
    assert [payload["content"] for payload in small] == ["1", "2"]


def test_what_is_rewritten_or_below_the_setting_goes_whole(db: Db, project: Project) -> None:
    other = BIG[::-1]
    upsert(db, project.id, "big.ts", BIG)
    upsert(db, project.id, "big.ts", other)
    delete(db, project.id, "big.ts")
    upsert(db, project.id, "big.ts", other + "x")
    db.execute("update preview.settings set patch_above_bytes = null")
    upsert(db, project.id, "big.ts", other + "y")
    db.execute("update preview.settings set patch_above_bytes = 10")
    upsert(db, project.id, "tiny.ts", "12345678901234567890123456789012345678901234567890")
    upsert(db, project.id, "tiny.ts", "1234567890123456789012345678901234567890123456789")
    whole = [payload for event, payload in messages(db, project.id) if event == "file:update"]
    assert [payload["content"] for payload in whole[:4]] == [BIG, other, other + "x", other + "y"]
    assert whole[-1]["splices"] == [[49, 1, ""]]


def test_what_went_by_reference_goes_as_splices(db: Db, project: Project) -> None:
    db.execute("update preview.settings set broadcast_limit_bytes = 20000")
    upsert(db, project.id, "big.ts", BIG)
    upsert(db, project.id, "big.ts", BIG + "// end\n")
    upsert(
        db,
        project.id,
        "big.ts",
        "".join(LINES[:600]) + "\n".join(map(str, range(4000))) + "".join(LINES[600:]),
    )
    first, second, third = (payload for _, payload in messages(db, project.id))
    assert (first["content"], "splices" in first) == (None, False)
    assert patched(second, BIG, BIG + "// end\n")
    assert (third["content"], "splices" in third, "base_hash" in third) == (None, False, False), (
        "too many bytes of them"
    )


def test_a_bulk_and_a_turn_mix_splices_contents_and_deletions(db: Db, project: Project) -> None:
    apply(db, project.id, [{"file_path": p, "content": BIG} for p in ("a.ts", "b.ts", "c.ts")])
    edited = "// new\n" + BIG
    turn = begin(db, project.id)
    for path in ("a.ts", "b.ts"):
        upsert(db, project.id, path, edited, turn=turn)
    delete(db, project.id, "c.ts", turn=turn)
    upsert(db, project.id, "d.ts", "d", turn=turn)
    end(db, project.id, turn)
    event, payload = messages(db, project.id)[-1]
    files = {each["file_path"]: each for each in payload["files"]}
    assert event == "bulk:apply"
    assert patched(files["a.ts"], BIG, edited)
    assert patched(files["b.ts"], BIG, edited)
    assert (files["c.ts"]["action"], files["d.ts"]["content"]) == ("delete", "d")
    # Where even the splices are too many, there are references.
    db.execute("update preview.settings set broadcast_limit_bytes = 700")
    apply(db, project.id, [{"file_path": p, "content": edited + "x" * 300} for p in ("a.ts", "b.ts")])
    _, payload = messages(db, project.id)[-1]
    assert [(each["content"], "splices" in each) for each in payload["files"]] == [(None, False)] * 2


def since(
    db: Db, project: Project, revision: int, *, accept: list[str] | None, paths: list[str] | None = None
) -> dict[str, Json]:
    query = "select public.changes_since(%s, %s, %s, %s, null, %s)"
    answer = one(db, query, [project.id, head(db, project.id)[0], revision, paths, accept])
    return {each["file_path"]: each for each in answer["changes"]}


def test_catch_up_gives_splices_to_whoever_takes_them(db: Db, project: Project) -> None:
    upsert(db, project.id, "big.ts", BIG)
    for n in range(3):
        upsert(db, project.id, "big.ts", BIG + f"// {n}\n")
    upsert(db, project.id, "new.ts", BIG)
    last = BIG + "// 2\n"
    assert changes_since(db, project.id, head(db, project.id)[0], 1)["changes"][0]["content"] == last
    for revision, base in ((1, BIG), (2, BIG + "// 0\n"), (3, BIG + "// 1\n")):
        found = since(db, project, revision, accept=["splices"])
        assert patched(found["big.ts"], base, last)
        assert found["new.ts"]["content"] == BIG
    assert since(db, project, 0, accept=["splices"])["big.ts"]["content"] == last, (
        "nothing was there at that revision"
    )
    for accept in (None, [], ["something"]):
        assert since(db, project, 1, accept=accept)["big.ts"]["content"] == last
    for revision in (1, 4):
        asked = since(db, project, revision, accept=["splices"], paths=["big.ts"])["big.ts"]
        assert asked["content"] == last, "what is asked for by path is whole"
    delete(db, project.id, "big.ts")
    upsert(db, project.id, "big.ts", last)
    assert since(db, project, 6, accept=["splices"])["big.ts"]["content"] == last, "there is nothing to patch"


def test_members_and_the_service_get_splices_as_anybody(db: Db, project: Project) -> None:
    upsert(db, project.id, "big.ts", BIG)
    with user(db, project.collaborator):
        upsert(db, project.id, "big.ts", BIG + "2")
        assert patched(since(db, project, 1, accept=["splices"])["big.ts"], BIG, BIG + "2")
    with acting_as(db, "service_role"):
        assert patched(since(db, project, 1, accept=["splices"])["big.ts"], BIG, BIG + "2")
