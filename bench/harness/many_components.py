"""Writes an app of 220 modules, and a turn that changes 40 or 200 of its files and breaks it until all are changed.

A turn renames an export and a property, so that each file which is new beside one that is old shows at once. Five
eighths of its files are edits, a quarter is new, the rest is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

PAGES, COMPONENTS = 10, 20
"""Pages, and components of each."""

MARKED = "src/c/C019.tsx"
"""A component that no turn of 40 files touches."""

Files = dict[str, str]


def _component(name: str, version: int) -> str:
    old = version == 1
    library, given = ("fmt", "label") if old else ("format", "model")
    kind = "string" if old else "{ text: string }"
    text = "label" if old else "model.text"
    return (
        f"import {{ {library} }} from '../lib/fmt'\n"
        f"export default function {name}({{ {given} }}: {{ {given}: {kind} }}) {{\n"
        f'  return <div className="c" data-v="{version}">{{{library}({text}.toUpperCase())}}</div>\n}}\n'
    )


def plain(name: str, mark: str = "0") -> str:
    """A component that stands outside of turns."""
    return (
        f"export default function {name}({{ label }}: {{ label: string }}) {{\n"
        f'  return <div className="c" data-v="0" data-mark="{mark}">{{label}}</div>\n}}\n'
    )


def _page(number: int, names: Mapping[str, int]) -> str:
    imports = "".join(f"import {name} from '../c/{name}'\n" for name in names)
    uses = "".join(
        f"      <{name} "
        + (f"model={{{{ text: '{name}' }}}}" if version == 2 else f'label="{name}"')
        + " />\n"
        for name, version in names.items()
    )
    body = f"  return (\n    <section>\n{uses}    </section>\n  )\n"
    return f"{imports}export default function P{number}() {{\n{body}}}\n"


def app(turned: bool, files: int) -> Files:
    """All sources, before or after the turn of so many files."""
    pages = 4 if files <= 40 else PAGES
    edited, added = round(files * 0.625) - pages - 1, round(files * 0.25)
    deleted = files - edited - added - pages - 1
    touched = [page * COMPONENTS + n for n in range(COMPONENTS - 1) for page in range(pages)]
    changing, leaving = set(touched[:edited]), set(touched[edited : edited + deleted])
    library = "format" if turned else "fmt"
    sources = {
        "src/lib/fmt.ts": f"export const {library} = (x: string) => '{'[' if turned else '('}' + x\n",
        "src/index.css": "body { font-family: sans-serif } .c { display: inline-block; font-size: 9px }\n",
    }
    for page in range(PAGES):
        names: dict[str, int] = {}
        for number in range(page * COMPONENTS, (page + 1) * COMPONENTS):
            name = f"C{number:03}"
            if number in leaving and turned:
                continue
            names[name] = (2 if turned else 1) if number in changing else 0
            sources[f"src/c/{name}.tsx"] = _component(name, names[name]) if names[name] else plain(name)
        if turned and page < pages:
            for number in range(page, added, pages):
                names[f"N{number:03}"] = 2
                sources[f"src/c/N{number:03}.tsx"] = _component(f"N{number:03}", 2)
        sources[f"src/pages/P{page}.tsx"] = _page(page, names)
    sources["src/App.tsx"] = root()
    return sources


def root(new: int = 0) -> str:
    """The app's own module, with so many more components."""
    names = [f"M{n:03}" for n in range(new)]
    imports = "".join(f"import P{page} from './pages/P{page}'\n" for page in range(PAGES))
    imports += "".join(f"import {name} from './c/{name}'\n" for name in names)
    uses = "".join(f"<P{page} />" for page in range(PAGES))
    uses += "".join(f'<{name} label="{name}" />' for name in names)
    return f'{imports}export function App() {{\n  return <main><input id="kept" />{uses}</main>\n}}\n'


def changes(before: Files, after: Files) -> dict[str, str | None]:
    """What a turn writes; None: it deletes."""
    written: dict[str, str | None] = {
        path: text for path, text in sorted(after.items()) if before.get(path) != text
    }
    return written | {path: None for path in sorted(before) if path not in after}


def write(root: Path, files: Mapping[str, str | None]) -> None:
    """As an editor does."""
    for path, text in files.items():
        if text is None:
            (root / path).unlink()
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)
