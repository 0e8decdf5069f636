"""What a project's files say: where it is, what starts its dev server, who installs it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.devserver import project
from agent.devserver.project import ProjectUnreadable, find
from tests.agent.devserver.installs import write


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("vite", ("…/.bin/vite",)),
        ("vite --mode staging", ("…/.bin/vite", "--mode", "staging")),
        ("next dev", ("npm", "run", "dev")),
        ("FOO=1 vite", ("npm", "run", "dev", "--")),
        ("tsc && vite", ("npm", "run", "dev", "--")),
        ("vite build --watch", ("npm", "run", "dev", "--")),
        ("vite " + "x" * 200_000, ("npm", "run", "dev", "--")),
    ],
)
def test_what_starts_the_dev_server(tmp_path: Path, script: str, argv: tuple[str, ...]) -> None:
    wanted = write(tmp_path / "p", scripts={"dev": script})
    got = wanted.dev_argv(host="::", port=5, fresh=False)
    shown = tuple(word.replace(str(wanted.modules), "…") for word in got)
    flags = ("--host", "::", "--port", "5", "--strictPort") if "vite" in script else ()
    assert shown == (*argv, *flags)


def test_a_project_one_level_down_is_found_and_two_of_them_are_not(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    write(tmp_path / "frontend", scripts={"dev": "vite"})
    found = find(tmp_path)
    assert found is not None
    assert found.root == tmp_path / "frontend"
    write(tmp_path / "backend", scripts={"dev": "vite"})
    assert find(tmp_path) is None
    write(tmp_path)
    assert find(tmp_path).root == tmp_path  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\0", "nope", '{"a":' + "[" * 200_000])
def test_a_broken_package_json_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "package.json").write_text(content)
    with pytest.raises(ProjectUnreadable, match=r"^cannot read package\.json: "):
        find(tmp_path)


def nested(form: str, depth: int) -> str:
    opening, closing = form.split("…")
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(
    "around",
    ['{"dependencies": …}', '{"dependencies": {"x": …}}', '{"dependencies": {"x": "1"}, "workspaces": …}'],
)
@pytest.mark.parametrize("form", ['{"a":…}', "[…]"], ids=["objects", "arrays"])
def test_a_package_json_nested_to_any_depth_is_read_or_refused_in_one_sentence(
    tmp_path: Path, around: str, form: str
) -> None:
    """Between what JSON can be read and what can be written again lie a few levels: every depth is tried."""
    read, refused = 0, set()
    for depth in range(900, 1000):
        (tmp_path / "package.json").write_text(around.replace("…", nested(form, depth)))
        try:
            find(tmp_path)
            read += 1
        except ProjectUnreadable as error:
            refused.add(str(error))
    assert read
    assert refused == {"cannot read package.json: it is nested too deep"}


@pytest.mark.parametrize("character", ["\\ud800", "\\udcff", "\\u0000"])
@pytest.mark.parametrize("name", ["dev", "start"])
def test_a_script_that_no_program_can_be_given_is_refused_by_name(
    tmp_path: Path, name: str, character: str
) -> None:
    (tmp_path / "package.json").write_text(f'{{"scripts": {{"{name}": "vite {character}"}}}}')
    with pytest.raises(ProjectUnreadable, match=rf'^cannot use the script "{name}" of package\.json: '):
        find(tmp_path)


@pytest.mark.parametrize(
    "scripts", ["7", '"dev"', '["dev"]', "null", '{"dev": ["vite"]}', '{"dev": 7, "start": {}}']
)
def test_scripts_of_another_type_start_nothing(tmp_path: Path, scripts: str) -> None:
    (tmp_path / "package.json").write_text(f'{{"scripts": {scripts}}}')
    found = find(tmp_path)
    assert found is not None
    assert found.dev_argv(host="::", port=5, fresh=False) == ()


@pytest.mark.parametrize("digits", [4300, 4301, 100_000])
def test_a_number_of_any_length_is_read_or_refused(tmp_path: Path, digits: int) -> None:
    (tmp_path / "package.json").write_text(f'{{"dependencies": {{"a": {"9" * digits}}}}}')
    if digits <= 4300:
        assert find(tmp_path) is not None
        return
    with pytest.raises(ProjectUnreadable, match=r"^cannot read package\.json: "):
        find(tmp_path)


def test_a_package_json_that_the_disk_cannot_give_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package.json").write_text("{}")

    def failing(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(project, "read_small", failing)
    with pytest.raises(ProjectUnreadable, match=r"^cannot read package\.json: Input/output error"):
        find(tmp_path)


def test_files_that_are_not_what_they_seem_are_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"name": "secret"}')
    (tmp_path / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "pipe")
    assert project.read_small(tmp_path / "link") is None
    assert project.read_small(tmp_path / "pipe") is None
    assert project.read_small(Path("/dev/zero")) is None
    assert project.read_small(tmp_path) is None


@pytest.mark.parametrize(
    ("lock", "manager"),
    [
        ("pnpm-lock.yaml", "pnpm"),
        ("yarn.lock", "yarn"),
        ("bun.lock", "bun"),
        ("package-lock.json", "npm"),
    ],
)
def test_the_lock_file_names_the_package_manager(tmp_path: Path, lock: str, manager: str) -> None:
    (tmp_path / lock).touch()
    (tmp_path / "package-lock.json").touch()
    assert write(tmp_path, dependencies={"a": "1"}).manager.value == manager
