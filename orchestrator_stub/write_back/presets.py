"""Names sets of rules, so that a person says `lock` and not seven globs. The table is the one place where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

Rule = Mapping[str, Any]
"""As `set_write_back` takes it: glob, mode, and where they differ from the default max_bytes and deletes."""


def _generated(*globs: str, deletes: bool = False) -> list[Rule]:
    return [{"glob": glob, "mode": "generated", **({"deletes": True} if deletes else {})} for glob in globs]


def _authored(*globs: str) -> list[Rule]:
    return [{"glob": glob, "mode": "authored"} for glob in globs]


FORMATTED: Final = ("ts", "tsx", "js", "jsx", "mjs", "cjs", "css", "scss", "html", "vue", "svelte", "astro")
"""Endings of what formatters rewrite. No .json: a rewritten package.json would choose what others install and run."""

PRESETS: Final[Mapping[str, list[Rule]]] = {
    "lock": _generated(
        *(
            f"**/{name}"
            for name in (
                "package-lock.json",
                "npm-shrinkwrap.json",
                "pnpm-lock.yaml",
                "yarn.lock",
                "bun.lock",
            )
        )
    ),
    # TanStack Router, React Router, Nuxt.
    "routes": [
        *_generated("**/routeTree.gen.ts", "**/routeTree.gen.js"),
        *_generated("**/.react-router/types/**", "**/.nuxt/types/**", "**/.nuxt/*.d.ts", deletes=True),
    ],
    # The client that is generated into the sources, and what `migrate` and `db pull` write for people to read.
    "prisma": [
        *_generated("**/generated/prisma/**", deletes=True),
        *_authored("**/prisma/migrations/**", "**/prisma/schema.prisma"),
    ],
    "format": _generated(*(f"**/*.{ending}" for ending in FORMATTED)),
}


def rules_of(names: Iterable[str]) -> list[Rule]:
    """Return the rules of presets, in their order; a glob that several have is the first one's.

    Raises:
        KeyError: There is no preset of that name.
    """
    found: dict[str, Rule] = {}
    for name in names:
        for rule in PRESETS[name]:
            found.setdefault(str(rule["glob"]), rule)
    return list(found.values())
