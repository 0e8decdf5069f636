"""The plugin in each Vite from 5.4 on, and in what calls Vite's `createServer`: really installed, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser.conftest import Browser
from tests.browser.proxy import Proxy
from tests.browser.served import Served
from tests.frameworks.app import App, read_all

pytestmark = [pytest.mark.browser, pytest.mark.nightly]

VITES = ("5.4.21", "6.4.6", "7.3.8", "8.3.8", "8.4.0")
FRAMEWORKS = [app for app in read_all() if app.name in ("astro", "sveltekit", "nuxt", "react-router")]
INSTALL_SECONDS = 300.0
MAIN = """import { tone } from './tone'
import { word } from './word'

const said = document.body.appendChild(document.createElement('p'))
const now = { word, tone }
const say = () => (said.textContent = `${now.word} ${now.tone}`)
say()
import.meta.hot?.accept('./word', (next) => next && say((now.word = next.word)))
import.meta.hot?.accept('./tone', (next) => next && say((now.tone = next.tone)))
"""
BAD = {"astro": "---\nimport x from './nowhere'\n---\n<html><body><h1>{x}</h1></body></html>\n"}
"""What cannot be built; of the others it is a brace without an end."""
SAID = "document.querySelector('p')?.textContent"


def plain(root: Path, vite: str) -> Path:
    """A project of three modules with that Vite and nothing else."""
    package = {"name": "app", "private": True, "type": "module", "scripts": {"dev": "vite"}}
    files = {
        "package.json": json.dumps(package | {"devDependencies": {"vite": vite}}),
        "index.html": '<!doctype html><body><script type="module" src="/src/main.ts"></script></body>\n',
        "src/main.ts": MAIN,
        **words("first"),
    }
    return written(root, files)


def words(name: str) -> dict[str, str | None]:
    return {f"src/{each}.ts": f"export const {each} = '{name}'\n" for each in ("word", "tone")}


def written(root: Path, files: dict[str, str | None] | dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text or "")
    return root


@pytest.mark.parametrize("vite", VITES)
def test_a_vite_is_observed_gated_and_healed(browser: Browser, tmp_path: Path, vite: str) -> None:
    root = plain(tmp_path / "project", vite)
    with Served(root, tmp_path / "modules", seconds=INSTALL_SECONDS) as served:
        served.until("observed", lambda: served.screen.observed)
        with Proxy(int(served.url.rpartition(":")[2])) as proxy:
            browser.do("open", url=proxy.url)
            browser.do("wait", code=f"{SAID} === 'first first'")
            served.shown()
            browser.run("void (window.kept = true)")
            if vite >= "6":
                proxy.cut()
                served.until("it is back", lambda: served.report()["shown"]["how"] == "update")
            served.apply(words("second"))
            browser.do("wait", code=f"{SAID} === 'second second'")
            assert served.shown()["shown"]["how"] == "update"
            assert browser.run("window.kept === true") is True
            revision = served.apply({"src/word.ts": "\nexport const word = (\n"})
            served.until(
                "told", lambda: ("src/word.ts", revision) in [(e[0], e[2]) for e in served.errors("build")]
            )
            served.apply(words("mended"))
            served.until("mended", lambda: served.errors("build", "module", "runtime") == [])
            browser.do("wait", code=f"{SAID} === 'mended mended'")
            served.shown()
            revision = served.apply({"src/tone.ts": None})
            served.until("told", lambda: ("src/main.ts", 1, revision) in served.errors("build"))


TAILWIND = """import type { Config } from 'tailwindcss'

export default {
  content: ['./index.html', './src/**/*.ts'],
  theme: { extend: { colors: { brand: '%s' } } },
} satisfies Config
"""


def test_a_changed_config_of_tailwind_is_in_the_page(browser: Browser, tmp_path: Path) -> None:
    root = plain(tmp_path / "project", "8.3.8")
    package = json.loads((root / "package.json").read_text())
    package["devDependencies"]["tailwindcss"] = "3.4.17"  # a later one has no such file
    written(
        root,
        {
            "package.json": json.dumps(package),
            "postcss.config.js": "export default { plugins: { tailwindcss: {} } }\n",
            "tailwind.config.ts": TAILWIND % "#010203",
            "src/index.css": "@tailwind utilities;\n",
            "src/main.ts": f"import './index.css'\n{MAIN}said.className = 'text-brand'\n",
        },
    )
    look = "getComputedStyle(document.querySelector('p'))"
    with Served(root, tmp_path / "modules", seconds=INSTALL_SECONDS) as served:
        served.until("observed", lambda: served.screen.observed)
        browser.do("open", url=served.url)
        browser.do("wait", code=f"{look}.color === 'rgb(1, 2, 3)'")
        for n in (4, 5):
            served.apply({"tailwind.config.ts": TAILWIND % f"#0{n}0{n}0{n}"})
            browser.do("wait", code=f"{look}.color === 'rgb({n}, {n}, {n})'")
            served.shown()
        served.apply(words("after"))
        browser.do("wait", code=f"{SAID} === 'after after'")
        served.apply({"tailwind.config.ts": "export default {{\n"})
        served.until("told", lambda: "build" in [each["kind"] for each in served.report()["errors"]])
        served.apply({"tailwind.config.ts": TAILWIND % "#060606"})
        browser.do("wait", code=f"{look}.color === 'rgb(6, 6, 6)'")
        served.until("mended", lambda: served.errors("build", "module", "runtime") == [])


@pytest.mark.parametrize("app", FRAMEWORKS, ids=lambda app: app.name)
def test_a_framework_is_observed(browser: Browser, tmp_path: Path, app: App) -> None:
    root = written(tmp_path / "project", app.files)
    environ = {f"DEV_ENV_{name}": value for name, value in app.environ.items()}
    with Served(root, tmp_path / "modules", environ=environ, seconds=INSTALL_SECONDS) as served:
        served.until("observed", lambda: served.screen.observed, 60)
        browser.do("open", url=f"{served.url}{app.page}")
        heading = "document.querySelector('h1')?.textContent"
        browser.do("wait", code=f"{heading} === 'One'")
        served.shown()
        good = app.files[app.save.path]
        for name in ("Two", "Three"):
            served.apply({app.save.path: good.replace("One", name)})
            browser.do("wait", code=f"{heading} === '{name}'")
            served.shown()
        bad = BAD.get(app.name, good.replace("One</h1>", "{oops"))
        revision = served.apply({app.save.path: bad})
        served.until(
            "told",
            lambda: (app.save.path, revision) in [(each[0], each[2]) for each in served.errors("build")],
        )
        served.apply({app.save.path: good.replace("One", "Mended")})
        served.until("mended", lambda: served.errors("build") == [])
        browser.do("wait", code=f"{heading} === 'Mended'")
        served.shown()
