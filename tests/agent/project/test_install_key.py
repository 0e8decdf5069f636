"""The keys of installs and layers: equal for what is equal, different for what differs, blind to secrets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.project.install_key import Platform, install_key, layer_key, without_secrets
from agent.project.reading import dependencies
from tests.agent.devserver.installs import write

HERE = Platform("115", "linux", "x86_64", "glibc")
NAMES = st.sampled_from(["package-lock.json", ".npmrc", ".yarnrc.yml", "patches/a.patch"])
FILES = st.lists(st.tuples(NAMES, st.binary(max_size=30)), max_size=4)
WHAT = st.dictionaries(st.sampled_from(["fields", "scripts", "manager"]), st.text(max_size=5), max_size=3)


@given(WHAT, FILES, WHAT, FILES)
def test_two_keys_are_equal_where_all_that_decides_is(
    what: dict[str, str],
    files: list[tuple[str, bytes]],
    other: dict[str, str],
    others: list[tuple[str, bytes]],
) -> None:
    def plain(given: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
        return [(name, without_secrets(content) if name[0] == "." else content) for name, content in given]

    same = (what, plain(files)) == (other, plain(others))
    assert (install_key(what, files) == install_key(other, others)) is same


SECRETS = [
    "//registry.test/:_authToken={}",
    "//registry.test/:_password = {}",
    "_auth={}",
    "//registry.test/:username={}",
    "email={}",
    "//registry.test/:certfile={}",
    'npmAuthToken: "{}"',
    "    npmAuthIdent: {}",
    'token = "{}"',
]


@pytest.mark.parametrize("line", SECRETS)
@given(secret=st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=20))
def test_a_credential_does_not_count(line: str, secret: str) -> None:
    def key(value: str) -> str:
        return install_key(
            {}, [(".npmrc", f"legacy-peer-deps=true\n{line.format(value)}\nfund=false".encode())]
        )

    assert key(secret) == key("another")
    assert secret.encode() not in without_secrets(line.format(secret).encode())


@pytest.mark.parametrize("line", ["legacy-peer-deps=true", "registry=one", "@a:registry=two"])
def test_any_other_line_of_the_same_file_counts(line: str) -> None:
    keys = {install_key({}, [(".npmrc", content.encode())]) for content in ("", line, line + "x")}
    assert len(keys) == 3


def test_a_password_in_a_url_does_not_count() -> None:
    assert without_secrets(b"proxy=https://me:secret@one.test/") == b"proxy=https://one.test/"


@given(st.sampled_from(["node_abi", "system", "machine", "libc"]), st.text(min_size=1, max_size=5))
def test_a_layer_is_of_one_platform(field: str, value: str) -> None:
    there = replace(HERE, **{field: value})
    assert (layer_key("k", there) == layer_key("k", HERE)) is (there == HERE)
    assert layer_key("k", HERE) != layer_key("l", HERE)


def test_of_a_project_only_what_decides_its_install_counts(tmp_path: Path) -> None:
    write(tmp_path / "a", dependencies={"x": "1"})
    (tmp_path / "a/.npmrc").write_text("_auth=one\n")
    first = dependencies(tmp_path / "a")
    (tmp_path / "a/.npmrc").write_text("_auth=two\n")
    (tmp_path / "a/src.js").write_text("anything")
    assert dependencies(tmp_path / "a").key == first.key
    assert dependencies(tmp_path / "a", scripts=True).key != first.key
    assert not dependencies(tmp_path / "a", scripts=True).own_scripts
    own = write(tmp_path / "a", dependencies={"x": "1"}, scripts={"postinstall": "node make.js"})
    assert not own.own_scripts
    assert dependencies(tmp_path / "a", scripts=True).own_scripts
