"""The loops of docs/for-ai-builders.md, as they stand there: they write what is broken, are told where, and mend it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.browser.conftest import HERE, Browser
from tests.system.stack import REPOSITORY, Stack, until

pytestmark = pytest.mark.browser

PAGE = (REPOSITORY / "docs" / "for-ai-builders.md").read_text()
LEAF = 'export function Leaf() {\n  return <p id="leaf">mended</p>\n}\n'
BROKEN = LEAF.replace("</p>", "</div>")
APP = "import { Leaf } from './Leaf.tsx'\nexport function App() {\n  return <main><Leaf /></main>\n}\n"


def snippet(language: str) -> str:
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def opened(browser: Browser, stack: Stack) -> None:
    browser.do("open", url=stack.info["preview_url"])
    until("the page is open", lambda: stack.status()["shown"])


def checked(browser: Browser, seen: dict[str, Any], mended: list[Any]) -> None:
    assert seen["outcome"] == "shown", json.dumps([seen, mended])
    [errors] = mended
    assert ("src/Leaf.tsx", 2) in [(each["file"], each["line"]) for each in errors]
    browser.do("wait", code="document.querySelector('#leaf')?.textContent === 'mended'")


def test_the_loop_in_python(browser: Browser, stack: Stack) -> None:
    opened(browser, stack)
    names: dict[str, Any] = {}
    exec(snippet("python"), names)
    mended: list[Any] = []

    def mend(errors: list[Any]) -> dict[str, str]:
        mended.append(errors)
        return {"src/Leaf.tsx": LEAF}

    info = stack.info
    headers = {"apikey": info["service_key"], "authorization": f"Bearer {info['service_key']}"}
    with httpx.Client(base_url=info["orchestrator_url"], headers=headers) as api:
        write = {"src/Leaf.tsx": BROKEN, "src/App.tsx": APP}
        seen = names["turn"](api, info["project_id"], lambda: write, mend)
    checked(browser, seen, mended)


RUN = """
import ts from 'typescript'
import fs from 'node:fs'
const [source, info, files, good] = JSON.parse(fs.readFileSync(0, 'utf8'))
const code = ts.transpileModule(source, { compilerOptions: { target: 'es2022', module: 'es2022' } }).outputText
const { turn } = await import('data:text/javascript,' + encodeURIComponent(code))
const key = info.service_key
const headers = { apikey: key, authorization: `Bearer ${key}`, 'content-type': 'application/json' }
const api = async (path, body) => {
  const answer = await fetch(info.orchestrator_url + path,
    { method: body ? 'POST' : 'GET', headers, body: body && JSON.stringify(body) })
  if (!answer.ok) throw new Error(await answer.text())
  return answer.json()
}
const mended = []
const seen = await turn(api, info.project_id, () => files, (errors) => (mended.push(errors), good))
console.log(JSON.stringify({ seen, mended }))
"""


def test_the_loop_in_typescript(browser: Browser, stack: Stack, tmp_path: Path) -> None:
    opened(browser, stack)
    given = [
        snippet("typescript"),
        stack.info,
        {"src/Leaf.tsx": BROKEN, "src/App.tsx": APP},
        {"src/Leaf.tsx": LEAF},
    ]
    ended = subprocess.run(
        ["node", "--input-type=module", "-e", RUN],
        cwd=HERE, input=json.dumps(given), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    checked(browser, answer["seen"], answer["mended"])
