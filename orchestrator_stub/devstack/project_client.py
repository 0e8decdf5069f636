"""Speaks for a person to the stack: saves, uploads and reads of one project, with a user's token.

A save is `upsert_project_file`, a removal `delete_project_file`, several at once `apply_project_files`; binary files go
to the `project-assets` bucket first.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import httpx
import tenacity

from orchestrator_stub.devstack.three_way import UNCERTAIN, Theirs
from orchestrator_stub.platform.source_files import LocalFile, as_text
from orchestrator_stub.platform.tokens import Keyring

TOKEN_LIFE: Final = 300
"""Seconds. A user's token is made for each request; it need only outlive the request."""

PAGE: Final = 1000
"""Rows of one answer: PostgREST's own limit on hosted Supabase."""


class SaveRefused(Exception):
    """The database turned a save away for good; its sentence is the message."""


def user_token(keys: Keyring, user_id: UUID, now: float, seconds: float) -> str:
    """A signed-in user's access token, as Supabase Auth makes them. `now`: Unix seconds."""
    claims = {"role": "authenticated", "aud": "authenticated", "sub": str(user_id)}
    return keys.sign({**claims, "iat": int(now), "exp": int(now + seconds)})


class UserAuth(httpx.Auth):
    """Signs each request as the user that the keyring's project knows by `user_id`."""

    def __init__(self, keys: Keyring, user_id: UUID, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._user_id = user_id
        self._clock = clock

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        token = user_token(self._keys, self._user_id, self._clock(), TOKEN_LIFE)
        request.headers["Authorization"] = f"Bearer {token}"
        yield request


class ProjectClient:
    """One project. `http` has the stack's base URL, API key and a user's auth.

    Methods raise `httpx.HTTPError` when the stack does not answer for longer than a few tries, `SaveRefused` when it
    refuses for good.
    """

    def __init__(self, http: httpx.AsyncClient, project_id: UUID) -> None:
        self._http = http
        self._project_id = project_id

    async def save(
        self,
        updates: Mapping[str, tuple[LocalFile, bytes]],
        deletes: Sequence[str],
        known: Mapping[str, LocalFile],
    ) -> None:
        """Save it all in one commit. `known`: what the project is known to hold."""
        name, arguments = await self._call_for(updates, deletes, known)
        # A removal of what never came to be there, as after a save that was not taken, is done.
        done = frozenset({"PT404"} if name == "delete_project_file" else ())
        await self._send("POST", f"/rest/v1/rpc/{name}", json=arguments, known=done)

    async def current(self) -> dict[str, Theirs]:
        """What the project holds, without the contents."""
        found: dict[str, Theirs] = {}
        while True:
            query = {
                "project_id": f"eq.{self._project_id}",
                "select": "file_path,content_hash,executable,version,encoding",
                "order": "file_path",
                "limit": str(PAGE),
                "offset": str(len(found)),
            }
            answer = await self._send("GET", "/rest/v1/project_files_current", params=query)
            rows = answer.json() if answer is not None else []
            for row in rows:
                file = LocalFile(row["content_hash"], bool(row["executable"]))
                found[row["file_path"]] = Theirs(file, row["version"], row["encoding"] == "utf-8")
            if len(rows) < PAGE:
                return found

    async def content(self, path: str, theirs: Theirs) -> bytes | None:
        """The bytes that the project holds at a path; None when they have changed meanwhile."""
        if not theirs.is_text:
            at = f"project-assets/{self._project_id}/{theirs.file.digest}"
            answer = await self._send(
                "GET", f"/storage/v1/object/authenticated/{at}", known=frozenset({"404"})
            )
            return answer.content if answer is not None else None
        query = {
            "project_id": f"eq.{self._project_id}",
            "file_path": f"eq.{path}",
            "version": f"eq.{theirs.version}",
            "select": "content",
        }
        answer = await self._send("GET", "/rest/v1/project_files_current", params=query)
        rows = answer.json() if answer is not None else []
        return str(rows[0]["content"]).encode() if rows else None

    async def _call_for(
        self,
        updates: Mapping[str, tuple[LocalFile, bytes]],
        deletes: Sequence[str],
        known: Mapping[str, LocalFile],
    ) -> tuple[str, dict[str, Any]]:
        """The RPC that says it all, assets uploaded: its name and arguments."""
        project = {"project_uuid": str(self._project_id)}
        if not updates and len(deletes) == 1:
            return "delete_project_file", {**project, "p_file_path": deletes[0]}
        if len(updates) == 1 and not deletes:
            [(path, (file, content))] = updates.items()
            before = known.get(path)
            text = as_text(content)
            same_mode = file.executable == (before is not None and before.executable)
            if text is not None and same_mode and before != UNCERTAIN:
                return "upsert_project_file", {**project, "p_file_path": path, "p_content": text}
        changes: list[dict[str, Any]] = [{"action": "delete", "file_path": path} for path in deletes]
        for path, (file, content) in updates.items():
            change: dict[str, Any] = {
                "action": "update",
                "file_path": path,
                "content_hash": file.digest,
                "executable": file.executable,
            }
            text = as_text(content)
            if text is not None:
                change["content"] = text
            else:
                await self._upload(file.digest, content)
                change["encoding"] = "base64"
            changes.append(change)
        return "apply_project_files", {**project, "changes": changes}

    async def _upload(self, digest: str, content: bytes) -> None:
        """Have an asset stored. An object is its hash, so one that is there already is the same and is not sent.

        Storage refuses a stored key without reading the body, which then stands in the connection before whatever
        comes next; so an upload is the last of its connection.
        """
        at = f"project-assets/{self._project_id}/{digest}"
        absent = frozenset({"404"})
        if await self._send("POST", f"/storage/v1/object/sign/{at}", json={"expiresIn": 1}, known=absent):
            return
        await self._send(
            "POST",
            f"/storage/v1/object/{at}",
            content=content,
            headers={"Content-Type": "application/octet-stream", "Connection": "close"},
            known=frozenset({"409"}),
        )

    async def _send(
        self, method: str, path: str, *, known: frozenset[str] = frozenset(), **content: Any
    ) -> httpx.Response | None:
        """One request, tried again while the stack is unreachable or overloaded. None: refused with a `known` code."""
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(5),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            reraise=True,
        ):
            with attempt:
                response = await self._http.request(method, path, **content)
                if response.is_success:
                    return response
                if response.status_code == 429 or response.status_code >= 500:
                    response.raise_for_status()
                answer = _object(response)
                if known.isdisjoint({str(answer.get("statusCode")), str(answer.get("code"))}):
                    raise SaveRefused(str(answer.get("message") or response.status_code))
        return None


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
