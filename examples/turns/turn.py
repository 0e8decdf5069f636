"""A turn with supabase-py: what is written in it appears at its end, all at once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from postgrest.exceptions import APIError

from supabase import Client, ClientOptions, create_client

Merge = Callable[[str, str | None, str | None], str | None]


def connect() -> Client:
    """As the signed-in user."""
    signed_in = {"Authorization": f"Bearer {os.environ['ACCESS_TOKEN']}"}
    options = ClientOptions(headers=signed_in)
    return create_client(os.environ["SUPABASE_URL"], os.environ["SUPABASE_ANON_KEY"], options)


def rpc(supabase: Client, name: str, arguments: dict[str, Any]) -> Any:
    """An RPC's answer; its refusal is an `APIError`: `code` is PT409 and its like, `details` JSON."""
    return supabase.rpc(name, arguments).execute().data


class Turn:
    """Keep `id` somewhere that outlives this process: whoever has it can go on."""

    def __init__(self, supabase: Client, project: str, turn_id: str) -> None:
        self.supabase = supabase
        self.project = project
        self.id = turn_id

    @classmethod
    def begin(cls, supabase: Client, project: str, label: str) -> Turn:
        answer = rpc(supabase, "begin_turn", {"project_uuid": project, "p_label": label})
        return cls(supabase, project, answer["turn_id"])

    def _call(self, name: str, **arguments: Any) -> Any:
        return rpc(self.supabase, name, {"project_uuid": self.project, **arguments})

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
            except APIError as refused:
                conflicts = (
                    json.loads(refused.details or "{}").get("conflicts") if refused.code == "PT409" else None
                )
                if merge is None or conflicts is None:
                    raise
                self._merge(merge, conflicts)
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
