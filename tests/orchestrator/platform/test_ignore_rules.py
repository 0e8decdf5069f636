"""Which paths are the project's: held against `git check-ignore` itself, and the defaults where there is no git."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator_stub.platform.ignore_rules import IgnoreRules, LeftOut

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

NAMES = ["a", "b", "build", "src", "x.log", "keep.log", "foo bar", ".env", "ü"]
PATTERNS = [
    "a",
    "/a",
    "a/",
    "a/b",
    "/a/b/",
    "*.log",
    "!keep.log",
    "build/",
    "!build/",
    "**/b",
    "a/**",
    "a/**/b",
    "*",
    "!a",
    "!*/",
    "src/*",
    "!src/a",
    "[ab]",
    "[!a]",
    "?",
    "foo\\ bar",
    "foo bar ",
    "#a",
    "\\#a",
    "\\!a",
    "!",
    "",
    " ",
    "ü",
    "/*",
    "x.log\r",
    "*.l?g",
    "a*",
    "**",
    "/**/",
    "b/*.log",
    ".*",
    "!.env",
]

paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)
rules = st.lists(st.sampled_from(PATTERNS), max_size=5).map("\n".join)
places = st.sampled_from(["", "a", "src", "a/b", "build"])


def ignored_by_git(root: Path, asked: list[str]) -> set[str]:
    done = subprocess.run(
        ["git", "-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index", "--stdin", "-z"],
        input="\0".join(asked).encode() + b"\0", capture_output=True, cwd=root, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return {path.decode() for path in done.stdout.split(b"\0") if path}


@needs_git
@settings(deadline=None)
@given(
    files=st.lists(paths, min_size=1, max_size=8),
    ignores=st.dictionaries(places, rules, max_size=3),
    exclude=rules,
    inner=st.sampled_from(["", "a", "src/b"]),
)
def test_it_says_what_git_says(files: list[str], ignores: dict[str, str], exclude: str, inner: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        subprocess.run(["git", "init", "-q", directory], check=True)
        (top / ".git/info/exclude").write_text(exclude)
        root = top / inner
        root.mkdir(parents=True, exist_ok=True)
        standing = []
        for path in files:
            file = root / path
            if any(parent.is_file() for parent in file.parents) or file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
            standing.append(path)
        for place, text in ignores.items():
            if (top / place).is_dir():
                (top / place / ".gitignore").write_text(text)
        # A directory that somebody names is wanted, whatever the repository around it says of it as a whole.
        assume(not (inner and ignored_by_git(top, [inner])))
        left_out = IgnoreRules(root)
        ours = {path for path in standing if left_out.left_out(path) is not None}
        assert ours == ignored_by_git(root, standing), (standing, ignores, exclude, inner)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("dist/x", LeftOut.DEFAULT),
        ("src/dist/x", None),
        ("src/build/x", None),
        ("build", None),
        ("coverage/x", LeftOut.DEFAULT),
        ("npm.log", LeftOut.DEFAULT),
        (".env", LeftOut.SECRET),
        ("web/.env.local", LeftOut.SECRET),
        (".env.example", None),
        ("server.pem", LeftOut.SECRET),
        (".npmrc", LeftOut.SECRET),
        ("a/node_modules/x", LeftOut.NEVER),
        (".git", LeftOut.NEVER),
        ("sub/.git", LeftOut.NEVER),
        ("x~", LeftOut.LEFTOVER),
        ("a/.#x", LeftOut.LEFTOVER),
        ("4913", LeftOut.LEFTOVER),
        ("a/.x.swp", LeftOut.LEFTOVER),
        ("src/x.ts.conflict-v7", LeftOut.LEFTOVER),
        ("node_modules.ts", None),
        ("a/b/c", None),
    ],
)
def test_without_git_the_defaults_say_it(tmp_path: Path, path: str, reason: LeftOut | None) -> None:
    assert IgnoreRules(tmp_path).left_out(path) is reason


def test_a_directory_with_rules_says_itself_what_is_shared(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.local\n/out\n")
    rules = IgnoreRules(tmp_path)
    assert rules.left_out(".env") is None
    assert rules.left_out("dist/x") is None
    assert rules.left_out(".env.local") is LeftOut.GIT
    assert rules.left_out("out/deep/x") is LeftOut.GIT


def test_what_is_included_comes_back_and_what_must_never_be_does_not(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("*.local\n/out\n")
    rules = IgnoreRules(tmp_path, [".env.local", "out/", "node_modules/", "!", "x~"])
    assert rules.left_out(".env.local") is None
    assert rules.left_out("b.local") is LeftOut.GIT
    assert rules.left_out("out/deep/x") is None
    assert rules.left_out("node_modules/x") is LeftOut.NEVER
    assert rules.left_out("x~") is LeftOut.LEFTOVER


def test_rules_that_are_no_text_or_no_file_hurt_nobody(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_bytes(b"\xef\xbb\xbf*.log\n\xff\xfe\n!\n\\\n")
    (tmp_path / "a/.gitignore").mkdir(parents=True)
    rules = IgnoreRules(tmp_path)
    assert rules.left_out("x.log") is LeftOut.GIT
    assert rules.left_out("a/x") is None


def test_rules_that_cannot_be_read_are_an_error_and_not_none(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").symlink_to(".gitignore")
    with pytest.raises(OSError, match="symbolic links"):
        IgnoreRules(tmp_path).left_out("x")
