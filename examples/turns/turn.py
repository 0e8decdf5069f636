"""A turn over PostgREST: what is written in it appears at its end, all at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import httpx

Merge = Callable[[str, str | None, str | None], str | None]


class Refused(Exception):
    """An RPC's refusal: `code` is PT409 and its like."""

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(body["message"])
        self.code: str = body["code"]
        self.details: dict[str, Any] = json.loads(body["details"] or "{}")


class Supabase:
    """As the signed-in user."""

    def __init__(self) -> None:
        self._http = httpx.Client(
            base_url=f"{os.environ['SUPABASE_URL']}/rest/v1/rpc/",
            headers={
                "apikey": os.environ["SUPABASE_ANON_KEY"],
                "Authorization": f"Bearer {os.environ['ACCESS_TOKEN']}",
            },
            timeout=30,
        )

    def rpc(self, name: str, arguments: dict[str, Any]) -> Any:
        answer = self._http.post(name, json=arguments)
        if answer.is_error:
            raise Refused(answer.json())
        return answer.json()


class Turn:
    """Keep `id` somewhere that outlives this process: whoever has it can go on."""

    def __init__(self, supabase: Supabase, project: str, turn_id: str) -> None:
        self.supabase = supabase
        self.project = project
        self.id = turn_id

    @classmethod
    def begin(cls, supabase: Supabase, project: str, label: str) -> Turn:
        answer = supabase.rpc("begin_turn", {"project_uuid": project, "p_label": label})
        return cls(supabase, project, answer["turn_id"])

    def _call(self, name: str, **arguments: Any) -> Any:
        return self.supabase.rpc(name, {"project_uuid": self.project, **arguments})

    def write(self, path: str, content: str, expected: int | None = None) -> None:
        """Staged: nobody sees it yet. Each write renews the lease."""
        arguments = {"p_file_path": path, "p_content": content, "expected_version": expected}
        self._call("upsert_project_file", **arguments, p_turn_id=self.id)

    def remove(self, path: str, expected: int | None = None) -> None:
        self._call("delete_project_file", p_file_path=path, expected_version=expected, p_turn_id=self.id)

    def files(self) -> dict[str, str | None]:
        """The project as it will be, to read from while writing."""
        rows = self._call("list_current_files", p_turn_id=self.id)
        return {row["file_path"]: row["content"] for row in rows}

    def abandon(self) -> None:
        self._call("abandon_turn", turn_id=self.id)

    def end(self, merge: Merge | None = None) -> dict[str, Any]:
        """All of it, in one revision. Calling it again after a lost answer gives the first one.

        `merge(path, mine, theirs)` is asked for each file that somebody else wrote meanwhile. It answers what to write;
        None deletes, and `mine` or `theirs` is None where that side deleted it.
        """
        while True:
            try:
                answer: dict[str, Any] = self._call("end_turn", turn_id=self.id)
            except Refused as refused:
                if merge is None or refused.code != "PT409" or "conflicts" not in refused.details:
                    raise
                self._merge(merge, refused.details["conflicts"])
            else:
                return answer

    def _merge(self, merge: Merge, conflicts: list[dict[str, Any]]) -> None:
        mine = self.files()
        theirs = {row["file_path"]: row for row in self._call("list_current_files")}
        for conflict in conflicts:
            path = conflict["file_path"]
            row = theirs.get(path, {"content": None, "version": conflict["version"]})
            merged = merge(path, mine.get(path), row["content"])
            # The version that was merged into becomes the base; who wrote again in the meantime is the next round's.
            if merged is None:
                self.remove(path, row["version"])
            else:
                self.write(path, merged, row["version"])
