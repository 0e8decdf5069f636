"""What an editor does with a project, with supabase-py. Every part between `region` and `endregion` stands in
docs/front-end.md."""

from __future__ import annotations

# region connect
import hashlib
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import httpx
from postgrest.exceptions import APIError
from storage3.exceptions import StorageApiError

from supabase import AsyncClient, Client, create_client


def connect(url: str, anon_key: str, email: str, password: str) -> Client:
    supabase = create_client(url, anon_key)
    supabase.auth.sign_in_with_password({"email": email, "password": password})
    return supabase


def call(supabase: Client, name: str, **arguments: Any) -> Any:
    """An RPC's answer; its refusal is an `APIError`: `code` is PT409 and its like, `details` is JSON."""
    return supabase.rpc(name, arguments).execute().data


# endregion


# region save
def save(supabase: Client, project: str, path: str, content: str, expected: int) -> int:
    """Gives the version that the file is at now. `expected`: the version that was edited, 0 for a new file."""
    saved = call(
        supabase,
        "upsert_project_file",
        project_uuid=project,
        p_file_path=path,
        p_content=content,
        expected_version=expected,
    )
    version: int = saved["version"]
    return version


# endregion


# region conflict
Merge = Callable[[str, str | None], str]


def save_merged(supabase: Client, project: str, path: str, content: str, expected: int, merge: Merge) -> int:
    """Saves, and when somebody else has saved meanwhile, merges with what they wrote."""
    while True:
        try:
            return save(supabase, project, path, content, expected)
        except APIError as refused:
            if refused.code != "PT409":
                raise
        current = (
            supabase.table("project_files_current")
            .select("content, version")
            .match({"project_id": project, "file_path": path})
            .execute()
            .data
        )
        content = merge(content, current[0]["content"] if current else None)
        expected = current[0]["version"] if current else 0


# endregion


# region delete
def remove(supabase: Client, project: str, path: str, expected: int) -> None:
    call(supabase, "delete_project_file", project_uuid=project, p_file_path=path, expected_version=expected)


# endregion


# region rename
def rename(supabase: Client, project: str, old: str, new: str, expected: int) -> None:
    """The file's history goes on: `renamed_from` of the new version is the id of the last one under the old name."""
    call(
        supabase, "rename_project_file", project_uuid=project, p_from=old, p_to=new, expected_version=expected
    )


# endregion


# region many
def write_many(supabase: Client, project: str, changes: list[dict[str, Any]]) -> int:
    """All of them or none: one revision, and the preview is updated once. A conflict names every path in `conflicts`.

    A change: `file_path`, `content`, or `action` "delete"; and `expected_version`.
    """
    request = str(uuid.uuid4())  # asked again after a lost answer, the first answer is given again
    done = call(
        supabase, "apply_project_files", project_uuid=project, changes=changes, p_correlation_id=request
    )
    revision: int = done["revision"]
    return revision


# endregion


# region binary
def upload_binary(supabase: Client, project: str, path: str, content: bytes, content_type: str) -> int:
    """The bytes go to Storage under their hash, the project is told the hash."""
    digest = hashlib.sha256(content).hexdigest()
    try:
        supabase.storage.from_("project-assets").upload(
            f"{project}/{digest}", content, {"content-type": content_type}
        )
    except StorageApiError as refused:
        if str(refused.status) != "409":  # these bytes are there already: somebody uploaded them before
            raise
    change = {"file_path": path, "content": None, "content_hash": digest, "encoding": "base64"}
    done = call(supabase, "apply_project_files", project_uuid=project, changes=[change])
    revision: int = done["revision"]
    return revision


# endregion


# region subscribe
async def follow(supabase: AsyncClient, project: str, show: Callable[[], None]) -> Any:
    """`show` reads the tree anew: at the start, after each reconnect, and after each commit of anybody.

    Realtime is of the asynchronous client: `await supabase.acreate_client(url, anon_key)`, signed in as above.
    """
    channel = supabase.channel(f"project:{project}", {"config": {"private": True}})
    for event in ("file:update", "file:delete", "bulk:apply"):
        channel.on_broadcast(event, lambda message: show())
    # A message may have been lost while nobody listened.
    await channel.subscribe(lambda status, error: show() if status == "SUBSCRIBED" else None)
    return channel


# endregion


# region restore
def restore(supabase: Client, project: str, path: str) -> int:
    versions = (
        supabase.table("project_files")
        .select("version, created_at, created_by, is_deleted")
        .match({"project_id": project, "file_path": path})
        .order("version", desc=True)
        .execute()
        .data
    )
    good = next(each for each in versions[1:] if not each["is_deleted"])
    restored = call(
        supabase,
        "restore_project_file",
        project_uuid=project,
        p_file_path=path,
        p_version=good["version"],
        expected_version=versions[0]["version"],
    )
    version: int = restored["version"]
    return version


# endregion


# region session
def open_session(supabase: Client, orchestrator: str, project: str, key: str) -> dict[str, Any]:
    """The preview's session: the same one for the same `key`, however often it is asked for."""
    signed_in = supabase.auth.get_session()
    assert signed_in is not None
    headers = {"Authorization": f"Bearer {signed_in.access_token}"}
    with httpx.Client(base_url=orchestrator, headers=headers, timeout=30) as http:
        answer = http.post("/v1/sessions", json={"project_id": project}, headers={"Idempotency-Key": key})
        while True:
            session: dict[str, Any] = answer.json()
            if answer.is_error:
                raise RuntimeError(session["detail"])
            if session["state"] not in ("requested", "provisioning"):
                return session  # `preview_url` once it is `ready`
            time.sleep(1)
            answer = http.get(f"/v1/sessions/{session['session_id']}")


# endregion


# region turn
def write_turn(
    supabase: Client, project: str, label: str, files: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """What an AI writes one file after the other, the preview shows at the end: all at once."""
    turn = call(supabase, "begin_turn", project_uuid=project, p_label=label)["turn_id"]
    for path, content in files:
        call(
            supabase,
            "upsert_project_file",
            project_uuid=project,
            p_file_path=path,
            p_content=content,
            p_turn_id=turn,
        )
    ended: dict[str, Any] = call(supabase, "end_turn", project_uuid=project, turn_id=turn)
    return ended


# endregion
