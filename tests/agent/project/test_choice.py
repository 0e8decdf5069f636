"""What of a project is previewed, and what is said where it is nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.project import choice
from agent.project.choice import NAMES, NothingToServe, ProjectUnreadable, choose
from agent.project.reading import find

VITE = {"devDependencies": {"vite": "^7"}}
DEV = {"scripts": {"dev": "node s.js"}}


def put(root: Path, packages: Mapping[str, object], pages: tuple[str, ...] = ()) -> Path:
    """Write a package.json for each place, and an index.html."""
    for place, package in packages.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "package.json").write_text(json.dumps(package))
    for place in pages:
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place / "index.html").write_text("<p>hi")
    return root


@pytest.mark.parametrize(
    ("packages", "place", "why"),
    [
        ({"": DEV}, "", "package.json is at the top"),
        ({"": VITE, "frontend": VITE}, "", "package.json is at the top"),
        ({"frontend": VITE}, "frontend", "it is the only directory that depends on a known dev server"),
        ({"frontend": VITE, "backend": DEV}, "frontend", "it is the only directory that depends on a known"),
        ({"apps/web": VITE}, "apps/web", "it is the only directory that depends on a known dev server"),
        ({"client": VITE, "admin": VITE}, "client", "of admin, client it has the name of a front end"),
        ({"web": VITE, "frontend": VITE}, "frontend", "of frontend, web it has the name of a front end"),
        ({"apps/docs": VITE, "apps/site": VITE}, "apps/site", "of apps/docs, apps/site it has the name"),
        ({"api": DEV, "tools": {}}, "api", 'it is the only directory that has a "dev" script'),
        ({"client": DEV, "server": DEV}, "client", "of client, server it has the name of a front end"),
        ({"": {"devDependencies": {"prettier": "3"}}, "app": VITE}, "app", "it is the only directory that"),
    ],
)
def test_the_directory_that_is_chosen_and_why(
    tmp_path: Path, packages: Mapping[str, object], place: str, why: str
) -> None:
    chosen, _ = choose(put(tmp_path, packages))
    assert chosen.place == place
    assert chosen.why.startswith(why)


@pytest.mark.parametrize(("pages", "place"), [(("",), ""), (("site",), "site"), (("a/public",), "a/public")])
def test_a_page_alone_is_chosen(tmp_path: Path, pages: tuple[str, ...], place: str) -> None:
    chosen, _ = choose(put(tmp_path, {}, pages))
    assert (chosen.place, chosen.is_page) == (place, True)


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        ({}, "there is no package.json and no index.html in the project"),
        ({"": {"scripts": {"serve": "vite"}}}, 'package.json has no script "dev" or "start" (it has serve)'),
        (
            {"lib": {"scripts": {"build": "tsc"}}},
            'lib/package.json has no script "dev" or "start" (it has build)',
        ),
        ({"a": VITE, "b": VITE}, "several directories could be previewed, a (Vite), b (Vite)"),
        ({"a/b/c": VITE}, "there is no package.json and no index.html in the project"),
    ],
)
def test_nothing_to_serve_is_one_sentence_with_what_was_found_and_the_remedy(
    tmp_path: Path, packages: Mapping[str, object], said: str
) -> None:
    with pytest.raises(NothingToServe) as refused:
        choose(put(tmp_path, packages))
    assert str(refused.value).startswith(said)
    assert "DEV_ROOT" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ((), "there is no package.json and no index.html in the project; add a package.json with"),
        (
            ("README.md",),
            "there is no package.json and no index.html in the project; add a package.json with",
        ),
        (("requirements.txt", "app.py", "templates/index.html"), "for its app.py set DEV_COMMAND"),
        (("pyproject.toml", "src/x.py"), "for its pyproject.toml set DEV_COMMAND"),
        (("go.mod", "main.go", "web/index.html"), "such as 'go run .', in an image that has"),
        (("Makefile", "main.c"), "or its command in DEV_COMMAND"),
        (("deno.json", "main.ts"), "such as 'deno task dev'"),
        (("Gemfile", "bin/rails", "public/index.html"), "such as 'bin/rails server'"),
        (("composer.json", "public/index.php"), "such as 'php -S"),
    ],
)
def test_another_kind_of_project_is_told_what_makes_it_run(
    tmp_path: Path, files: tuple[str, ...], said: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(NothingToServe) as refused:
        choose(tmp_path)
    assert said in str(refused.value)
    assert "DEV_COMMAND" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("files", [("app.py", "index.html"), ("Makefile", "site/index.html")])
def test_a_page_that_is_meant_is_served_whatever_is_beside_it(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert choose(tmp_path)[0].is_page


@pytest.mark.parametrize("root", ["b", "b/", "./", "."])
def test_dev_root_names_it(tmp_path: Path, root: str) -> None:
    put(tmp_path, {"": DEV, "a": VITE, "b": VITE})
    assert choose(tmp_path, root)[0].place == root.strip("./")


@pytest.mark.parametrize(
    "root", ["../x", "/etc", "a/../..", "missing", "link", "link/inside", "a\0b", "node_modules"]
)
def test_dev_root_names_no_directory_outside(tmp_path: Path, root: str) -> None:
    project = put(tmp_path / "p", {"a": VITE})
    put(tmp_path, {"x": VITE, "x/inside": VITE})
    (project / "link").symlink_to(tmp_path / "x")
    with pytest.raises(NothingToServe, match=r"DEV_ROOT is .* no such directory"):
        choose(project, root)


def test_the_only_candidate_being_broken_is_said(tmp_path: Path) -> None:
    put(tmp_path, {"web": {}})
    (tmp_path / "web" / "package.json").write_text("{")
    with pytest.raises(ProjectUnreadable, match=r"^cannot read web/package\.json: "):
        choose(tmp_path)


def test_links_and_installed_packages_are_no_candidates(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", {"": VITE})
    project = put(tmp_path / "p", {"node_modules/vite": VITE, ".hidden": VITE, "a/node_modules": VITE})
    (project / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NothingToServe):
        choose(project)


def test_a_package_json_of_many_megabytes_and_many_directories_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, {"web": VITE})
    with (tmp_path / "package.json").open("wb") as sparse:
        sparse.truncate(64 * 2**20)
    with pytest.raises(ProjectUnreadable, match="too large"):
        choose(tmp_path)
    os.remove(tmp_path / "package.json")
    asked: list[str] = []
    exists = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: asked.append(str(path)) or exists(path))  # type: ignore[func-returns-value]
    monkeypatch.setattr(choice, "MOST_DIRECTORIES", 50)
    for number in range(200):
        (tmp_path / f"d{number:03}").mkdir()
    with pytest.raises(NothingToServe):
        choose(tmp_path)
    assert len(asked) <= 2 * 50 + 4 + len(choice.OTHERS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda x: st.lists(x, max_size=3)
)
PACKAGE = st.dictionaries(
    st.sampled_from(
        ["scripts", "dependencies", "devDependencies", "workspaces", "packageManager", "engines", "config"]
    ),
    JSON
    | st.dictionaries(st.sampled_from(["dev", "predev", "start", "vite", "next", "node"]), JSON, max_size=3),
    max_size=5,
)
PLACES = st.sampled_from(["", *NAMES, "apps/web", "x", "x/y"])


@settings(max_examples=150)
@given(packages=st.dictionaries(PLACES, PACKAGE | JSON, max_size=4), root=st.none() | PLACES)
def test_a_package_json_of_any_shape_is_chosen_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, packages: dict[str, object], root: str | None
) -> None:
    directory = put(tmp_path_factory.mktemp("p"), packages)
    found, said = None, ""
    try:
        found = find(directory, root=root)
    except (NothingToServe, ProjectUnreadable) as refused:
        said = str(refused)
    assert bool(found) != bool(said)
    assert "\n" not in said
    if found is None:
        return
    assert found.chosen.place in packages
    assert found.command(modules=directory, path="/nowhere")
    env = found.environment({}, host="::", port=5, preview_host=None, fresh=False)
    assert all(isinstance(value, str) and "\0" not in value for value in env.values())
    assert found.report()["why"]
