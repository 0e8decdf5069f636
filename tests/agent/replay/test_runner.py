"""Every scenario of the library ends as it should, with and without injected faults; a wrong end is told apart."""

from __future__ import annotations

import io
import json
import os
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agent.__main__ import main
from agent.core.errors import MalformedMessage
from agent.core.messages import MANIFEST_PATH
from agent.core.model import RelPath, digest_of, tree_hash
from agent.replay.faults import Committed, Delivered, Fault, FaultPlan, Pause, inject
from agent.replay.result import compare
from agent.replay.runner import ReplayOptions, replay
from agent.replay.scenario import FAULTS, Step
from tests.profiles import NIGHTLY

LIBRARY = sorted((Path(__file__).parents[2] / "scenarios").glob("*.jsonl"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    yield
    structlog.reset_defaults()


def test_the_library_is_there() -> None:
    assert len(LIBRARY) >= 25
    texts = "".join(path.read_text() for path in LIBRARY)
    assert all(f'"fault":"{fault}"' in texts for fault in FAULTS)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_a_scenario_ends_as_it_should(path: Path, tmp_path: Path) -> None:
    result = replay(path, tmp_path)
    assert result.differences == ()
    assert result.tree_hash == result.expected_hash


@pytest.mark.parametrize("seed", range(20 if NIGHTLY else 2))
@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_with_faults_injected_it_ends_the_same(path: Path, seed: int, tmp_path: Path) -> None:
    faults = FaultPlan(seed, shuffle=True, duplicate=0.3, drop=0.3, disconnect=2, crash=1)
    assert replay(path, tmp_path, ReplayOptions(faults)).differences == ()


def changed(tmp_path: Path, name: str = "wrong", **files: str | None) -> Path:
    """The scenario `first-save` with another expectation: these files, None being none."""
    lines = (LIBRARY[0].parent / "first-save.jsonl").read_text().splitlines()
    header = json.loads(lines[0])
    wanted = {**header["expect"]["files"], **files}
    wanted = {path: text for path, text in wanted.items() if text is not None}
    digests = {RelPath(path): digest_of(text.encode()) for path, text in wanted.items()}
    header["expect"] = {"tree_hash": tree_hash(digests), "files": wanted}
    scenario = tmp_path / f"{name}.jsonl"
    scenario.write_text("\n".join([json.dumps(header), *lines[1:]]))
    return scenario


def test_a_wrong_end_is_a_diff_that_a_person_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"src/App.tsx": "something else\n", "gone.ts": "x", "index.html": None}
    scenario = changed(tmp_path, **other)
    report, junit = tmp_path / "report.json", tmp_path / "junit.xml"
    assert main(["replay", str(scenario), "--json", str(report), "--junit", str(junit)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("NOT EQUAL  wrong: ")
    assert "- gone.ts: missing" in printed
    assert "+ index.html: should not be there" in printed
    assert "! src/App.tsx: " in printed
    assert "        -something else\n        +export default" in printed
    assert json.loads(report.read_bytes())["results"][0]["ok"] is False
    suite = ET.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "1", "0")
    assert main(["replay", str(LIBRARY[0]), "--junit", str(junit)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ok  ")
    assert printed.count("\n") == 1, "one line"


def test_what_stands_in_files_harms_no_terminal_and_no_xml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = changed(tmp_path, **{"src/App.tsx": "\x1b[2J\x00\x0c\ufffe<&\n", "binary": "\x00" * 20})
    junit = tmp_path / "junit.xml"
    assert main(["replay", str(scenario), "--junit", str(junit)]) == 1
    assert "\x1b" not in capsys.readouterr().out
    failure = ET.parse(junit).getroot().find("testcase/failure")
    assert failure is not None
    assert "\\x1b[2J\\x00" in (failure.text or "")


def test_a_file_of_another_kind_says_where_they_part() -> None:
    path, longer = RelPath("a.png"), b"\x89PNG" + b"\xff" * 50
    assert compare({path: longer}, {path: longer[:30]})[1].strip() == "they part at byte 30"
    assert compare({path: longer}, {path: b"\x89PNX" + longer[4:]})[1].strip() == "they part at byte 3"
    assert compare({path: b"a\r\n"}, {path: b"a\n"})[1].strip() == "only the ends of lines differ"


def test_an_expectation_that_the_events_do_not_lead_to_is_told_apart(tmp_path: Path) -> None:
    scenario = changed(tmp_path)
    lines = scenario.read_text().splitlines()
    header = {**json.loads(lines[0]), "expect": {"tree_hash": "0" * 64}}
    scenario.write_text("\n".join([json.dumps(header), *lines[1:]]))
    assert "and expect says 000000000000…" in replay(scenario).differences[0]


BEGIN = '{"scenario":1,"project_id":"p","epoch":"e","revision":1'
HEADER = BEGIN + ',"snapshot":{"files":{}}}\n'
EVENT = HEADER + '{"at_ms":1,"event":"file:update",'
REFERENCE = '"payload":{"file_path":"a","content":null,"content_hash":"%s","version":1,"revision":2}' % (
    "0" * 64
)
FILES = '"snapshot":{"files":{"a":"b"}},"expect":{"tree_hash":"%s","files":{"a":"c"}}}' % ("0" * 64)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("not json", "line 1: not the header, which is the first line: JSON is malformed"),
        ("[1]", "line 1: not the header, which is the first line: Expected `object`"),
        ('{"scenario":2}', "line 1: not the header, which is the first line: Invalid enum value 2 - at `$.scenario`"),
        ('{"at_ms":1,"fault":"disconnect"}', "line 1: not the header, which is the first line: Object missing"),
        ('{"scenario":1}', "required field `project_id`"),
        ('{"scenario":1,"project_id":"p","epoch":"e","revision":"1"}', "Expected `int`, got `str` - at `$.revision`"),
        (BEGIN + "}", "required field `snapshot`"),
        (BEGIN + ',"snapshot":"../x.zip"}', "line 1: snapshot is neither"),
        (BEGIN + ',"snapshot":"x.zip"}', "line 1: its snapshot x.zip is not beside it"),
        (BEGIN + ',"snapshot":{"files":{"../x":""}}}', "dot_segment"),
        (BEGIN + ',"snapshot":{"files":{"x":1}}}', "Expected `str`, got `int` - at `$.snapshot.files[...]`"),
        (BEGIN + "," + FILES, "line 1: expect's tree_hash is not that of its files"),
        (HEADER + '{"at_ms":1}', "line 2: a step has either"),
        (HEADER + '{"at_ms":-1,"fault":"disconnect"}', "line 2: not a step: Expected `int` >= 0 - at `$.at_ms`"),
        (HEADER + '\n{"at_ms":1,"fault":"fire"}', "line 3: fault 'fire' is none of disconnect, expire_token"),
        (HEADER + '{"at_ms":1,"fault":"disconnect","lost":-1}', "line 2: not a step: Expected `int` >= 0"),
        (HEADER + '{"at_ms":9,"fault":"disconnect"}\n{"at_ms":8,"fault":"disconnect"}', "line 3: at_ms is 8, before"),
        (HEADER + '{"at_ms":1,"event":"x","payload":{},"bytes":{"a":"%"}}', "Invalid base64 encoded string"),
        (EVENT + REFERENCE + "}", "line 2: the bytes of a are missing"),
        (EVENT + REFERENCE + ',"bytes":{"a":"eA=="}}', "line 2: the bytes of a are missing, or"),
    ],
)  # fmt: skip
def test_a_scenario_that_cannot_be_read_says_where_and_why(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, junit = tmp_path / "bad.jsonl", tmp_path / "junit.xml"
    path.write_text(text)
    assert main(["replay", str(path), str(LIBRARY[0]), "--junit", str(junit)]) == 64
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"UNREADABLE  cannot read {path}")
    assert says in first
    assert second.startswith("ok  "), "the others are run"
    suite = ET.parse(junit).getroot()
    assert (suite.get("errors"), suite.get("failures")) == ("1", "0")


def test_a_scenario_that_is_not_there_or_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    names = [str(tmp_path / name) for name in ("none.jsonl", "latin.jsonl", "")]
    assert main(["replay", *names]) == 64
    none, latin, directory = capsys.readouterr().out.splitlines()
    assert "No such file or directory" in none
    assert "it is not UTF-8" in latin
    assert "Is a directory" in directory


def zipped(tmp_path: Path, content: bytes) -> Path:
    header = json.loads(HEADER)
    path = tmp_path / "zipped.jsonl"
    path.write_text(json.dumps({**header, "snapshot": "snap.zip"}))
    (tmp_path / "snap.zip").write_bytes(content)
    return path


def archive(files: Mapping[str, str], listed: Mapping[str, str] | None = None) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as out:
        if listed is not None:
            items = [
                {"file_path": p, "content_hash": digest_of(t.encode()), "size": len(t), "version": 1}
                for p, t in listed.items()
            ]
            manifest = {"format": 1, "project_id": "p", "epoch": "e", "revision": 1, "files": items}
            out.writestr(MANIFEST_PATH, json.dumps(manifest))
        for path, text in files.items():
            out.writestr(path, text)
    return whole.getvalue()


def test_a_snapshot_beside_the_scenario(tmp_path: Path) -> None:
    assert replay(zipped(tmp_path, archive({"a": "b"}, {"a": "b"})), tmp_path / "1").ok
    assert replay(zipped(tmp_path, archive({"a": "b"})), tmp_path / "2").tree_hash, "the seed's plain form"
    for content, says in (
        (b"PK no zip", "it cannot be unpacked"),
        (archive({}, {"a": "b"}), "a listed file is not in it whole"),
        (archive({"a": "c"}, {"a": "b"}), "a does not have the hash that the manifest lists"),
    ):
        with pytest.raises(MalformedMessage, match=says) as error:
            replay(zipped(tmp_path, content))
        assert "zipped.jsonl, line 1: snap.zip" in str(error.value)


def test_where_it_works_and_reports_is_looked_at_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    scenario = str(LIBRARY[0])
    assert main(["replay", scenario, "--directory", str(taken)]) == 64
    assert "it is not an empty directory; name a new one" in capsys.readouterr().err
    assert main(["replay", scenario, "--json", str(tmp_path / "no" / "x.json")]) == 64
    assert "cannot write" in capsys.readouterr().err
    assert sorted(taken.iterdir()) == [taken / "mine"]
    several = [scenario, scenario, str(LIBRARY[1])]
    assert main(["replay", *several, "--directory", str(tmp_path / "new")]) == 0
    names = {LIBRARY[0].stem, f"{LIBRARY[0].stem}-2", LIBRARY[1].stem}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names, "each has its own"


@pytest.mark.parametrize(
    "flags", [["--drop", "2"], ["--drop", "x"], ["--duplicate", "nan"], ["--crash", "-1"]]
)
def test_a_flag_that_means_nothing_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(LIBRARY[0]), *flags])
    assert ended.value.code == 2
    assert f"{flags[1]!r} is no " in capsys.readouterr().err


def test_real_time_is_the_recorded_pace(tmp_path: Path) -> None:
    path = LIBRARY[0].parent / "the-last-event-is-lost.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])["at_ms"] / 1000
    paced = replay(path, tmp_path / "1", ReplayOptions(real_time=True))
    assert paced.ok
    assert paced.seconds >= last, "not faster than it was"


def with_dev_server(mode: str) -> ReplayOptions:
    command = f"{sys.executable} {Path(__file__).parents[1] / 'devserver' / 'dev_server.py'} {mode}"
    return ReplayOptions(environ={"PATH": os.environ["PATH"], "DEV_COMMAND": command})


def test_with_the_dev_server_it_must_serve_the_end(tmp_path: Path) -> None:
    path = LIBRARY[0].parent / "restart-in-the-middle.jsonl"
    served = replay(path, tmp_path / "1", with_dev_server("serves"))
    assert served.differences == ()
    assert served.dev_server == "ready"


@pytest.mark.nightly
def test_with_a_dev_server_that_fails_it_does_not_end_as_it_should(tmp_path: Path) -> None:
    path = LIBRARY[0].parent / "restart-in-the-middle.jsonl"
    broken = replay(path, tmp_path, with_dev_server("crashes"))
    assert broken.dev_server == "failed"
    assert broken.differences[0] == "the dev server is failed at the end"
    assert any("a plugin is broken" in line for line in broken.differences)


STEPS = st.lists(st.integers(0, 3), max_size=12).map(
    lambda kinds: tuple(
        Step(n, fault="disconnect", lost=kind) if kind else Step(n, "file:update")
        for n, kind in enumerate(kinds)
    )
)


@given(STEPS, st.integers(), st.booleans(), st.floats(0, 1), st.floats(0, 1))
def test_nothing_is_delivered_before_it_is_committed(
    steps: tuple[Step, ...], seed: int, shuffle: bool, duplicate: float, drop: float
) -> None:
    faults = FaultPlan(seed, shuffle=shuffle, duplicate=duplicate, drop=drop, disconnect=1, crash=1)
    committed: list[Step] = []
    for occurrence in inject(steps, faults):
        if isinstance(occurrence, Committed):
            committed.append(occurrence.step)
        elif isinstance(occurrence, Delivered):
            assert occurrence.step in committed
        else:
            assert isinstance(occurrence, Fault | Pause)
    assert committed == [step for step in steps if step.event]
    undisturbed = [h.step for h in inject(steps, FaultPlan()) if isinstance(h, Delivered)]
    assert all(step in steps for step in undisturbed)
