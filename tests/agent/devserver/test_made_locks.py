"""The lock file that an install by package.json alone makes is handed over once; its return installs nothing."""

from __future__ import annotations

import json
from pathlib import Path

from agent.devserver.install import InstallOutcome
from agent.project.locks import Locks
from agent.project.reading import dependencies
from tests.agent.devserver.installs import Bench, needs_npm, with_dependency

LOCK = "package-lock.json"


@needs_npm
async def test_a_lock_made_by_an_install_is_handed_over_once_for_each_package_json(tmp_path: Path) -> None:
    made: list[tuple[str, bytes]] = []
    allowed = {LOCK}
    locks = Locks(lambda path: path in allowed, lambda path, content: made.append((path, content)))
    bench = Bench(tmp_path, locks=locks)
    result = await bench.install(with_dependency(bench.root))
    assert (result.outcome, result.problem) == (InstallOutcome.INSTALLED, None)
    (path, content), *more = made
    assert (path, more) == (LOCK, [])
    assert json.loads(content)["packages"]["node_modules/dep"]
    assert not (bench.root / LOCK).exists(), "the installer writes nothing into the project"

    (bench.root / LOCK).write_bytes(content)  # it came back as a version of the project
    result = await bench.install(dependencies(bench.root))
    assert (result.outcome, result.swapped) == (InstallOutcome.CURRENT, False)

    # A package.json that the lock does not know: npm makes it whole in the stage.
    (bench.root / "other").mkdir()
    (bench.root / "other/package.json").write_text('{"name": "other", "version": "1.0.0"}')
    package = json.loads((bench.root / "package.json").read_text())
    package["dependencies"]["other"] = "file:./other"
    (bench.root / "package.json").write_text(json.dumps(package))
    before = (bench.root / "package.json").read_bytes()
    result = await bench.install(dependencies(bench.root))
    assert result.outcome is InstallOutcome.INSTALLED
    assert [path for path, _ in made] == [LOCK, LOCK]
    assert json.loads(made[1][1])["packages"]["node_modules/other"]
    assert (bench.root / "package.json").read_bytes() == before
    assert (bench.root / LOCK).read_bytes() == content

    allowed.clear()
    package["dependencies"].pop("other")
    (bench.root / "package.json").write_text(json.dumps(package))
    await bench.install(dependencies(bench.root))
    assert len(made) == 2, "where no rule takes it none is made"
