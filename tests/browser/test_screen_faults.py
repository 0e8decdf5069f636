"""The screen under faults: whatever happens to agent, dev server or page, pages end right and nothing lies."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser.conftest import Browser
from tests.browser.served import Served, small_project

pytestmark = pytest.mark.browser

LEAF = 'export function Leaf() {\n  return <p data-leaf="good">leaf</p>\n}\n'
OTHER = 'export function Other() {\n  return <p data-other="good">other</p>\n}\n'
FILES: dict[str, str | None] = {
    "src/Leaf.tsx": LEAF,
    "src/Other.tsx": OTHER,
    "src/App.tsx": (
        "import { Leaf } from './Leaf.tsx'\nimport { Other } from './Other.tsx'\nexport function App() {\n"
        '  return <main><input id="kept" /><Leaf /><Other /></main>\n}\n'
    ),
    "src/index.css": "main { color: black }\n",
}
STATE = "window.kept === true && document.querySelector('#kept').value === 'typed'"
SEEN = (
    "document.querySelector('[data-leaf]')?.dataset.leaf + ' ' + "
    "document.querySelector('[data-other]')?.dataset.other"
)
WATCH = """void (window.seen = [], new MutationObserver(() => window.seen.push(document.body.innerText)).observe(
  document.body, { subtree: true, childList: true, attributes: true }))"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Iterator[Served]:
    root = small_project(tmp_path_factory.mktemp("faults") / "project", FILES)
    with Served(root, installed) as served:
        yield served


@pytest.fixture
def served(running: Served) -> Served:
    """The project as it should be, whatever the test before left."""
    running.until("observed", lambda: running.screen.observed)
    running.apply(FILES)
    return running


def opened(browser: Browser, served: Served) -> None:
    """A page that shows the project, with state that a reload would lose."""
    browser.do("open", url=served.url)
    browser.do("wait", code="document.querySelector('[data-leaf]')")
    browser.run("void (document.querySelector('#kept').value = 'typed', window.kept = true)")
    served.shown()


def version(name: str) -> dict[str, str | None]:
    return {"src/Leaf.tsx": LEAF.replace("good", name), "src/Other.tsx": OTHER.replace("good", name)}


def sees(browser: Browser, leaf: str, other: str | None = None, page: str = "page") -> None:
    browser.do("wait", page, code=f"{SEEN} === '{leaf} {other or leaf}'")


def test_what_cannot_be_built_is_known_though_nobody_ever_looked(tmp_path: Path, installed: Path) -> None:
    with Served(small_project(tmp_path / "project", FILES), installed) as served:
        served.until("observed", lambda: served.screen.observed)
        revision = served.apply({"src/Leaf.tsx": LEAF.replace("</p>", "</div>")})
        served.until("told", lambda: served.errors("build") == [("src/Leaf.tsx", 2, revision)])
        served.apply({"src/Leaf.tsx": LEAF})
        served.until(
            "gone", lambda: served.report()["checked"] == served.revision and not served.errors("build")
        )
        assert served.report()["shown"] is None


def test_an_agent_that_is_killed_between_begin_and_commit_leaves_its_pages_right(
    browser: Browser, tmp_path: Path, installed: Path
) -> None:
    with Served(small_project(tmp_path / "project", FILES), installed) as served:
        opened(browser, served)
        served.begin(*version("half"))
        served.put("src/Leaf.tsx", version("half")["src/Leaf.tsx"])
        served.die()
        sees(browser, "half", "good")
        assert browser.run(STATE) is True


def test_an_agent_that_stops_between_begin_and_commit_leaves_its_pages_right(
    browser: Browser, served: Served
) -> None:
    opened(browser, served)
    served.begin(*version("late"))
    changes = {"src/Leaf.tsx": served.put("src/Leaf.tsx", version("late")["src/Leaf.tsx"])}
    sees(browser, "late", "good")  # the gate has opened by itself
    changes["src/Other.tsx"] = served.put("src/Other.tsx", version("late")["src/Other.tsx"])
    served.commit(changes)
    sees(browser, "late")
    served.shown()


@pytest.mark.parametrize("how", ["killed", "config"])
def test_a_dev_server_that_starts_anew_in_a_gate_ends_right(
    browser: Browser, served: Served, how: str
) -> None:
    opened(browser, served)
    files = version(how)
    config = (served.root / "vite.config.ts").read_text()
    served.begin(*files, "vite.config.ts")
    changes = {"src/Leaf.tsx": served.put("src/Leaf.tsx", files["src/Leaf.tsx"])}
    if how == "killed":
        served.kill_dev_server()
    else:
        changes["vite.config.ts"] = served.put("vite.config.ts", config + f"// {time.monotonic_ns()}\n")
    changes["src/Other.tsx"] = served.put("src/Other.tsx", files["src/Other.tsx"])
    served.commit(changes)
    sees(browser, how)
    served.shown()
    served.apply(version("next"))
    sees(browser, "next")
    served.shown()


def test_a_batch_that_was_undone_is_not_seen(browser: Browser, served: Served) -> None:
    opened(browser, served)
    browser.run(WATCH)
    served.begin(*version("undone"))
    for path, text in version("undone").items():
        served.put(path, text)
    for path in version("undone"):
        served.put(path, FILES[path])
    served.undo()
    served.commit({})
    served.shown()
    assert (browser.run("window.seen"), browser.run(STATE)) == ([], True)
    served.apply(version("after"))
    sees(browser, "after")


def test_a_hidden_page_counts_as_hidden_and_shows_the_newest_when_it_is_looked_at(
    browser: Browser, served: Served
) -> None:
    def pages() -> tuple[int, int, int]:
        shown = served.report()["shown"]
        return (
            (shown["pages"]["visible"], shown["pages"]["hidden"], shown["revision"]) if shown else (0, 0, 0)
        )

    first = browser.do("tab", url=served.url)["target"]
    served.shown()
    second = browser.do("tab", url=served.url)["target"]
    try:
        served.until("one is hidden", lambda: pages() == (1, 1, served.revision))
        served.apply(version("both"))
        served.until("shown by the one that is seen", lambda: pages() == (1, 1, served.revision))
        browser.do("activate", target=first)
        served.until("the other is seen", lambda: pages() == (1, 1, served.revision))
        browser.do("leave", target=second)
        served.until("one is left", lambda: pages()[:2] == (1, 0), 40)
        served.apply(version("first"))
        served.shown()
    finally:
        browser.do("leave", target=first)


@pytest.mark.parametrize(
    ("kind", "bad", "where"),
    [
        ("console", LEAF.replace("  return", "  console.error('said')\n  return"), ("src/Leaf.tsx", 2)),
        ("resource", LEAF.replace("leaf</p>", "<img src='/none.png' /></p>"), (None, None)),
    ],
)
def test_what_hides_nothing_is_told_too_and_is_gone_when_it_is_mended(
    browser: Browser, served: Served, kind: str, bad: str, where: tuple[str | None, int | None]
) -> None:
    opened(browser, served)
    revision = served.apply({"src/Leaf.tsx": bad})
    served.until("told", lambda: (*where, revision) in served.errors(kind))
    served.apply(version("mended"))
    sees(browser, "mended")
    served.until("gone", lambda: served.errors(kind) == [])


FLOOD = """import('/@vite/client').then(({ createHotContext }) => {
  const hot = createHotContext('/hostile')
  let rounds = 0
  const flood = () => {
    for (let n = 0; n < 100; n++) {
      const message = `${rounds} ${n}` + 'x'.repeat(2000)
      hot.send('preview:error', { load: 'forged' + n, kind: 'runtime', message, revision: 1e6 })
      hot.send('preview:error', { load: 'forged', kind: 'runtime', message, revision: 1e6 })
    }
    return ++rounds
  }
  window.flooding = setInterval(flood, 100)
  window.flooded = () => rounds
}).then(() => 0)"""


def test_a_page_that_floods_fills_neither_memory_nor_log_and_hides_no_error_of_others(
    browser: Browser, served: Served
) -> None:
    """2,000 forged errors a second."""
    opened(browser, served)
    lines = len(served.status()["log"])
    browser.do("open", "other", url=served.url)
    browser.run(FLOOD, "other")
    browser.do("wait", "other", code="window.flooded() >= 30")
    before = served.memory()
    real = f"{LEAF}void (async () => {{\n  throw new Error('a real one')\n}})()\n"
    revision = served.apply({"src/Leaf.tsx": real})
    served.until("told", lambda: ("src/Leaf.tsx", 5, revision) in served.errors("rejection"))
    browser.do("wait", "other", code="window.flooded() >= 60")
    assert served.memory() - before < 50e6
    assert len(served.report()["errors"]) <= 50
    assert len(served.status()["log"]) - lines < 20
    served.apply(version("after"))
    sees(browser, "after")
    served.until("shown", lambda: served.report()["shown"]["revision"] == served.revision)


# --- projects that are not as most

PLAIN = (
    "document.body.append(Object.assign(document.createElement('p'), { id: 'word', textContent: word }))\n"
)
PLAIN_FILES: dict[str, str | None] = {
    "src/main.tsx": f"import {{ word }} from './word.ts'\n{PLAIN}",
    "src/word.ts": "export const word = 'first'\n",
    "vite.config.ts": (
        "export default {\n  base: '/app/',\n  server: { headers: { 'content-security-policy': "
        "\"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self' ws:; img-src 'self'\" } },\n}\n"
    ),
    "own.cjs": "require('fs').writeFileSync('own.txt', process.env.NODE_OPTIONS)\n",
}


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory, installed: Path) -> Iterator[Served]:
    """Below a base path, with a strict CSP, with NODE_OPTIONS of its own."""
    root = small_project(tmp_path_factory.mktemp("unusual") / "project", PLAIN_FILES)
    with Served(root, installed, environ={"DEV_ENV_NODE_OPTIONS": f"--require={root}/own.cjs"}) as served:
        served.until("observed", lambda: served.screen.observed)
        yield served


def test_below_a_base_path_under_a_strict_csp_with_node_options_of_its_own(
    browser: Browser, unusual: Served
) -> None:
    browser.do("open", url=f"{unusual.url}/app/")
    word = "document.querySelector('#word')?.textContent"
    unusual.shown()
    for name in ("second", "third"):
        unusual.apply({"src/word.ts": f"export const word = '{name}'\n"})
        browser.do("wait", code=f"{word} === '{name}'")
        unusual.shown()
    revision = unusual.apply({"src/word.ts": "\nexport const word = missing\n"})
    unusual.until("told", lambda: ("src/word.ts", 2, revision) in unusual.errors("runtime"))
    unusual.apply({"src/word.ts": "export const word = 'mended'\n"})
    browser.do("wait", code=f"{word} === 'mended'")
    unusual.until("gone", lambda: unusual.errors("build", "runtime", "module") == [])
    assert unusual.report()["shown"]["pages"]["visible"] == 1
    own = (unusual.root / "own.txt").read_text()
    assert own.startswith(f"--require={unusual.root}/own.cjs ")
    assert own.endswith("/agent/preview/hook.mjs")


def test_in_an_iframe_of_another_origin(browser: Browser, served: Served) -> None:
    frame = f'<iframe src="{served.url}" width="600" height="400"></iframe>'.encode()

    class Product(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(frame)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Product) as product:
        threading.Thread(target=product.serve_forever, daemon=True).start()
        browser.do("open", url=f"http://localhost:{product.server_port}/")
        served.shown()
        served.apply(version("framed"))
        alone = {"visible": 1, "hidden": 0, "behind": 0}
        served.until("pages before it are gone", lambda: served.shown()["shown"]["pages"] == alone)
        revision = served.apply({"src/Leaf.tsx": f"{LEAF}throw new Error('framed')\n"})
        served.until("told", lambda: ("src/Leaf.tsx", 4, revision) in served.errors("runtime", "module"))
        product.shutdown()


SERVER = """import http from 'node:http'
const page = '<p id="word">plain</p>'
http.createServer((_, answer) => answer.setHeader('content-type', 'text/html').end(page)).listen(process.env.PORT)
"""


@pytest.mark.parametrize("case", ["not Vite", "without the hook"])
def test_what_is_not_observed_says_so_and_works(
    browser: Browser, tmp_path: Path, installed: Path, case: str
) -> None:
    files = dict(FILES)
    if case == "not Vite":
        files |= {"server.mjs": SERVER}
    root = small_project(tmp_path / "project", files)
    package = json.loads((root / "package.json").read_text())
    package["scripts"]["dev"] = "node server.mjs" if case == "not Vite" else "NODE_OPTIONS= vite"
    (root / "package.json").write_text(json.dumps(package))
    now = [0.0]
    with Served(root, installed, clock=lambda: now[0]) as served:
        assert served.problems() == []
        now[0] += 10
        assert served.problems() == ["preview_unobserved"]
        browser.do("open", url=served.url)
        if case == "not Vite":
            browser.do("wait", code="document.querySelector('#word')")
        else:
            sees(browser, "good")
            browser.run("void (document.querySelector('#kept').value = 'typed', window.kept = true)")
            served.apply(version("unobserved"))
            sees(browser, "unobserved")
            assert browser.run(STATE) is True
        assert served.report() == {"observed": False, "checked": 0, "shown": None, "errors": ()}
