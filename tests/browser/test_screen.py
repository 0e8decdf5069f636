"""From a save to the screen of a real browser: what people see, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.browser.conftest import Browser
from tests.system.stack import Stack

pytestmark = pytest.mark.browser

PARTS = 40
SAMPLER = """
addEventListener('DOMContentLoaded', () => {
  const look = () => {
    const seen = {}
    for (const part of document.querySelectorAll('[data-v]')) seen[part.dataset.v] = (seen[part.dataset.v] ?? 0) + 1
    if (document.querySelector('vite-error-overlay')) seen.overlay = 1
    if (window.__state) void __state(JSON.stringify(seen))
    requestAnimationFrame(look)
  }
  look()
})
"""
"""Notes how many parts of which version stand on the page, frame by frame."""


def part(n: int, version: int) -> str:
    return f'export function Part{n:02}() {{\n  return <i data-v="{version}">{n}</i>\n}}\n'


def app(parts: int, extra: str = "") -> str:
    imports = "".join(f"import {{ Part{n:02} }} from './parts/Part{n:02}.tsx'\n" for n in range(parts))
    uses = "".join(f"<Part{n:02} />" for n in range(parts))
    return (
        f"import './App.css'\nimport {{ Leaf }} from './Leaf.tsx'\n{imports}"
        f'export function App() {{\n  return <main><input id="kept" />{uses}<Leaf />{extra}</main>\n}}\n'
    )


LEAF = 'export function Leaf() {\n  return <p data-leaf="good">leaf</p>\n}\n'
FILES = {
    **{f"src/parts/Part{n:02}.tsx": part(n, 1) for n in range(PARTS)},
    "src/Leaf.tsx": LEAF,
    "src/word.ts": "export const word = 'w'\n",
    "src/App.tsx": app(PARTS),
}


class Preview:
    """The stack's project, as the product writes it and asks for it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.revision = 0

    def apply(self, files: dict[str, str | None]) -> int:
        changes = [
            {"action": "delete", "file_path": path}
            if text is None
            else {"action": "update", "file_path": path, "content": text}
            for path, text in files.items()
        ]
        answer = self.stack.rpc("apply_project_files", changes=changes)
        self.revision = int(answer["revision"])
        return self.revision

    def shown(self, revision: int | None = None, wait: float = 30, quiet: float = 0.2) -> dict[str, Any]:
        """The answer of `GET /v1/projects/{id}/shown`."""
        info = self.stack.info
        answer = httpx.get(
            f"{info['orchestrator_url']}/v1/projects/{info['project_id']}/shown",
            params={
                "revision": self.revision if revision is None else revision,
                "wait": wait,
                "quiet": quiet,
            },
            headers={"authorization": f"Bearer {info['service_key']}"},
            timeout=wait + 10,
        )
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def until(self, wanted: Callable[[dict[str, Any]], bool], seconds: float = 20) -> dict[str, Any]:
        """Ask until an answer is as wanted."""
        deadline = time.monotonic() + seconds
        while not wanted(answer := self.shown(wait=1)):
            assert time.monotonic() < deadline, answer
        return answer


@pytest.fixture
def preview(stack: Stack) -> Preview:
    """The project as it should be, whatever the test before left."""
    preview = Preview(stack)
    preview.apply({**FILES, "src/App.css": "main { --mark: 0 }\n"})
    preview.until(lambda answer: answer["applied"] >= preview.revision)
    return preview


def opened(browser: Browser, preview: Preview, name: str = "page") -> None:
    """A page that shows the project, with state that a reload would lose."""
    browser.do("open", name, url=preview.stack.info["preview_url"], script=SAMPLER)
    browser.do("wait", name, code="document.querySelectorAll('[data-v]').length >= 40")
    browser.run("void (document.querySelector('#kept').value = 'typed', window.kept = true)", name)
    preview.until(lambda answer: answer["outcome"] == "shown")


KEPT = "window.kept === true && document.querySelector('#kept').value === 'typed'"


def test_a_bulk_of_forty_files_is_one_step_on_the_screen(browser: Browser, preview: Preview) -> None:
    opened(browser, preview)
    for version in (2, 3):
        files: dict[str, str | None] = {
            f"src/parts/Part{n:02}.tsx": part(n, version) for n in range(PARTS - 2)
        }
        files |= {f"src/parts/Part{n:02}.tsx": part(n, version) for n in range(PARTS - 2, PARTS)}
        files[f"src/parts/Part{PARTS + version}.tsx"] = part(PARTS + version, version)
        files["src/Leaf.tsx"] = (
            f"import {{ Part{PARTS + version} }} from './parts/Part{PARTS + version}.tsx'\n"
            + LEAF.replace("leaf</p>", f"leaf <Part{PARTS + version} /></p>")
        )
        preview.apply(files)
        answer = preview.shown()
        assert (answer["outcome"], answer["shown"]["how"]) == ("shown", "update"), answer
        assert answer["shown"]["revision"] == preview.revision
    browser.do("wait", code="document.querySelectorAll('[data-v=\"3\"]').length === 41")
    seen = browser.do("seen")
    whole = ['{"1":40}', '{"2":41}', '{"3":41}']
    assert [state for state in seen["states"] if state != "{}"] == whole, (
        "nothing stands between two revisions"
    )
    assert (seen["refused"], seen["failed"], seen["loads"]) == ([], [], 1)
    assert browser.run(KEPT) is True


def test_saves_one_by_one_page_first_end_right(browser: Browser, preview: Preview) -> None:
    opened(browser, preview)
    extra = "".join(f"<New{n} />" for n in range(8))
    page = "".join(f"import {{ New{n} }} from './New{n}.tsx'\n" for n in range(8)) + app(PARTS, extra)
    preview.stack.save("src/App.tsx", page)
    for n in range(8):
        new = f'export function New{n}() {{\n  return <i data-v="new">{n}</i>\n}}\n'
        preview.revision = int(preview.stack.save(f"src/New{n}.tsx", new)["revision"])
    browser.do("wait", code="document.querySelectorAll('[data-v=\"new\"]').length === 8")
    answer = preview.until(lambda answer: answer["outcome"] == "shown")
    assert answer["errors"] == [] or {each["kind"] for each in answer["errors"]} == {"console"}


ERRORS = {
    "syntax": ("src/Leaf.tsx", LEAF.replace("</p>", "</div>"), {"build"}, 2),
    "missing import": ("src/Leaf.tsx", f"import x from './nowhere'\nconsole.log(x)\n{LEAF}", {"build"}, 1),
    "missing package": ("src/Leaf.tsx", f"import x from 'no-such'\nconsole.log(x)\n{LEAF}", {"build"}, 1),
    "missing export": (
        "src/Leaf.tsx",
        f"\nimport {{ nope }} from './word'\nconsole.log(nope)\n{LEAF}",
        {"module", "runtime"},
        2,
    ),
    "throws while it renders": (
        "src/Leaf.tsx",
        LEAF.replace("  return", "  const a: any = undefined\n  a.b()\n  return"),
        {"runtime"},
        3,
    ),
    "throws in an effect": (
        "src/Leaf.tsx",
        "import { useEffect } from 'react'\n"
        + LEAF.replace(
            "  return", "  useEffect(() => {\n    throw new Error('in effect')\n  }, [])\n  return"
        ),
        {"runtime"},
        4,
    ),
    "rejection": (
        "src/Leaf.tsx",
        LEAF + "void (async () => {\n  throw new Error('nobody awaits this')\n})()\n",
        {"rejection"},
        5,
    ),
    "throws as it loads": (
        "src/Leaf.tsx",
        f"{LEAF}throw new Error('at the top')\n",
        {"module", "runtime"},
        4,
    ),
    "missing style": ("src/App.css", "@import './nowhere.css';\nmain { --mark: 1 }\n", {"build"}, None),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_told_with_its_place_and_is_gone_when_it_is_mended(
    browser: Browser, preview: Preview, case: str
) -> None:
    path, bad, kinds, line = ERRORS[case]
    opened(browser, preview)
    revision = preview.apply({path: bad})
    saved = time.monotonic()
    answer = preview.shown()
    assert answer["outcome"] == "error", answer
    print(f"{case}: told {(time.monotonic() - saved) * 1e3:.0f} ms after it was saved")

    def placed(answer: dict[str, Any]) -> bool:
        return any(
            each["kind"] in kinds
            and each["file"] == path
            and each["line"] == line
            and each["revision"] == revision
            and (line is None or each["column"] >= 1)
            for each in answer["errors"]
        )

    preview.until(placed)
    print(f"{case}: with its place {(time.monotonic() - saved) * 1e3:.0f} ms after it was saved")
    good = "main { --mark: 2 }\n" if path.endswith(".css") else LEAF.replace("good", "mended")
    preview.apply({path: good})
    answer = preview.until(lambda answer: answer["outcome"] == "shown")
    assert [each for each in answer["errors"] if each["kind"] != "console"] == []
    right = (
        "getComputedStyle(document.querySelector('main')).getPropertyValue('--mark').trim() === '2'"
        if path.endswith(".css")
        else "document.querySelector('[data-leaf]')?.dataset.leaf === 'mended'"
    )
    browser.do("wait", code=right)


def test_with_no_page_open_what_cannot_be_built_is_known(preview: Preview) -> None:
    preview.until(lambda answer: answer["outcome"] == "no_viewer")
    preview.stack.fetch("src/main.tsx")
    preview.stack.fetch("src/App.tsx")
    preview.stack.fetch("src/Leaf.tsx")
    revision = preview.apply({"src/Leaf.tsx": LEAF.replace("</p>", "</div>")})
    answer = preview.shown()
    assert (answer["outcome"], answer["shown"]) == ("error", None)
    assert [(each["file"], each["line"], each["revision"]) for each in answer["errors"]] == [
        ("src/Leaf.tsx", 2, revision)
    ]
    preview.apply({"src/Leaf.tsx": LEAF})
    assert preview.shown()["outcome"] == "no_viewer"


def test_a_page_cannot_claim_a_revision_nor_hold_updates_back_nor_flood(
    browser: Browser, preview: Preview
) -> None:
    opened(browser, preview)
    browser.run(
        """import('/@vite/client').then(({ createHotContext }) => {
          const hot = createHotContext('/hostile')
          for (const event of ['begin', 'commit', 'undo'])
            hot.send('preview:' + event, { begin: ['src/Leaf.tsx'], secret: 'guess' })
          for (const said of [null, 7, 'x', {}, { load: {} }])
            for (const event of ['rendered', 'error', 'hello', 'ping', 'bye']) hot.send('preview:' + event, said)
          hot.send('preview:rendered', { load: 'forged', revision: 999999, how: 'update', hidden: false })
          for (let n = 0; n < 2000; n++)
            hot.send('preview:error', { load: 'forged', kind: 'runtime', message: n + 'x'.repeat(9999), revision: 1e6 })
        })"""
    )
    preview.apply({"src/Leaf.tsx": LEAF.replace("good", "after")})
    browser.do("wait", code="document.querySelector('[data-leaf]')?.dataset.leaf === 'after'")
    answer = preview.until(
        lambda answer: answer["shown"] is not None and answer["shown"]["revision"] == preview.revision
    )
    assert all(each["revision"] <= preview.revision for each in answer["errors"])
    assert len(answer["errors"]) <= 20
    status = preview.stack.status()
    assert status["observed"] is True
    assert len(status["errors"]) <= 50
    assert status["state"] == "serving"


def test_a_page_that_is_opened_in_the_middle_ends_right(browser: Browser, preview: Preview) -> None:
    for round_ in range(3):
        version = 10 + round_
        preview.apply({f"src/parts/Part{n:02}.tsx": part(n, version) for n in range(PARTS)})
        browser.do("open", url=preview.stack.info["preview_url"], script=SAMPLER)
        preview.apply({f"src/parts/Part{n:02}.tsx": part(n, version + 100) for n in range(PARTS)})
        browser.do("wait", code=f"document.querySelectorAll('[data-v=\"{version + 100}\"]').length === 40")
        answer = preview.until(lambda answer: answer["outcome"] == "shown")
        assert answer["shown"]["revision"] == preview.revision
        browser.do("close")
