"""The editor page in a real browser, over the real stack: `editor.mjs` has what a person does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psycopg
import pytest

from orchestrator_stub.devstack.project_client import user_token
from orchestrator_stub.devstack.state_directory import StateDirectory, identities
from tests.browser.conftest import HERE, missing
from tests.ports import free_port
from tests.system.stack import Stack, copy_example, until
from tests.trees import files_below

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A running stack whose editor page is built."""
    if (why := missing()) is not None:
        pytest.skip(why)
    place = tmp_path_factory.mktemp("stack")
    running = Stack(copy_example(place / "app"), place / "state", options=("--no-watch",), editor=True)
    try:
        running.start()
        until("the page is built", lambda: 'id="root"' in page(running).text, 180)
        yield running
    finally:
        running.kill()


def page(stack: Stack, path: str = "/", **headers: str) -> httpx.Response:
    return httpx.get(f"{stack.info['orchestrator_url']}{path}", headers=headers, timeout=10)


@pytest.mark.parametrize(
    "scenario",
    [
        "save",
        "error",
        "conflict",
        "crash",
        "files",
        "checkpoints",
        "session",
        "offline",
        "turn",
        "accessible",
    ],
)
def test_a_person_at_the_editor(stack: Stack, tmp_path: Path, scenario: str) -> None:
    person(stack, tmp_path, "editor.mjs", scenario)


@pytest.mark.parametrize("scenario", ["proposals", "who"])
def test_what_tools_made_is_decided_and_who_made_what_is_said(
    stack: Stack, tmp_path: Path, scenario: str
) -> None:
    person(stack, tmp_path, "editor_kept.mjs", scenario)


def expired(stack: Stack) -> str:
    """The user's token as it was two hours ago, good for one."""
    user, _ = identities(stack.project)
    return user_token(StateDirectory(stack.state).keyring(), user, time.time() - 7200, 3600)


@pytest.mark.parametrize(
    "scenario", ["token", "realtime", "refused", pytest.param("heavy", marks=pytest.mark.nightly)]
)
def test_what_breaks_around_the_page_loses_nothing(stack: Stack, tmp_path: Path, scenario: str) -> None:
    person(stack, tmp_path, "editor_faults.mjs", scenario, EXPIRED=expired(stack))


@pytest.mark.nightly
def test_a_stack_that_is_started_again_finds_the_page_as_it_was(tmp_path: Path) -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    options = ("--no-watch", "--port", str(free_port()))
    running = Stack(copy_example(tmp_path / "app"), tmp_path / "state", options=options, editor=True)
    try:
        running.start()
        until("the page is built", lambda: 'id="root"' in page(running).text, 180)
        with subprocess.Popen(
            ["node", str(HERE / "editor_faults.mjs"), "restart"], text=True,
            env=os.environ | {"STACK": json.dumps(running.info), "PICTURE": str(tmp_path / "restart.png")},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as at_the_page:  # fmt: skip
            assert at_the_page.stdin is not None
            assert at_the_page.stdout is not None
            for word in at_the_page.stdout:
                running.interrupt() if word == "stop\n" else running.start()
                print("done", file=at_the_page.stdin, flush=True)
        assert at_the_page.returncode == 0
    finally:
        running.kill()


@pytest.mark.nightly
def test_a_project_that_does_not_start_is_corrected_in_the_page(tmp_path: Path) -> None:
    if (why := missing()) is not None:
        pytest.skip(why)
    port = free_port()
    options = ("--no-watch", "--port", str(port))
    running = Stack(copy_example(tmp_path / "app"), tmp_path / "state", options=options, editor=True)
    config = running.project / "vite.config.ts"
    good = config.read_text()
    config.write_text("throw new Error('this configuration is wrong')\n")
    running.info = {"orchestrator_url": f"http://127.0.0.1:{port}"}
    try:
        running.begin()

        def answers() -> bool:
            with suppress(httpx.HTTPError):
                return 'id="root"' in page(running).text
            return False

        until("the page comes", answers, 180)
        person(running, tmp_path, "editor_faults.mjs", "broken", GOOD=good)
    finally:
        running.kill()


def person(stack: Stack, tmp_path: Path, file: str, scenario: str, **more: str) -> None:
    """Let a person go through one scenario."""
    environ = os.environ | {"STACK": json.dumps(stack.info), "PICTURE": str(tmp_path / f"{scenario}.png")}
    done = subprocess.run(
        ["node", str(HERE / file), scenario],
        env=environ | more, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def people_in_a_file(
    stack: Stack, tmp_path: Path, keys: int, writes: int, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Two type `keys` each beside an AI's `writes`; then the files of the preview have the same."""
    environ = os.environ | {"STACK": json.dumps(stack.info), "PICTURE": str(tmp_path / "room.png")}
    errors = tmp_path / "errors"
    with (
        errors.open("w") as log,
        subprocess.Popen(
            ["node", str(HERE / "editor.mjs"), "room"],
            env=environ | {"KEYS": str(keys), "WRITES": str(writes)}, stderr=log, start_new_session=True,
        ) as person,
    ):  # fmt: skip
        try:
            deadline = time.monotonic() + 600
            while person.poll() is None and time.monotonic() < deadline:
                meanwhile()
                with suppress(subprocess.TimeoutExpired):
                    person.wait(timeout=1)
        finally:
            person.kill()
    assert person.returncode == 0, errors.read_text()[-4000:]
    (file,) = [each for each in stack.rpc("list_current_files") if each["file_path"] == "src/shared.txt"]
    on_disk = [each for each in files_below(stack.state) if each.match("src/shared.txt")]
    assert on_disk
    until(
        "the disk has it", lambda: [each.read_text() for each in on_disk] == [file["content"]] * len(on_disk)
    )


def test_two_people_and_an_ai_in_one_file(stack: Stack, tmp_path: Path) -> None:
    people_in_a_file(stack, tmp_path, keys=30, writes=4)


@pytest.mark.nightly
@pytest.mark.parametrize("number", range(10))
def test_two_people_type_five_hundred_keys_each_beside_twenty_writes(
    stack: Stack, tmp_path: Path, number: int
) -> None:
    people_in_a_file(stack, tmp_path, keys=500, writes=20)


@pytest.mark.nightly
def test_who_typed_through_a_restart_of_the_room_loses_nothing(stack: Stack, tmp_path: Path) -> None:
    """Each second the room is somebody else's: what is typed meanwhile is in no room, and joins the next one."""
    with psycopg.connect(stack.info["database_url"], autocommit=True) as db:
        people_in_a_file(
            stack, tmp_path, keys=100, writes=4,
            meanwhile=lambda: db.execute(
                "update preview.rooms set generation = nextval('preview.room_generations')"
            ) and None,
        )  # fmt: skip


def test_what_a_first_paint_waits_for_is_at_most_300_kb(stack: Stack) -> None:
    """Compressed: the page, its style, and the scripts that are no later part. A file's language comes after it."""
    waited_for = [
        "/",
        *(f"/{name}" for name in re.findall(r'(?:src|href)="\./(assets/[^"]+)"', page(stack).text)),
    ]
    assert len(waited_for) >= 3
    sizes = {}
    for path in waited_for:
        answer = page(stack, path, **{"accept-encoding": "gzip"})
        assert answer.headers["content-encoding"] == "gzip", path
        sizes[path] = int(answer.headers["content-length"])
    assert sum(sizes.values()) <= 300_000, sizes


def test_what_signs_in_is_for_the_page_alone(stack: Stack) -> None:
    port = stack.info["orchestrator_url"].rpartition(":")[2]
    given = page(stack, "/editor.json", **{"sec-fetch-site": "same-origin"})
    assert given.json()["password"] == stack.info["user_password"]
    assert "access-control-allow-origin" not in given.headers
    assert stack.info["service_key"] not in given.text
    for refused in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},  # the preview, on another port of the same host
        {"host": f"evil.example:{port}"},
        {"host": f"127.0.0.1.evil.example:{port}"},
    ):
        assert page(stack, "/editor.json", **refused).status_code == 403, refused
    assert page(stack, "/", host=f"evil.example:{port}").status_code == 403
    assert page(stack, "/").headers["x-frame-options"] == "DENY"
    assert page(stack, "/assets/..%2fstack.py").status_code == 404
    assert page(stack, "/assets/nothing.js").status_code == 404
    assert page(stack, f"/assets/{'x' * 300}.js").status_code == 404


@pytest.mark.nightly
def test_a_large_project(stack: Stack) -> None:
    """Five thousand files, and one of 5 MB. Last, since a page has only the rows that are in sight."""
    environ = os.environ | {"STACK": json.dumps(stack.info)}
    done = subprocess.run(
        ["node", str(HERE / "editor.mjs"), "large"],
        env=environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
