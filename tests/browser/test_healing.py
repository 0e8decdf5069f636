"""What mends itself: pages whose dev server alone would leave them wrong until somebody reloads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.conftest import Browser
from tests.browser.proxy import Proxy
from tests.browser.served import Served, small_project

pytestmark = pytest.mark.browser

LEAF = 'export function Leaf() {\n  return <p data-leaf="good">leaf</p>\n}\n'
PICTURE = '<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="10" />\n'
PLUGIN = """export default {
  plugins: [
    {
      postcssPlugin: 'mark',
      Declaration(declaration) {
        if (declaration.prop === '--mark') declaration.value = '%s'
      },
    },
  ],
}
"""
CONFIG = """import react from '@vitejs/plugin-react'
import fs from 'node:fs'

const failing = {
  name: 'failing',
  configureServer(server) {
    server.middlewares.use((request, answer, next) => {
      if (!request.url.startsWith('/src/Leaf.tsx') || !fs.existsSync('../fail-once')) return next()
      fs.unlinkSync('../fail-once')
      answer.writeHead(504, 'Outdated Optimize Dep').end()
    })
  },
}
const rendering = {
  name: 'rendering',
  async transformIndexHtml(html, { server }) {
    return html.includes('WORD') ? html.replace('WORD', (await server.ssrLoadModule('/src/word.ts')).word) : html
  },
}
export default { plugins: [react(), failing, rendering] }
"""
"""Once it is told to, it answers as Vite does when it bundles dependencies anew; and it renders a page."""
HYDRATED = """import { word } from './word.ts'
const said = document.querySelector('[data-said]')!
said.setAttribute('data-said', 'by the page')
console.log(word)
import.meta.hot?.accept('./word.ts', (next) => (said.textContent = next!.word))
"""
"""Takes over what was rendered as it stands, as frameworks do, when it is told to."""

FILES: dict[str, str | None] = {
    "src/Leaf.tsx": LEAF,
    "src/App.tsx": (
        "import { Leaf } from './Leaf.tsx'\nexport function App() {\n"
        '  return <main><input id="kept" /><img id="picture" src="/picture.svg" /><Leaf /></main>\n}\n'
    ),
    "src/index.css": "main { --mark: 0 }\n",
    "public/picture.svg": PICTURE % 10,
    "postcss.config.mjs": PLUGIN % "one",
    "vite.config.ts": CONFIG,
    "rendered.html": (
        '<body><p data-said>WORD</p><script type="module">'
        "window.hydrate = () => import('/src/hydrated.ts').then(() => 0)</script></body>\n"
    ),
    "src/hydrated.ts": HYDRATED,
    "src/word.ts": "export const word = 'first'\n",
}
MARK = "getComputedStyle(document.querySelector('main')).getPropertyValue('--mark').trim()"
STATE = "window.kept === true && document.querySelector('#kept').value === 'typed'"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Iterator[Served]:
    root = small_project(tmp_path_factory.mktemp("healing") / "project", FILES)
    with Served(root, installed) as served:
        yield served


@pytest.fixture
def served(running: Served) -> Served:
    """The project as it should be, whatever the test before left."""
    running.apply(FILES)
    running.until("observed", lambda: running.screen.observed)
    return running


def opened(browser: Browser, served: Served, url: str | None = None) -> None:
    """A page that shows the project, with state that a reload would lose."""
    browser.do("open", url=url or served.url)
    browser.do("wait", code="document.querySelector('[data-leaf]')")
    served.shown()  # by then a page that came in the middle of an update was loaded anew
    browser.do("wait", code="document.querySelector('#kept')")
    browser.run("void (document.querySelector('#kept').value = 'typed', window.kept = true)")


def test_a_changed_config_of_postcss_is_in_the_page(browser: Browser, served: Served) -> None:
    opened(browser, served)
    browser.do("wait", code=f"{MARK} === 'one'")
    served.apply({"postcss.config.mjs": PLUGIN % "two"})
    browser.do("wait", code=f"{MARK} === 'two'")
    served.shown()
    served.apply({"src/Leaf.tsx": LEAF.replace("good", "later")})
    browser.do("wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'later'")
    served.shown()


def test_a_changed_file_of_public_is_in_the_page(browser: Browser, served: Served) -> None:
    opened(browser, served)
    width = "document.querySelector('#picture')?.naturalWidth"
    browser.do("wait", code=f"{width} === 10")
    served.apply({"public/picture.svg": PICTURE % 20})
    browser.do("wait", code=f"{width} === 20")
    assert served.shown()["shown"]["how"] == "reload"
    served.apply({"public/picture.svg": None})
    browser.do("wait", code=f"{width} === 0")
    served.apply({"public/picture.svg": PICTURE % 30})
    browser.do("wait", code=f"{width} === 30")


@pytest.mark.parametrize("viewed", [True, False])
def test_a_deleted_file_that_is_still_imported_is_an_error(
    browser: Browser, served: Served, viewed: bool
) -> None:
    opened(browser, served)
    if not viewed:
        browser.do("close")
        served.until("nobody looks", lambda: served.report()["shown"] is None)
    revision = served.apply({"src/Leaf.tsx": None})
    served.until("told", lambda: served.errors("build") == [("src/App.tsx", 1, revision)])
    served.apply({"src/Leaf.tsx": LEAF.replace("good", "again")})
    served.until("mended", lambda: served.errors("build", "module", "runtime") == [])
    if viewed:
        browser.do("wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'again'")
        served.shown()


def test_a_file_that_is_deleted_with_its_import_is_none(browser: Browser, served: Served) -> None:
    opened(browser, served)
    app = "export function App() {\n  return <main><input id='kept' />alone</main>\n}\n"
    served.apply({"src/Leaf.tsx": None, "src/App.tsx": app})
    browser.do("wait", code="document.querySelector('main')?.textContent === 'alone'")
    served.shown()
    served.until("checked", lambda: served.report()["checked"] == served.revision)
    assert served.errors("build", "module", "runtime") == []
    assert browser.run(STATE) is True


def test_a_page_whose_socket_was_cut_keeps_its_state_unless_it_missed_something(
    browser: Browser, served: Served
) -> None:
    with Proxy(int(served.url.rpartition(":")[2])) as proxy:
        opened(browser, served, proxy.url)
        assert served.report()["shown"]["how"] == "load"
        proxy.cut()
        served.until("it is back", lambda: served.report()["shown"]["how"] == "update")
        served.apply({"src/Leaf.tsx": LEAF.replace("good", "first")})
        browser.do("wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'first'")
        assert browser.run(STATE) is True
        assert browser.do("seen")["loads"] == 1

        served.shown()
        proxy.close()
        served.apply({"src/Leaf.tsx": LEAF.replace("good", "second")})
        proxy.open()
        browser.do("wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'second'")
        served.shown()
        assert browser.do("seen")["loads"] == 2


def test_a_page_whose_socket_is_mute_is_loaded_anew(browser: Browser, served: Served) -> None:
    with Proxy(int(served.url.rpartition(":")[2])) as proxy:
        opened(browser, served, proxy.url)
        proxy.mute()
        served.apply({"src/Leaf.tsx": LEAF.replace("good", "unheard")})
        browser.do(
            "wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'unheard'", seconds=60
        )
        served.shown()


def test_a_page_that_stays_blank_is_loaded_anew_once_for_a_revision(browser: Browser, served: Served) -> None:
    opened(browser, served)
    served.apply({"src/App.tsx": "export function App() {\n  return null\n}\n"})
    served.until("loaded anew", lambda: served.shown()["shown"]["how"] == "reload")
    loads = browser.do("seen")["loads"]
    served.apply({"src/Leaf.tsx": LEAF.replace("good", "unseen")})
    browser.do("wait", code="document.readyState === 'complete'")
    served.apply(FILES)
    browser.do("wait", code="document.querySelector('[data-leaf]')")
    served.shown()
    assert (loads, browser.do("seen")["loads"] <= loads + 1) == (2, True)


def test_a_page_whose_module_failed_to_load_once_is_loaded_anew(browser: Browser, served: Served) -> None:
    served.until("all is committed", lambda: served.report()["checked"] == served.revision)
    (served.root.parent / "fail-once").touch()
    browser.do("open", url=served.url)
    browser.do("wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'good'")
    assert browser.do("seen")["loads"] == 2
    served.until("mended", lambda: served.report()["errors"] == ())
    assert served.shown()["shown"]["blank"] is False


def test_a_page_whose_callback_threw_at_an_update_is_followed_on(browser: Browser, served: Served) -> None:
    throwing = "import.meta.hot?.accept('./tone.ts', () => {\n  throw new Error('in a callback')\n})\n"
    app = f"import {{ tone }} from './tone.ts'\n{FILES['src/App.tsx']}console.log(tone)\n{throwing}"
    served.apply({"src/tone.ts": "export const tone = 1\n", "src/App.tsx": app})
    opened(browser, served)
    revision = served.apply({"src/tone.ts": "export const tone = 2\n"})
    served.until("told", lambda: ("src/App.tsx", 8, revision) in served.errors("rejection"))
    served.shown(revision)
    served.apply({"src/Leaf.tsx": LEAF.replace("good", "on")})
    browser.do("wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'on'")
    served.shown()


@pytest.mark.parametrize("loaded", ["before its modules are asked for", "while they are on their way"])
def test_a_rendered_page_that_is_saved_before_it_is_hydrated_is_loaded_anew(
    browser: Browser, served: Served, loaded: str
) -> None:
    url = f"{served.url}/rendered.html"
    said = "document.querySelector('[data-said]')?.textContent"
    browser.do("open", "other", url=url)
    browser.do("wait", "other", code="window.hydrate")
    browser.run("window.hydrate()", "other")  # from now on Vite knows its modules, and sends their updates
    browser.do("open", url=url)
    browser.do("wait", code=f"window.hydrate && {said} === 'first'")
    served.shown()
    if loaded.startswith("while"):
        browser.run("void window.hydrate()")
    word = f"second {loaded}"
    served.apply({"src/word.ts": f"export const word = '{word}'\n"})
    revision = served.revision

    def both() -> bool:
        shown = served.report()["shown"]
        return (
            shown["revision"] >= revision and shown["pages"]["visible"] == 2 and not shown["pages"]["behind"]
        )

    served.until("both show it", both)
    assert [browser.run(said, name) for name in ("other", "page")] == [word, word]
    assert (browser.do("seen", "other")["loads"], browser.run("Boolean(window.hydrate)")) == (1, True)
    served.apply({"src/word.ts": "export const word = 'third'\n"})
    browser.do("wait", "other", code=f"{said} === 'third'")
