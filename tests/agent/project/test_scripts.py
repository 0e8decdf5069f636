"""Scripts are run as npm runs them, and the dev server in them is told where to listen, wherever it stands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.project import scripts
from agent.project.reading import find

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="needs Node")
SHOW = "console.log('SHOWN ' + JSON.stringify([process.argv.slice(2), process.env.HOST ?? '', process.env.PORT ?? '']))"
BINS = {
    "vite": "vite/bin/vite.js", "next": "next/dist/bin/next", "ng": "@angular/cli/bin/ng.js", "other": "other/cli.js",
    "react-scripts": "react-scripts/bin/react-scripts.js", "eleventy": "@11ty/eleventy/cmd.cjs", "expo": "expo/bin/cli",
    "astro": "astro/astro.js", "nuxt": "@nuxt/cli/bin/nuxi.mjs",
}  # fmt: skip


def installed(root: Path, **package: object) -> Path:
    """A project whose programs only say what they were given."""
    (root / "node_modules/.bin").mkdir(parents=True)
    for name, place in BINS.items():
        program = root / "node_modules" / place
        program.parent.mkdir(parents=True)
        shown = SHOW if not place.endswith(".mjs") else SHOW.replace("require", "import")
        program.write_text(f"#!/usr/bin/env node\n{shown}\n")
        program.chmod(0o755)
        (root / "node_modules/.bin" / name).symlink_to(f"../{place}")
    (root / "package.json").write_text(json.dumps({"name": "p", "version": "1.2.3", **package}))
    return root


def run(root: Path, *, fresh: bool = False, preview_host: str | None = None, **given: str) -> list[str]:
    """Start the project as the supervisor does; the lines it printed."""
    found = find(root)
    env = found.environment(
        {"PATH": os.environ["PATH"], **given}, host="::", port=5, preview_host=preview_host, fresh=fresh
    )
    argv = found.command(modules=root / "nowhere", path=env["PATH"])
    done = subprocess.run(argv, cwd=found.directory, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def shown(lines: list[str]) -> list[tuple[list[str], str, str]]:
    return [tuple(json.loads(line[6:])) for line in lines if line.startswith("SHOWN ")]


VITE = ["--host", "::", "--port", "5", "--strictPort"]


@needs_node
@pytest.mark.parametrize(
    ("script", "given"),
    [
        ("vite", VITE),
        ("vite dev", ["dev", *VITE]),
        ("vite --mode staging", [*VITE, "--mode", "staging"]),
        ("vite --port 3000 --host", VITE),
        ("vite --port=3000 --host 0.0.0.0 --open", VITE),
        ("vite build --watch", ["build", "--watch"]),
        ("FOO=1 vite", VITE),
        ("node -e 0 && vite", VITE),
        ("vite & node -e 0; wait", VITE),
        ("sh -c 'vite'", VITE),
        ("npx --no-install vite", VITE),
        ("npm run --silent inner", VITE),
        ("next dev -p 3000 --turbopack", ["dev", "--hostname", "::", "--port", "5", "--turbopack"]),
        ("next build", ["build"]),
        ("astro dev", ["dev", "--host", "::", "--port", "5"]),
        ("nuxt dev -p 3000", ["dev", "--host", "::", "--port", "5"]),
        ("ng serve --open", ["serve", "--host", "::", "--port", "5"]),
        ("eleventy --serve", ["--port", "5", "--serve"]),
        ("eleventy", []),
        ("expo start --web", ["start", "--port", "5", "--web"]),
        ("other --port 7", ["--port", "7"]),
    ],
)
def test_the_flags_go_to_the_dev_server_and_to_nothing_else(
    tmp_path: Path, script: str, given: list[str]
) -> None:
    root = installed(tmp_path, scripts={"dev": script, "inner": "vite"})
    assert [argv for argv, _, _ in shown(run(root))] == [given]


@needs_node
def test_of_several_programs_only_the_known_server_is_told_the_port(tmp_path: Path) -> None:
    """An API beside it that listens on $PORT, or else on its own, must not take the preview's."""
    root = installed(tmp_path, scripts={"dev": "other api; vite"})
    assert shown(run(root)) == [(["api"], "", ""), (VITE, "", "")]


@needs_node
@pytest.mark.parametrize("script", ["other", "other a & wait", "node -e 0 && other"])
def test_a_server_that_is_not_known_is_told_by_the_environment(tmp_path: Path, script: str) -> None:
    root = installed(tmp_path, scripts={"dev": script})
    assert [told[1:] for told in shown(run(root))] == [("::", "5")]


@needs_node
def test_create_react_app_reads_the_environment(tmp_path: Path) -> None:
    root = installed(tmp_path, scripts={"start": "react-scripts start; other"})
    assert shown(run(root)) == [(["start"], "::", "5"), ([], "", "")]


@needs_node
def test_a_fresh_start_and_a_domain_are_flags_too(tmp_path: Path) -> None:
    root = installed(tmp_path, scripts={"dev": "vite; ng serve"})
    vite, angular = shown(run(root, fresh=True, preview_host="p.example q.example"))
    assert vite[0] == [*VITE, "--force"]
    assert angular[0][-4:] == ["--allowed-hosts", "p.example", "--allowed-hosts", "q.example"]


@needs_node
@pytest.mark.parametrize(
    ("release", "given", "wanted"),
    [
        ("blockCrossSiteDEV", "undefined", ["p.example", "**.q.example", "q.example"]),
        ("blockCrossSiteDEV", "['own']", ["own", "p.example", "**.q.example", "q.example"]),
        ("blockCrossSite", "['own']", ["own", "p.example", "**.q.example", "q.example"]),
        ("blockCrossSite", "undefined", None),
    ],
)
def test_next_is_told_of_domains_where_it_asks_for_them(
    tmp_path: Path, release: str, given: str, wanted: list[str] | None
) -> None:
    root = installed(tmp_path, scripts={"dev": "next dev"})
    name = "block-cross-site" + ("-dev" if release.endswith("DEV") else "")
    lib = root / "node_modules/next/dist/server/lib"
    lib.mkdir(parents=True)
    (lib / f"{name}.js").write_text(
        "Object.defineProperty(exports, '__esModule', { value: true });"
        f"Object.defineProperty(exports, '{release}', {{ enumerable: true, get: () => (...given) => given }})"
    )
    (root / "node_modules/next/dist/bin/next").write_text(
        "#!/usr/bin/env node\n"
        f"console.log(JSON.stringify(require('../server/lib/{name}').{release}('q', 's', {given}, 'own')))"
    )
    told = json.loads(run(root, preview_host="p.example .q.example")[0])
    assert told == ["q", "s", wanted, "own"]


@needs_node
def test_node_options_of_the_projects_own_are_kept(tmp_path: Path) -> None:
    (tmp_path / "own.cjs").write_text("console.log('own')")
    root = installed(tmp_path / "p", scripts={"dev": "vite"})
    lines = run(root, NODE_OPTIONS=f"--require={tmp_path / 'own.cjs'}")
    assert lines[0] == "own"
    assert shown(lines)[0][0] == VITE


@needs_node
def test_scripts_before_and_after_names_and_programs_are_as_npm_has_them(tmp_path: Path) -> None:
    root = installed(
        tmp_path,
        config={"color": "red"},
        scripts={
            "predev": "echo $npm_lifecycle_event", "postdev": "echo $npm_lifecycle_event",
            "dev": "echo $npm_lifecycle_event $npm_package_name $npm_package_version $npm_package_config_color; other",
        },
    )  # fmt: skip
    lines = run(root)
    assert [line for line in lines if "SHOWN" not in line] == ["predev", "dev p 1.2.3 red", "postdev"]
    by_npm = subprocess.run(
        ["npm", "run", "--silent", "dev"], cwd=root, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    assert [line for line in by_npm if "SHOWN" not in line] == ["predev", "dev p 1.2.3 red", "postdev"]


def test_a_script_before_that_fails_ends_it(tmp_path: Path) -> None:
    argv = scripts.command({"predev": "echo one; exit 3", "dev": "echo two"}, "dev")
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "one\n")


@needs_node
def test_of_several_apps_that_one_script_starts_only_the_front_end_is_told(tmp_path: Path) -> None:
    """As `turbo run dev` does: each in its own directory, with the programs hoisted."""
    root = installed(
        tmp_path, scripts={"dev": "npm-run-all x; (cd apps/docs && next dev); (cd apps/web && next dev)"}
    )
    (root / "node_modules/.bin/npm-run-all").symlink_to("../other/cli.js")
    for name in ("docs", "web"):
        (root / "apps" / name).mkdir(parents=True)
        package = {"dependencies": {"next": "1"}, "scripts": {"dev": "next dev"}}
        (root / "apps" / name / "package.json").write_text(json.dumps(package))
    assert [argv for argv, _, _ in shown(run(root))][1:] == [
        ["dev"], ["dev", "--hostname", "::", "--port", "5"],
    ]  # fmt: skip


def test_each_tool_is_known_by_one_package_and_one_program() -> None:
    packages = [package for tool in scripts.TOOLS for package in tool.packages]
    assert len(packages) == len(set(packages))
    for tool in scripts.TOOLS:
        assert scripts.known_tool({"devDependencies": {tool.packages[0]: "1"}}) is tool
        assert scripts.named_tool(tool.script, ()) is tool
