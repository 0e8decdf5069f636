"""Does all of it once, in order, and says what came of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import editor

from supabase import acreate_client

URL, KEY, PROJECT = os.environ["SUPABASE_URL"], os.environ["SUPABASE_ANON_KEY"], os.environ["PROJECT_ID"]
WHO = os.environ["EMAIL"], os.environ["PASSWORD"]


def walk() -> dict[str, Any]:
    supabase = editor.connect(URL, KEY, *WHO)
    told: dict[str, Any] = {"asked": []}

    def merge(mine: str, theirs: str | None) -> str:
        told["asked"].append(theirs)
        return (theirs or "") + mine

    told["saved"] = editor.save(supabase, PROJECT, "src/a.ts", "one\n", 0)
    told["merged"] = editor.save_merged(supabase, PROJECT, "src/a.ts", "mine\n", 0, merge)
    editor.rename(supabase, PROJECT, "src/a.ts", "src/b.ts", told["merged"])
    names = ("src/c.ts", "src/d.ts")
    told["many"] = editor.write_many(
        supabase,
        PROJECT,
        [{"file_path": name, "content": f"{name[4]}\n", "expected_version": 0} for name in names],
    )
    editor.remove(supabase, PROJECT, "src/d.ts", 1)
    logo = bytes([137, 80, 78, 71])
    told["binary"] = editor.upload_binary(supabase, PROJECT, "logo.png", logo, "image/png")
    editor.upload_binary(supabase, PROJECT, "icon.png", logo, "image/png")
    editor.save(supabase, PROJECT, "src/c.ts", "spoilt\n", 1)
    told["restored"] = editor.restore(supabase, PROJECT, "src/c.ts")
    pages = [("src/Page.tsx", "page\n"), ("src/Part.tsx", "part\n")]
    told["turn"] = editor.write_turn(supabase, PROJECT, "a page", pages)["changed"]
    told["session"] = editor.open_session(supabase, URL, PROJECT, "walk")["project_id"]
    supabase.auth.sign_out()
    return told


async def main() -> None:
    supabase = await acreate_client(URL, KEY)
    await supabase.auth.sign_in_with_password({"email": WHO[0], "password": WHO[1]})
    shown: asyncio.Queue[None] = asyncio.Queue()
    channel = await editor.follow(supabase, PROJECT, lambda: shown.put_nowait(None))
    await shown.get()
    told = await asyncio.to_thread(walk)
    await shown.get()
    await supabase.remove_channel(channel)
    sys.stdout.write(json.dumps(told) + "\n")


asyncio.run(main())
