"""Lock files that containers offer: from a registry that is known, with the hash of their bytes, or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.write_back.lock_readers import READERS
from orchestrator_stub.write_back.lockfiles import PUBLIC, lock_problem

HOST = sorted(PUBLIC)[0]
OURS = "packages.ours.test"
HASH = "sha512-" + "A" * 86 + "=="
URL = f"https://{HOST}/a/-/a-1.0.0.tgz"
ELSEWHERE = "https://elsewhere.test/a.tgz"


def npm(**package: Any) -> str:
    packages = {
        "": {"name": "x"},
        "node_modules/a": {"version": "1.0.0", **package},
        "apps/web": {"version": "1"},
    }
    return json.dumps({"lockfileVersion": 3, "packages": packages})


def pnpm(resolution: str) -> str:
    package = f"  a@1.0.0:\n    resolution: {resolution}\n    engines: {{node: '>=6'}}\n"
    return f"lockfileVersion: '9.0'\n\npackages:\n\n{package}"


def yarn_1(*lines: str) -> str:
    return "# yarn lockfile v1\n\n\na@^1.0.0:\n" + "".join(
        f"  {line}\n" for line in ('version "1.0.0"', *lines)
    )


def yarn_4(resolution: str, *lines: str) -> str:
    entry = "".join(f"  {line}\n" for line in ("version: 1.0.0", f'resolution: "{resolution}"', *lines))
    project = '"x@workspace:.":\n  version: 0.0.0-use.local\n  resolution: "x@workspace:."\n'
    return f'__metadata:\n  version: 8\n\n"a@npm:^1.0.0":\n{entry}\n{project}'


def bun(*package: object) -> str:
    body = json.dumps({"x": ["x@workspace:apps/x"], "a": list(package)})
    return f'{{\n "lockfileVersion": 1,\n "packages": {body[:-1]},\n }},\n}}\n'


CASES = [
    ("package-lock.json", npm(resolved=URL, integrity=HASH), None),
    ("a/b/package-lock.json", npm(resolved=URL, integrity=HASH), None),
    ("npm-shrinkwrap.json", npm(integrity=HASH), None),  # omit-lockfile-registry-resolved
    ("package-lock.json", npm(link=True, resolved="packages/a"), None),
    ("package-lock.json", npm(inBundle=True), None),
    ("package-lock.json", npm(resolved=f"https://{OURS}/a.tgz", integrity=HASH), None),
    ("package-lock.json", npm(resolved=ELSEWHERE, integrity=HASH), "lock_registry"),
    ("package-lock.json", npm(resolved=f"https://me@{HOST}/a.tgz", integrity=HASH), "lock_registry"),
    (
        "package-lock.json",
        npm(resolved=f"https://{HOST}.elsewhere.test/a.tgz", integrity=HASH),
        "lock_registry",
    ),
    ("package-lock.json", npm(resolved="git+ssh://git@host.test/a.git#abc", integrity=HASH), "lock_registry"),
    ("package-lock.json", npm(resolved="file:../a.tgz", integrity=HASH), "lock_registry"),
    ("package-lock.json", npm(resolved=URL), "lock_integrity"),
    ("package-lock.json", npm(resolved=URL, integrity=""), "lock_integrity"),
    ("package-lock.json", npm(resolved=URL, integrity=["sha512-x"]), "lock_integrity"),
    ("package-lock.json", "{", "lock_format"),
    ("package-lock.json", "[]", "lock_format"),
    ("package-lock.json", '{"packages": {"node_modules/a": 1}}', "lock_format"),
    ("package-lock.json", '{"lockfileVersion": 1, "dependencies": {}}', "lock_format"),
    ("package-lock.json", "[" * 100_000, "lock_format"),
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}}}"), None),
    ("pnpm-lock.yaml", pnpm("{directory: packages/a, type: directory}"), None),
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}, tarball: {URL}}}"), None),
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}, tarball: {ELSEWHERE}}}"), "lock_registry"),
    ("pnpm-lock.yaml", pnpm("{commit: abc, repo: git@host.test:a, type: git}"), "lock_registry"),
    ("pnpm-lock.yaml", pnpm(f"{{tarball: {URL}}}"), "lock_integrity"),
    ("pnpm-lock.yaml", pnpm(f"\n      integrity: {HASH}\n      tarball: {ELSEWHERE}"), "lock_registry"),
    ("pnpm-lock.yaml", "a: 1\n", "lock_format"),
    ("yarn.lock", yarn_1(f'resolved "{URL}#abc"', f"integrity {HASH}"), None),
    ("yarn.lock", yarn_1(f'resolved "{ELSEWHERE}#abc"', f"integrity {HASH}"), "lock_registry"),
    ("yarn.lock", yarn_1(f"integrity {HASH}"), "lock_registry"),
    ("yarn.lock", yarn_1(f'resolved "{URL}#abc"'), "lock_integrity"),
    ("yarn.lock", yarn_4("a@npm:1.0.0", f"checksum: 10c0/{'a' * 128}"), None),
    ("yarn.lock", yarn_4("a@npm:1.0.0"), "lock_integrity"),
    ("yarn.lock", yarn_4(f"a@{ELSEWHERE}", f"checksum: 10c0/{'a' * 128}"), "lock_registry"),
    (
        "yarn.lock",
        yarn_4(
            "a@npm:1.0.0::__archiveUrl=https%3A%2F%2Felsewhere.test%2Fa.tgz", f"checksum: 10c0/{'a' * 128}"
        ),
        "lock_registry",
    ),
    ("bun.lock", bun("a@1.0.0", "", {}, HASH), None),
    ("bun.lock", bun("a@1.0.0", URL, {}, HASH), None),
    ("bun.lock", bun("a@1.0.0", ELSEWHERE, {}, HASH), "lock_registry"),
    ("bun.lock", bun("a@1.0.0", "", {}, ""), "lock_integrity"),
    ("bun.lock", bun(f"a@{ELSEWHERE}", {}), "lock_registry"),
    ("bun.lock", bun({}), "lock_format"),
    ("src/index.ts", "anything", None),
]

SHA = "a" * 128
GOOD = json.dumps({"version": "1.0.0", "resolved": URL, "integrity": HASH})
BAD = json.dumps({"version": "1.0.0", "resolved": ELSEWHERE, "integrity": HASH})
CASES += [
    # npm installs by these fields, whatever else an entry says of itself.
    ("package-lock.json", npm(inBundle=True, resolved=ELSEWHERE, integrity=HASH), "lock_registry"),
    ("package-lock.json", npm(version=ELSEWHERE, integrity=HASH), "lock_registry"),
    ("package-lock.json", npm(name=f"a@{ELSEWHERE}#", integrity=HASH), "lock_registry"),
    ("package-lock.json", npm(name="b", integrity=HASH), None),
    (
        "package-lock.json",
        f'{{"packages": {{}}, "dependencies": {{"a": {GOOD}, "b": {{"version": "npm:c@1.0.0", "resolved": "{URL}",'
        f' "integrity": "{HASH}"}}, "web": {{"version": "file:apps/web"}}}}}}',
        None,
    ),
    ("package-lock.json", f'{{"packages": {{}}, "dependencies": {{"a": {BAD}}}}}', "lock_registry"),
    (
        "package-lock.json",
        f'{{"packages": {{}}, "dependencies": {{"a": {GOOD[:-1]}, "dependencies": {{"b": {BAD}}}}}}}}}',
        "lock_registry",
    ),
    (
        "package-lock.json",
        f'{{"packages": {{}}, "dependencies": {{"a": {{"version": "{ELSEWHERE}", "integrity": "{HASH}"}}}}}}',
        "lock_registry",
    ),
    # Readers differ in which of two they take; JSON.parse makes this name a field, and copying it more than that.
    ("package-lock.json", f'{{"packages": {{"node_modules/a": {BAD}, "node_modules/a": {GOOD}}}}}', "lock_format"),
    ("package-lock.json", npm(integrity=HASH, __proto__={"resolved": ELSEWHERE}), "lock_format"),
    ("package-lock.json", "\ufeff" + npm(resolved=URL, integrity=HASH), "lock_format"),
    ("package-lock.json", '{"packages": ' + '{"a":' * 50_000 + "1" + "}" * 50_001, "lock_format"),
    ("bun.lock", bun("a@1.0.0", "", {}, HASH).replace('"a": [', '"a": ["a@git+ssh://x"], "a": ['), "lock_format"),
    ("bun.lock", bun(f"a@{ELSEWHERE}?@workspace:", "", {}, HASH), "lock_registry"),
    ("bun.lock", bun(f"a@{ELSEWHERE}", "", {}, HASH), "lock_registry"),
    # YAML: what a parser makes of it, not what its lines look like.
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}, type: binary, url: {ELSEWHERE}}}"), "lock_registry"),
    ("pnpm-lock.yaml", pnpm(f'{{integrity: {HASH}, "tarball": "{ELSEWHERE}"}}'), "lock_registry"),
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}, t: &t {ELSEWHERE}}}"), "lock_format"),
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}}} # {{"), None),
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}}}\n    resolution: {{tarball: {ELSEWHERE}}}"), "lock_format"),
    ("pnpm-lock.yaml", pnpm(f"\n      integrity: {HASH}\n      tarball: {URL}"), None),
    ("pnpm-lock.yaml", pnpm(f"{{integrity: {HASH}}}") + "---\npackages: {}\n", "lock_format"),
    ("pnpm-lock.yaml", "lockfileVersion: 9\npackages:\n  ? {a: b}\n  : c\n", "lock_format"),
    ("pnpm-lock.yaml", "lockfileVersion: 9\nx:\n " + "- " * 400_000, "lock_format"),
    ("pnpm-lock.yaml", "lockfileVersion: 9\nx: " + "[" * 400_000, "lock_format"),
    ("yarn.lock", yarn_4("a@npm:1.0.0", "conditions: os=aix & cpu=ppc64"), None),
    (
        "yarn.lock",
        yarn_4("a@npm:1.0.0::__archiveUrl=https%3A%2F%2Felsewhere.test%2Fa.tgz", "conditions: os=aix"),
        "lock_registry",
    ),
    ("yarn.lock", yarn_4(f"a@{ELSEWHERE}?@npm:1.0.0", f"checksum: 10c0/{SHA}"), "lock_registry"),
    ("yarn.lock", yarn_4(f"a@{ELSEWHERE}?workspace:", f"checksum: 10c0/{SHA}"), "lock_registry"),
    ("yarn.lock", yarn_4("a@patch:a@npm%3A1.0.0#optional!builtin<compat/a>", f"checksum: 10c0/{SHA}"), None),
    ("yarn.lock", yarn_4("a@patch:a@https%3A%2F%2Felsewhere.test%2Fa#x", f"checksum: 10c0/{SHA}"), "lock_registry"),
    ("yarn.lock", yarn_4("a@npm:1.0.0", f"checksum: 10c0/{SHA}", f'resolved: "{ELSEWHERE}"'), "lock_format"),
    # Yarn 1 has a grammar of its own.
    ("yarn.lock", yarn_1(f'resolved "{URL}"', f'resolved "{ELSEWHERE}" # x', f"integrity {HASH}"), "lock_format"),
    ("yarn.lock", yarn_1(f'resolved "{URL}"', f'resolved "{ELSEWHERE}"', f"integrity {HASH}"), "lock_format"),
    ("yarn.lock", yarn_1("# x", f'resolved "{ELSEWHERE}"').replace('"1.0.0"', '"1.0.0" # x'), "lock_format"),
    ("yarn.lock", yarn_1(f'resolved "{URL}" resolved "{ELSEWHERE}"', f"integrity {HASH}"), "lock_format"),
    (
        "yarn.lock",
        yarn_1(f'resolved "{URL}"', f"integrity {HASH}", "dependencies:", '  b "^1"', '  "@c/d" "1 || 2"'),
        None,
    ),
    ("yarn.lock", "# yarn lockfile v1\n\n\n", None),
]  # fmt: skip


@pytest.mark.parametrize(("path", "content", "rule"), CASES)
def test_each_entry_is_from_a_known_registry_with_its_hash(path: str, content: str, rule: str | None) -> None:
    assert lock_problem(path, content, None, frozenset({OURS})) == rule


@pytest.mark.parametrize(
    ("path", "content", "rule"), [case for case in CASES if case[2] in ("lock_registry", "lock_integrity")]
)
def test_what_the_project_has_already_is_not_asked_again(path: str, content: str, rule: str | None) -> None:
    assert lock_problem(path, content, content, frozenset()) is None


def test_an_address_that_is_no_packages_source_makes_no_registry() -> None:
    """Where to send money, and what a text names, is not where to install from."""
    funding = {"url": ELSEWHERE}
    before = npm(resolved=URL, integrity=HASH, funding=funding, deprecated=f"see {ELSEWHERE}")
    after = npm(version="2.0.0", resolved=ELSEWHERE, integrity=HASH)
    assert lock_problem("package-lock.json", after, before, frozenset()) == "lock_registry"


def test_a_host_of_the_projects_own_lock_file_may_have_more_packages() -> None:
    before = npm(resolved=f"https://{OURS}/b.tgz", integrity=HASH)
    after = npm(resolved=f"https://{OURS}/a.tgz", integrity=HASH)
    assert lock_problem("package-lock.json", after, None, frozenset()) == "lock_registry"
    assert lock_problem("package-lock.json", after, before, frozenset()) is None
    assert lock_problem("package-lock.json", after, "no lock file", frozenset()) == "lock_registry"


@given(st.sampled_from(sorted(READERS)), st.text(), st.none() | st.text())
def test_whatever_is_offered_is_an_answer(name: str, content: str, before: str | None) -> None:
    assert lock_problem(name, content, before, frozenset()) in (
        None, "lock_registry", "lock_integrity", "lock_format",
    )  # fmt: skip


@given(
    st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_whatever_json_is_offered_is_an_answer(value: object) -> None:
    text = json.dumps({"packages": {"node_modules/a": value, "b": {"resolved": value}}})
    for name in ("package-lock.json", "bun.lock"):
        assert lock_problem(name, text, text, frozenset()) is None or lock_problem(
            name, text, None, frozenset()
        )
