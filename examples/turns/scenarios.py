"""python scenarios.py forty | conflict | die | resume TURN_ID | two"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from turn import Turn, connect, rpc

PROJECT = os.environ["PROJECT_ID"]
supabase = connect()


def save(path: str, content: str) -> None:
    rpc(
        supabase,
        "upsert_project_file",
        {"project_uuid": PROJECT, "p_file_path": path, "p_content": content},
    )


def say(what: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def component(number: int) -> str:
    return f"export const Part{number} = () => <p>part {number}</p>\n"


def forty() -> dict[str, Any]:
    """The page before its components, and the old page away: nobody sees a page without its parts."""
    save("src/Old.tsx", "export const Old = () => null\n")
    turn = Turn.begin(supabase, PROJECT, "A landing page")
    turn.write("src/Page.tsx", "import { Part1 } from './parts/1'\n")
    for n in range(1, 40):
        turn.write(f"src/parts/{n}.tsx", component(n))
    turn.remove("src/Old.tsx")
    ended = turn.end()
    return {"turn": turn.id, "revision": ended["revision"], "changed": ended["changed"]}


def conflict() -> dict[str, Any]:
    """A person saves a file that the turn has written too. Both are kept."""
    save("src/Page.tsx", "line 1\n")
    turn = Turn.begin(supabase, PROJECT, "A second line")
    turn.write("src/Page.tsx", "line 1\nline 2\n")
    turn.write("src/New.tsx", "new\n")
    save("src/Page.tsx", "line 0\nline 1\n")
    asked = []

    def merge(path: str, mine: str | None, theirs: str | None) -> str:
        asked.append(path)
        return (theirs or "") + (mine or "").removeprefix("line 1\n")

    return {"turn": turn.id, "revision": turn.end(merge)["revision"], "asked": asked}


def die() -> dict[str, Any]:
    """Writes half of a turn and never comes back."""
    turn = Turn.begin(supabase, PROJECT, "In two halves")
    for n in range(1, 21):
        turn.write(f"src/parts/{n}.tsx", component(n))
    say({"turn": turn.id})
    time.sleep(600)
    return {}


def resume(turn_id: str) -> dict[str, Any]:
    """Another process, with the turn's id alone, writes what is missing. The answer to the first end is lost."""
    turn = Turn(supabase, PROJECT, turn_id)
    there = turn.files()
    for n in range(1, 41):
        if f"src/parts/{n}.tsx" not in there:
            turn.write(f"src/parts/{n}.tsx", component(n))
    turn.end()
    ended = turn.end()
    return {
        "turn": turn.id,
        "found": len(there),
        "revision": ended["revision"],
        "changed": ended["changed"],
    }


def two() -> dict[str, Any]:
    """Two writers, each with a turn of its own: two revisions, whichever ends first."""

    def write(name: str) -> dict[str, Any]:
        turn = Turn.begin(supabase, PROJECT, name)
        for n in range(10):
            turn.write(f"src/{name}/{n}.tsx", component(n))
        return {"turn": turn.id, "revision": turn.end()["revision"]}

    with ThreadPoolExecutor(2) as threads:
        return {"ended": list(threads.map(write, ["left", "right"]))}


scenario = {"forty": forty, "conflict": conflict, "die": die, "resume": resume, "two": two}[sys.argv[1]]
say(scenario(*sys.argv[2:]))
