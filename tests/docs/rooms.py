"""Prints the rooms of both packages: their modules, lines of code, and the imports between rooms (`make rooms`).

A drift of the layout shows here in review: a room that grows past twelve modules, a module that hides a second noun, an
import that one room did not need before. Lines of code are counted without comments, docstrings and blank lines.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter, defaultdict
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
PACKAGES = ("agent", "orchestrator_stub")

_LAYOUT = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def lines_of_code(path: Path) -> frozenset[int]:
    """Find the lines that hold code.

    Args:
        path: a Python file.

    Returns:
        The numbers of lines with at least one token that is no comment, docstring or layout.
    """
    text = path.read_text(encoding="utf-8")
    strings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            held.update(range(token.start[0], token.end[0] + 1))
    return frozenset(held - strings)


def functions(path: Path, *, longer_than: int = 0) -> dict[str, int]:
    """Measure the functions of a file.

    Args:
        path: a Python file.
        longer_than: lines, of whatever kind: shorter functions are left out, and most files not taken apart.

    Returns:
        Each function's name, with its class's before it, to its lines of code. What it defines inside counts as its.
    """
    spans: dict[str, tuple[int, int]] = {}

    def find(node: ast.AST, inside: str) -> None:
        for each in ast.iter_child_nodes(node):
            if isinstance(each, ast.ClassDef):
                find(each, f"{inside}{each.name}.")
            elif isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                spans[inside + each.name] = (each.lineno, each.end_lineno or each.lineno)
            else:
                find(each, inside)

    find(ast.parse(path.read_text(encoding="utf-8")), "")
    long = {name: span for name, span in spans.items() if span[1] - span[0] >= longer_than}
    code = lines_of_code(path) if long else frozenset()
    return {name: len(code.intersection(range(first, last + 1))) for name, (first, last) in long.items()}


def rooms(package: str) -> dict[str, list[Path]]:
    """Find the modules of each room.

    Args:
        package: a directory under the root.

    Returns:
        Room (dotted, "" for the package itself) to its files, `__init__` included.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((ROOT / package).rglob("*.py")):
        found[".".join(path.parent.relative_to(ROOT / package).parts)].append(path)
    return dict(sorted(found.items()))


def imports_between(package: str) -> dict[str, Counter[str]]:
    """Count the imports from one room to another, from import-linter's graph.

    Args:
        package: the package whose graph is built.

    Returns:
        Importing room to the imported rooms, each with the number of importing lines' module pairs.
    """
    graph = grimp.build_graph(*PACKAGES)
    between: dict[str, Counter[str]] = defaultdict(Counter)
    for importer in sorted(module for module in graph.modules if module.startswith(f"{package}.")):
        for imported in graph.find_modules_directly_imported_by(importer):
            if imported.startswith(f"{package}."):
                source, target = _room(importer, package), _room(imported, package)
                if source != target:
                    between[source][target] += 1
    return between


def _room(module: str, package: str) -> str:
    parts = module.split(".")[1:]
    return parts[0] if (ROOT / package / parts[0]).is_dir() else f"({parts[0]})"


def main() -> None:
    """Print a table for each package."""
    for package in PACKAGES:
        print(f"{package}/")
        total = 0
        for room, files in rooms(package).items():
            modules = {path.stem: len(lines_of_code(path)) for path in files if path.stem != "__init__"}
            total += sum(modules.values())
            print(f"  {room or '(root)':24} {len(modules):3} modules {sum(modules.values()):6} lines")
            print("     " + " · ".join(f"{name} {lines}" for name, lines in modules.items()))
        print(f"  {'in all':24} {'':11} {total:6} lines of code")
        print("  imports between rooms:")
        for source, targets in sorted(imports_between(package).items()):
            print(
                f"     {source:18} → "
                + ", ".join(f"{name} {count}" for name, count in sorted(targets.items()))
            )
        print()


if __name__ == "__main__":
    main()
