"""docs/front-end.md shows the files of examples/front-end, all of their regions, in both languages.

After a change of the files: `python -m tests.docs.test_front_end` writes the page's code again.
"""

from __future__ import annotations

import re

from tests.docs.reading import ROOT

PAGE = ROOT / "docs" / "front-end.md"
EXAMPLES = ROOT / "examples" / "front-end"
REGION = re.compile(r"^(?://|#) #?region (\w+)\n(.*?)\n*^(?://|#) #?endregion", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"<!-- region (\w+) -->\n(?:\n```ts\n.*?\n```\n\n```python\n.*?\n```\n)?", re.DOTALL)


def regions(name: str) -> dict[str, str]:
    """Region → its code."""
    found = REGION.findall((EXAMPLES / name).read_text())
    assert len({region for region, _ in found}) == len(found)
    return {region: code.strip("\n") for region, code in found}


def page() -> str:
    """The page with the code of the files."""
    typescript, python = regions("editor.ts"), regions("editor.py")

    def shown(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- region {name} -->\n\n```ts\n{typescript[name]}\n```\n\n```python\n{python[name]}\n```\n"

    return SHOWN.sub(shown, PAGE.read_text())


def test_the_page_s_code_is_the_files() -> None:
    assert PAGE.read_text() == page()


def test_every_region_is_on_the_page_and_in_both_languages() -> None:
    on_page = re.findall(r"<!-- region (\w+) -->", PAGE.read_text())
    assert on_page == list(regions("editor.ts")) == list(regions("editor.py"))
    assert PAGE.read_text().count("```") == 4 * len(on_page), "no other code"


if __name__ == "__main__":
    PAGE.write_text(page())
