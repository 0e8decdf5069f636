"""Says how a project's script is run: as `npm run` would, with its dev server on the host and port of the preview.

A script is any shell line: `vite`, `run-p dev:*`, `concurrently "vite" "node api.js"`, `turbo run dev`. What stands
last in it is not always the dev server, so nothing is appended to it. A few lines of JavaScript (`hook`), loaded into
every Node process below it by NODE_OPTIONS, put the flags into the one that turns out to be a known dev server. Where
no Node runs, or no known server, there is `$PORT`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

HOST, PORT, PREVIEW_HOST = "{host}", "{port}", "{preview_host}"
"""What stands in a flag for the preview's address, and for a domain under which visitors come."""


@dataclass(frozen=True, slots=True)
class Tool:
    """A dev server that is known, and how it is told where to listen."""

    name: str
    packages: tuple[str, ...]
    """In npm's registry. The first is what a project depends on; the program may be in any."""
    program: str
    """As a script calls it: a regular expression."""
    script: str
    """What starts it in a project without a script for that."""
    starts: tuple[str, ...]
    """The words after the program that make it serve; "": without such a word."""
    flags: tuple[str, ...] = ("--host", HOST, "--port", PORT)
    short: tuple[str, ...] = ()
    """Other names of these flags, which are taken away where the script gives them."""
    fresh: tuple[str, ...] = ()
    """Flags for a start without what the previous one cached."""
    allow: tuple[str, ...] = ()
    """Flags that let PREVIEW_HOST in. All that is built on Vite reads it from the environment instead."""
    environ: Mapping[str, str] = field(default_factory=dict)


_VITE = ("--host", HOST, "--port", PORT, "--strictPort")
TOOLS = (
    Tool("Astro", ("astro",), "astro", "astro dev", ("", "dev")),
    Tool("Nuxt", ("nuxt", "nuxi", "@nuxt/cli"), "nux[ti]", "nuxt dev", ("dev",), short=("-p", "-h")),
    Tool(
        "React Router", ("@react-router/dev",), "react-router", "react-router dev", ("dev",), _VITE, fresh=("--force",)
    ),
    Tool("Remix", ("@remix-run/dev",), "remix", "remix vite:dev", ("vite:dev",), _VITE, fresh=("--force",)),
    Tool("Next", ("next",), "next", "next dev", ("", "dev"), ("--hostname", HOST, "--port", PORT), ("-H", "-p")),
    Tool(
        "Angular", ("@angular/cli",), "ng", "ng serve", ("serve", "s", "dev"),
        allow=("--allowed-hosts", PREVIEW_HOST), environ={"NG_CLI_ANALYTICS": "false"},
    ),
    Tool("Expo", ("expo", "@expo/cli"), "expo", "expo start --web", ("start",), ("--port", PORT), ("-p",)),
    Tool(
        "Create React App", ("react-scripts",), "react-scripts", "react-scripts start", ("start",), (),
        environ={"HOST": HOST, "PORT": PORT},
    ),
    Tool("Eleventy", ("@11ty/eleventy",), "eleventy", "eleventy --serve", ("--serve",), ("--port", PORT)),
    Tool("Vite", ("vite",), "vite", "vite", ("", "dev", "serve"), _VITE, fresh=("--force",)),
    Tool(
        "webpack", ("webpack-dev-server", "webpack", "webpack-cli"), "webpack(?:-dev-server)?", "webpack serve",
        ("serve", "server", "s"), allow=("--allowed-hosts", PREVIEW_HOST),
    ),
)  # fmt: skip
"""The known ones. A project that depends on several is the first's: most of them depend on Vite or on webpack."""

_PROGRAMS = {tool.name: re.compile(rf"(?:^|[\s\"'&|;(/]){tool.program}(?:$|[\s\"'&|;)])") for tool in TOOLS}
_HANDS_ON = re.compile(r"\b(?:run-[ps]|npm-run-all2?|concurrently|npm|pnpm|yarn|bun|turbo|nx|lerna)\b")
"""Programs that run other scripts."""
_SHELL = re.compile(r"[|&;<>()$`\n]")
"""A script that has any of this is more than one command, or not a plain one."""

HOOK = """
import { realpathSync } from 'node:fs'
import Module from 'node:module'
import { isMainThread } from 'node:worker_threads'
const { tools, only, hosts } = DATA
let main = process.argv[1] ?? ''
try { main = realpathSync(main) } catch {}
const tool = isMainThread && tools[/.*[/]node_modules[/]((?:@[^/]+[/])?[^/]+)[/]/.exec(main)?.[1]]
const given = process.argv.slice(2)
const word = given.length && !given[0].startsWith('-') ? given.shift() : ''
const serves = tool && tool.starts.some(s => s === word || s.startsWith('-') && given.includes(s))
if (serves && (!only || process.cwd() === only)) {
  for (const [name, value] of Object.entries(tool.environ)) process.env[name] ??= value
  const kept = []
  for (let i = 0; i < given.length; i++) {
    const name = given[i].split('=')[0]
    if (!(name in tool.replaced)) kept.push(given[i])
    else if (tool.replaced[name] && name === given[i] && !(given[i + 1] ?? '-').startsWith('-')) i++
  }
  process.argv.splice(2, Infinity, ...(word ? [word] : []), ...tool.flags, ...kept)
}
if (tool && tool === tools.next && hosts.length) {
  const load = Module._load
  Module._load = function (name) {
    const found = load.apply(this, arguments)
    const key = /[/]block-cross-site(-dev)?$/.test(name) && Object.keys(found)[0]
    const more = list => list || key.endsWith('DEV') ? [...(list ?? []), ...hosts] : list
    return key ? { [key]: (request, response, list, own) => found[key](request, response, more(list), own) } : found
  }
}
"""
"""Runs in every Node process before its program. `replaced`: the flags taken away, and whether each has a value. Next
takes the hosts that may ask its dev server from its config alone; without a list Next 15 refuses nobody, and 16 all."""


def hook(*, host: str, port: int, preview_host: str | None, fresh: bool, only: str | None) -> str:
    """Return the option for NODE_OPTIONS that gives a known dev server its flags.

    It is a URL that has the whole program, so that the project's user need not be able to read a file of ours. Any
    Node from 18.18 on takes it.

    Args:
        host: Where the dev server is to listen.
        port: On which port.
        preview_host: The domains under which visitors come, with spaces between.
        fresh: Whether to start without what the previous start cached.
        only: The one directory whose dev server is meant, where a script starts several; None: all.
    """
    names, hosts = {HOST: host, PORT: str(port)}, (preview_host or "").split()
    patterns = [each for host in hosts for each in ((f"**{host}", host[1:]) if host[0] == "." else (host,))]
    known: dict[str, object] = {}
    for tool in TOOLS:
        allow = [host if word == PREVIEW_HOST else word for host in hosts for word in tool.allow]
        template = (*tool.flags, *allow, *(tool.fresh if fresh else ()))
        flags = [names.get(word, word) for word in template]
        valued = {
            name: not after.startswith("--")
            for name, after in zip(template, (*template, "--")[1:], strict=True)
            if name.startswith("--")
        }
        replaced = valued | dict.fromkeys(tool.short, True) | {"--open": False}
        told = {name: names.get(value, value) for name, value in tool.environ.items()}
        for package in tool.packages:
            known[package] = {"starts": tool.starts, "flags": flags, "replaced": replaced, "environ": told}
    source = HOOK.replace("DATA", json.dumps({"tools": known, "only": only, "hosts": patterns}))
    return "--import=data:text/javascript," + quote(source, safe="()*!'/;,:=[]{}$")


def known_tool(package: Mapping[str, Any]) -> Tool | None:
    """Return the dev server that a package.json depends on, if it is a known one."""
    named: set[str] = set()
    for name in ("dependencies", "devDependencies"):
        if isinstance(listed := package.get(name), dict):
            named |= listed.keys()
    return next((tool for tool in TOOLS if tool.packages[0] in named), None)


def named_tool(script: str, others: Sequence[str]) -> Tool | None:
    """Return the known dev server that a script calls, itself or by one of the `others` that it may hand on to."""
    texts = [script, *(others if _HANDS_ON.search(script) else ())]
    return next((tool for text in texts for tool in TOOLS if _PROGRAMS[tool.name].search(text)), None)


def is_plain(script: str) -> bool:
    """Return whether a script is one command, which no other program shares its environment with."""
    return not _SHELL.search(script) and not _HANDS_ON.search(script)


def command(scripts: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Return the command that runs a script as `npm run` does: with those before and after it, until one fails."""
    around = [each for each in (f"pre{name}", name, f"post{name}") if each in scripts]
    if around == [name]:
        return ("sh", "-c", scripts[name])
    named = (word for each in around for word in (each, scripts[each]))
    return ("sh", "-c", _IN_ORDER, "npm-run", *named)


_IN_ORDER = """
while [ $# -gt 0 ]; do npm_lifecycle_event=$1 npm_lifecycle_script=$2 sh -c "$2" || exit; shift 2; done
""".strip()


def variables(package: Mapping[str, Any], cwd: str, name: str | None, script: str | None) -> dict[str, str]:
    """Return the variables that `npm run` sets for a script of a package."""
    given = {f"npm_package_{each}": package.get(each) for each in ("name", "version")}
    if isinstance(config := package.get("config"), dict):
        given |= {f"npm_package_config_{each}": value for each, value in config.items()}
    told = {each: str(value) for each, value in given.items() if isinstance(value, str | int | float)}
    told |= {"npm_package_json": f"{cwd}/package.json", "npm_command": "run-script", "INIT_CWD": cwd}
    if name and script:
        told |= {"npm_lifecycle_event": name, "npm_lifecycle_script": script}
    return {each: value for each, value in told.items() if is_argument(each) and is_argument(value)}


def is_argument(text: str) -> bool:
    """Return whether a program can be given it: a JSON string may have half of a surrogate pair, or NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False
