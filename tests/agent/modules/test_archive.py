"""Layers as they are packed and unpacked: equal on both ends, and nothing of a hostile one outside node_modules."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.modules import archive
from agent.modules.layers import command
from agent.modules.tar import Bounds, File, LayerRefused, Link, members
from tests.agent.modules.archives import SMALL, entry, link, listing, made_of, packed, tree

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def unpack(content: bytes, target: Path, bounds: Bounds | None = None) -> int:
    target.mkdir(parents=True, exist_ok=True)
    return archive.unpack(io.BytesIO(content), str(target), bounds)


def test_what_is_packed_is_unpacked_as_it_was(tmp_path: Path) -> None:
    long = "node_modules/" + "/".join(["a-directory-with-a-name"] * 12) + "/file.js"
    source = tree(
        tmp_path / "a",
        {**SMALL, long: "deep", "src/app.js": "not a module", "node_modules/big": bytes(700_000)},
    )
    (source / "node_modules/a/cli.js").chmod(0o775)
    (source / "node_modules/.bin/deep").symlink_to("../" + long.removeprefix("node_modules/"))
    wanted = {name: kept for name, kept in listing(source).items() if "node_modules" in name}
    assert unpack(packed(source), tmp_path / "b") == len(wanted)
    assert listing(tmp_path / "b") == wanted
    assert packed(tmp_path / "b") == packed(source), "an archive follows from its files alone"


def test_any_tar_reads_it(tmp_path: Path) -> None:
    content = zstd.decompress(packed(tree(tmp_path, SMALL)))
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        assert set(opened.getnames()) == set(SMALL)


def test_what_a_dev_server_put_there_is_left_out(tmp_path: Path) -> None:
    tree(tmp_path / "a", {**SMALL, "node_modules/.vite/deps/x.js": "1", "node_modules/.cache/y": "2"})
    unpack(packed(tmp_path / "a"), tmp_path / "b")
    assert set(listing(tmp_path / "b")) == set(SMALL)


def wide(layer: bytes) -> bytes:
    """The same, to be unpacked with 128 MB to look back at."""
    packing = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    return packing.compress(zstd.decompress(layer)) + packing.flush()


HOSTILE = {
    "a path up": ("path", made_of(entry("node_modules/../../out", b"x"))),
    "an absolute path": ("path", made_of(entry("/etc/node_modules/x", b"x"))),
    "beside node_modules": ("path", made_of(entry("src/app.js", b"x"))),
    "node_modules itself": ("path", made_of(entry("node_modules", b"x"))),
    "a link for node_modules": ("path", made_of(link("node_modules", "src"))),
    "an empty segment": ("path", made_of(entry("node_modules//x", b"x"))),
    "a thousand directories deep": ("path", made_of(entry("node_modules/" + "d/" * 1000 + "x", b"x"))),
    "more directories than entries": (
        "entries",
        made_of(*(entry(f"node_modules/{n}/{'d/' * 90}x", b"") for n in range(9))),
    ),
    "a file below a file": (
        "duplicate",
        made_of(entry("node_modules/x", b"x"), entry("node_modules/x/y", b"y")),
    ),
    "twice": ("duplicate", made_of(entry("node_modules/x", b"x"), entry("node_modules/x", b"y"))),
    "a directory where a file is": (
        "duplicate",
        made_of(entry("node_modules/x/y", b"x"), entry("node_modules/x", b"")),
    ),
    "a link to /etc": ("link", made_of(link("node_modules/x", "/etc/passwd"))),
    "a link out": ("link", made_of(link("node_modules/x", "../../x"))),
    "a link to the tree": ("link", made_of(link("node_modules/x", ".."))),
    "a link up after down": (
        "link",
        made_of(link("node_modules/x", "a/../../..")),
    ),
    "through a link": (
        "order",
        made_of(link("node_modules/x", "../node_modules"), entry("node_modules/x/y", b"x")),
    ),
    "a link below a link": (
        "duplicate",
        made_of(link("node_modules/x", "y"), link("node_modules/x/z", "../y")),
    ),
    "setuid": ("rights", made_of(entry("node_modules/x", b"x", mode=0o4755))),
    "another owner": ("rights", made_of(entry("node_modules/x", b"x", uid=1000))),
    "a device": ("kind", made_of(entry("node_modules/x", type=tarfile.CHRTYPE))),
    "a pipe": ("kind", made_of(entry("node_modules/x", type=tarfile.FIFOTYPE))),
    "a hard link": ("kind", made_of(entry("node_modules/x", type=tarfile.LNKTYPE, linkname="/etc/shadow"))),
    "a directory": ("kind", made_of(entry("node_modules/x", type=tarfile.DIRTYPE))),
    "a sparse file": ("kind", made_of(entry("node_modules/x", type=tarfile.GNUTYPE_SPARSE))),
    "no end": ("truncated", made_of(entry("node_modules/x", b"x"), end=b"")),
    "something after the end": (
        "trailing",
        made_of(entry("node_modules/x", b"x"), end=bytes(1024) + b"more"),
    ),
    "another archive after it": ("trailing", made_of(entry("node_modules/x", b"x")) + made_of()),
    "no zstd": ("damaged", b"PK\x03\x04 something else entirely"),
    "nothing": ("truncated", b""),
    "a window of 128 MB": ("damaged", wide(made_of(entry("node_modules/x", b"x")))),
    "a bomb": ("ratio", made_of(entry("node_modules/x", bytes(200 * 2**20)))),
}


@pytest.mark.parametrize(("rule", "content"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_layer_is_refused(tmp_path: Path, rule: str, content: bytes) -> None:
    target = tmp_path / "within" / "tree"
    with pytest.raises(LayerRefused) as refused:
        unpack(content, target, Bounds(entries=500))
    assert refused.value.rule == rule
    outside = [path for path in tmp_path.rglob("*") if "node_modules" not in path.parts]
    assert outside == [tmp_path / "within", target], "nothing but its own directory"


@pytest.mark.parametrize(
    ("rule", "bounds"),
    [("entries", Bounds(entries=2)), ("bytes", Bounds(bytes=10)), ("bytes", Bounds(file_bytes=10))],
)
def test_a_layer_has_bounds(tmp_path: Path, rule: str, bounds: Bounds) -> None:
    with pytest.raises(LayerRefused) as refused:
        unpack(packed(tree(tmp_path / "a", SMALL)), tmp_path / "b", bounds)
    assert refused.value.rule == rule


@given(cut=st.integers(0, 10_000), flip=st.none() | st.integers(0, 10_000))
def test_a_damaged_layer_is_refused_or_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int | None
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    whole = packed(tree(root / "a", SMALL))
    content = bytearray(whole)
    if flip is None:
        content = content[: cut % len(content)]
    else:
        content[flip % len(content)] ^= 1 + cut % 255
    try:
        unpack(bytes(content), root / "b")
    except LayerRefused:
        return
    # What it may still do is say other names and bytes: that is what the hash of each part is for.
    assert all("node_modules" in name for name in listing(root / "b"))


@given(st.binary(max_size=4000))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        for found in members(iter([content]), Bounds()):
            if isinstance(found, File | Link):
                assert b"node_modules" in found.path
                assert b".." not in found.path.split(b"/")
    except LayerRefused:
        pass


def test_what_changed_after_the_install_is_not_packed(tmp_path: Path) -> None:
    tree(tmp_path, SMALL)
    stamp = tmp_path / "stamp"
    stamp.touch()
    os.link(tmp_path / "node_modules/a/cli.js", tmp_path / "the-projects-own")
    with (tmp_path / "the-projects-own").open("a") as file:
        file.write("// patched by a running program")
    with pytest.raises(LayerRefused, match="changed"):
        archive.pack(str(tmp_path), io.BytesIO(), stamp.stat().st_ctime_ns)


@pytest.mark.parametrize(
    "what", ["pipe", "setuid", "a link out", "an absolute link", "a link up again", "too deep"]
)
def test_what_no_layer_may_have_is_not_packed(tmp_path: Path, what: str) -> None:
    tree(tmp_path, SMALL)
    if what == "pipe":
        os.mkfifo(tmp_path / "node_modules/pipe")
    elif "link" in what:
        to = {"a link out": "../../x", "an absolute link": "/usr/lib/x", "a link up again": "a/../../x"}[what]
        (tmp_path / "node_modules/linked").symlink_to(to)
    elif what == "too deep":
        deep = tmp_path / "node_modules" / "/".join("d" * 120)
        deep.mkdir(parents=True)
        (deep / "x").touch()
    else:
        (tmp_path / "node_modules/a/cli.js").chmod(0o4755)
    with pytest.raises(LayerRefused):
        packed(tmp_path)


def test_the_program_takes_little_memory(tmp_path: Path) -> None:
    """Measured as the kernel counts it, with a bare interpreter in it; 32 MB are what a machine has to spare."""
    files = {f"node_modules/p{i % 900}/f{i}.js": os.urandom(50) * 50 for i in range(2_500)}
    source = tree(tmp_path / "a", {**files, "node_modules/native.node": os.urandom(2**20) * 24})
    (tmp_path / "layer").write_bytes(packed(source))
    (tmp_path / "b").mkdir()
    argv = command("unpack", str(tmp_path / "b"))
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    with (tmp_path / "layer").open("rb") as layer:
        said = subprocess.run(
            [sys.executable, "-c", code, *argv],
            stdin=layer,
            capture_output=True,
            text=True,
            check=True,
            env={},
        )
    assert int(said.stdout) / 1024 <= 32
    assert len(listing(tmp_path / "b")) == 2_501


def test_the_program_says_in_one_line_why_it_refuses(tmp_path: Path) -> None:
    done = subprocess.run(
        command("unpack", str(tmp_path)),
        input=made_of(link("node_modules/x", "/etc")),
        capture_output=True,
        env={},
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert done.stdout.decode() == "refused: link: 'node_modules/x' leads to '/etc'\n"
