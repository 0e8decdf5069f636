"""What may be shared between projects: only what a hash names, from the registry that everybody uses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.project.sources import SHOWN, not_shareable

HERE = "http://registry.here.test/npm"
DEFAULT = "https://registry.everybodys.test/"
ELSEWHERE = "https://elsewhere.test"
BOTH = (HERE, DEFAULT)
GOOD = {"version": "1.0.0", "integrity": "sha512-abc"}


def lock(**packages: Any) -> bytes:
    named = {f"node_modules/{name}": package for name, package in packages.items()}
    return json.dumps({"lockfileVersion": 3, "packages": {"": {"name": "p"}, **named}}).encode()


@pytest.mark.parametrize("resolved", [None, f"{DEFAULT}a/-/a-1.0.0.tgz", f"{HERE}/a/-/a-1.0.0.tgz"])
def test_a_package_of_the_registry_may_be_shared(resolved: str | None) -> None:
    package = {**GOOD, **({"resolved": resolved} if resolved else {})}
    assert not_shareable(lock(a=package, b={"inBundle": True}), b"legacy-peer-deps=true", BOTH) == []


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ({**GOOD, "resolved": "git+ssh://git@host.test/a.git#abc"}, "not from the public registry"),
        ({**GOOD, "resolved": f"{ELSEWHERE}/a.tgz"}, "not from the public registry"),
        ({**GOOD, "resolved": f"{HERE}.elsewhere.test/a.tgz"}, "not from the public registry"),
        ({**GOOD, "resolved": "file:../a.tgz"}, "directory of the project"),
        ({"resolved": "packages/a", "link": True}, "directory of the project"),
        ({"version": "1.0.0"}, "no integrity"),
        ({**GOOD, "integrity": "md5-abc"}, "no integrity"),
        ({**GOOD, "integrity": 7}, "no integrity"),
        ("nonsense", "directory of the project"),
    ],
)
def test_another_one_may_not(package: object, said: str) -> None:
    [reason] = not_shareable(lock(a=package), b"", BOTH)
    assert reason.startswith("node_modules/a ")
    assert said in reason


def test_a_workspaces_package_may_not() -> None:
    content = json.dumps({"packages": {"": {}, "packages/a": {"version": "1.0.0"}}}).encode()
    assert not_shareable(content, b"", BOTH) == ["packages/a is a directory of the project"]


@pytest.mark.parametrize("npmrc", [b"registry=x", b"fund=false\n@mine:registry = x"])
def test_settings_that_name_a_registry_may_not(npmrc: bytes) -> None:
    assert not_shareable(lock(a=GOOD), npmrc, BOTH) == [".npmrc names a registry of its own"]


@given(
    st.none() | st.binary(max_size=50) | st.from_type(dict).map(lambda each: json.dumps(str(each)).encode())
)
def test_whatever_is_no_lock_file_may_not(content: bytes | None) -> None:
    assert not_shareable(content, b"", BOTH)


def test_the_reasons_are_bounded() -> None:
    assert len(not_shareable(lock(**{f"p{number}": {} for number in range(99)}), b"", BOTH)) == SHOWN
