"""What a project's files say: what it depends on, who installs it, and which Node it needs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.project.choice import NothingToServe, ProjectUnreadable, read_small
from agent.project.reading import decides_install, dependencies, find, may_fix, node_missing
from tests.agent.devserver.installs import write


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
            dependencies(tmp_path)
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
    with pytest.raises(NothingToServe):
        find(tmp_path)


@pytest.mark.parametrize("digits", [4300, 4301, 100_000])
def test_a_number_of_any_length_is_read_or_refused(tmp_path: Path, digits: int) -> None:
    (tmp_path / "package.json").write_text(f'{{"dependencies": {{"a": {"9" * digits}}}}}')
    if digits <= 4300:
        assert dependencies(tmp_path).exist
        return
    with pytest.raises(ProjectUnreadable, match=r"^cannot read package\.json: "):
        dependencies(tmp_path)


def test_files_that_are_not_what_they_seem_are_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"name": "secret"}')
    (tmp_path / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "pipe")
    assert read_small(tmp_path / "link", 100) is None
    assert read_small(tmp_path / "pipe", 100) is None
    assert read_small(Path("/dev/zero"), 100) is None
    assert read_small(tmp_path, 100) is None


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
    assert write(tmp_path, dependencies={"a": "1"}).manager.name == manager


@pytest.mark.parametrize(
    ("files", "package"),
    [
        ({"pnpm-lock.yaml": "lockfileVersion: '9.0'\n"}, "pnpm@10"),
        ({"pnpm-lock.yaml": "lockfileVersion: '6.0'\n"}, "pnpm@8"),
        ({"pnpm-lock.yaml": "lockfileVersion: 5.4\n"}, "pnpm@7"),
        ({"pnpm-lock.yaml": ""}, "pnpm@10"),
        ({"yarn.lock": "# yarn lockfile v1\n"}, "yarn@1"),
        ({"pnpm-lock.yaml": "lockfileVersion: '10.0'\n"}, "pnpm@10"),
        ({"yarn.lock": "__metadata:\n  version: 8\n"}, "@yarnpkg/cli-dist@4.13"),
        ({"yarn.lock": "__metadata:\n  version: 9\n"}, "@yarnpkg/cli-dist@4.14"),
        ({"yarn.lock": "__metadata:\n  version: 10\n"}, "@yarnpkg/cli-dist@4"),
        ({"yarn.lock": "__metadata:\n  version: 12\n"}, "@yarnpkg/cli-dist@4"),
        ({"yarn.lock": "__metadata:\n  version: 6\n"}, "@yarnpkg/cli-dist@3"),
        ({"yarn.lock": "", ".yarnrc.yml": ""}, "@yarnpkg/cli-dist@4"),
        ({"bun.lock": "{}"}, "bun@1"),
        ({}, "npm@11"),
    ],
)
def test_the_lock_file_names_the_release_that_reads_it(
    tmp_path: Path, files: dict[str, str], package: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert write(tmp_path, dependencies={"a": "1"}).manager.package == package


@pytest.mark.parametrize(
    ("named", "package"),
    [
        ("pnpm@9.12.0+sha512.abc", "pnpm@9.12.0"),
        ("yarn@4.9.2", "@yarnpkg/cli-dist@4.9.2"),
        ("yarn@1.22.22", "yarn@1.22.22"),
        ("yarn@10.0.0", "@yarnpkg/cli-dist@10.0.0"),
        ("npm@10.9.0", "npm@10.9.0"),
        ("bun@1.3.1", "bun@1.3.1"),
        ("deno@2", "npm@11"),
        ("pnpm@latest", "npm@11"),
        ("pnpm@file:../evil", "npm@11"),
        (7, "npm@11"),
    ],
)
def test_the_field_package_manager_names_the_release(tmp_path: Path, named: object, package: str) -> None:
    assert write(tmp_path, dependencies={"a": "1"}, packageManager=named).manager.package == package


@pytest.mark.parametrize(
    ("asked", "here", "fits"),
    [
        (">=18", "v20.20.2", True),
        (">=22.12.0", "v20.20.2", False),
        ("^20.19.0 || >=22.12.0", "v20.20.2", True),
        ("^20.19.0 || >=22.12.0", "v20.18.0", False),
        ("^22.19.0 || ^24.11.0 || >=26.0.0", "v20.20.2", False),
        (">=18 <23", "v20.20.2", True),
        (">=20.20.2", "v20.20.2", True),
        ("24.x", "v20.20.2", False),
        ("18.x", "v20.20.2", True),
        ("*", "v20.20.2", True),
        ("", "v20.20.2", True),
        ("lts/*", "v20.20.2", True),
        (["22"], "v20.20.2", True),
        ("<23", "v20.20.2", True),
        ("9" * 5000, "v20.20.2", False),
        (">=22", None, False),
    ],
)
def test_a_node_that_is_too_old_is_one_sentence_with_the_remedy(
    tmp_path: Path, asked: object, here: str | None, fits: bool
) -> None:
    write(tmp_path, scripts={"dev": "x"}, engines={"node": asked})
    said = node_missing(find(tmp_path), here)
    assert (said is None) == fits
    assert said is None or ("image" in said and "\n" not in said)


def test_the_node_that_the_dev_server_needs_counts_too(tmp_path: Path) -> None:
    write(tmp_path, scripts={"dev": "astro dev"}, dependencies={"astro": "7"})
    write(tmp_path / "node_modules/astro", engines={"node": ">=22.12.0"})
    said = node_missing(find(tmp_path), "v20.20.2")
    assert said is not None
    assert said.startswith("astro needs Node 22.12.0 or later, and v20.20.2 is here: ")


@pytest.mark.parametrize(
    "path",
    ["src/late.ts", "certs/dev.pem", "schema.graphql", "content/post.md", "src/theme.css", "prisma/schema.prisma",
     "LICENSE", "data/x.bin", "package.json"],
)  # fmt: skip
def test_anything_may_fix_a_failed_server(path: str) -> None:
    assert may_fix([path])
    assert may_fix(["a.png", path])


@pytest.mark.parametrize("path", ["public/a.png", "x/y.JPEG", "font.woff2", "film.mp4"])
def test_but_what_is_handed_out_as_it_is_does_not(path: str) -> None:
    assert not may_fix([path])


@pytest.mark.parametrize(
    ("path", "page", "decides"),
    [
        ("package.json", False, True),
        ("web/package.json", False, True),
        ("web/pnpm-lock.yaml", False, True),
        (".npmrc", False, True),
        ("patches/ms+2.1.3.patch", False, True),
        ("index.html", False, False),
        ("index.html", True, True),
        ("web/index.html", True, True),
        ("src/main.ts", True, False),
    ],
)
def test_what_decides_the_install_and_the_preview(path: str, page: bool, decides: bool) -> None:
    assert decides_install(path, page=page) == decides


def test_a_package_of_a_workspace_is_installed_with_the_workspace(tmp_path: Path) -> None:
    write(tmp_path, workspaces=["apps/*"], private=True)
    write(tmp_path / "apps/web", scripts={"dev": "vite"}, dependencies={"vite": "7"})
    write(tmp_path / "tools/x", dependencies={"a": "1"}, scripts={"dev": "x"})
    found = find(tmp_path)
    assert found.directory == tmp_path / "apps/web"
    assert (found.dependencies.root, found.dependencies.whole_tree) == (tmp_path, True)
    assert find(tmp_path, root="tools/x").dependencies.root == tmp_path / "tools/x"
    write(tmp_path, private=True)
    (tmp_path / "pnpm-workspace.yaml").write_text("packages: [apps/*]")
    assert dependencies(tmp_path).exist, "its packages' dependencies, though the top has none"
    assert find(tmp_path, root="apps/web").dependencies.root == tmp_path


def test_the_projects_own_install_scripts_and_their_patches_are_part_of_the_key(tmp_path: Path) -> None:
    written = write(tmp_path, dependencies={"a": "1"}, scripts={"postinstall": "patch-package"})
    assert not written.whole_tree, "they do not run"
    before = dependencies(tmp_path, scripts=True)
    assert before.whole_tree
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches/a+1.patch").write_text("x")
    assert dependencies(tmp_path, scripts=True).key != before.key
