"""Signs in the users of the local stack, in Supabase Auth's form: password, refresh, who am I, sign out.

Enough for `signInWithPassword`, `refreshSession`, `getUser` and `signOut` of the official clients. Accounts are made by
whoever made the database (`dev` makes one); sign-up, mail, OAuth, MFA and the admin API are not served, and say so: 501
with the name.

A password is kept as scrypt's hash in `auth.users.encrypted_password`, a refresh token as it is, as the original keeps
it. A refresh token is good once; used again, its session ends, but for `REUSE_SECONDS`, in which two tabs may have
asked with the same.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar
from uuid import uuid4

import orjson
import psycopg
from pydantic import BaseModel, StringConstraints, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orchestrator_stub.local_supabase.access import Claims, Pool, read_claims
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.platform.tokens import TokenRejected

ACCESS_SECONDS = 3600
"""The hosted default of an access token's life."""

REUSE_SECONDS = 10.0
"""The hosted default: for so long a used refresh token gives another session's worth, and is no theft."""

SCOPES = {
    "global": "delete from auth.sessions where user_id = %(user)s",
    "local": "delete from auth.sessions where user_id = %(user)s and id::text = %(session)s",
    "others": "delete from auth.sessions where user_id = %(user)s and id::text <> %(session)s",
}
"""What a sign-out ends."""

Body = TypeVar("Body", bound=BaseModel)
NO_NUL = r"^[^\x00]*$"
Word = Annotated[str, StringConstraints(max_length=1024, pattern=NO_NUL)]


class AuthError(Exception):
    """An answer in Supabase Auth's error form: `{"code", "error_code", "msg"}`."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.body = {"code": status, "error_code": code, "msg": message}
        super().__init__(message)


class Password(BaseModel):
    """`POST /token?grant_type=password`."""

    email: Word
    password: Word


class Refresh(BaseModel):
    """`POST /token?grant_type=refresh_token`."""

    refresh_token: Word


def hash_password(password: str, salt: bytes | None = None) -> str:
    """`scrypt$SALT$HASH`, base64. Takes some 50 ms of a core, outside of the interpreter's lock."""
    salt = salt or secrets.token_bytes(16)
    hashed = hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=salt, n=2**14, r=8, p=1)
    return "$".join(["scrypt", base64.b64encode(salt).decode(), base64.b64encode(hashed).decode()])


def is_password(password: str, kept: str | None) -> bool:
    """Whether `kept` is the hash of `password`. Without one it takes as long."""
    parts = (kept or "").split("$")
    known = len(parts) == 3 and parts[0] == "scrypt"
    hashed = hash_password(password, base64.b64decode(parts[1]) if known else b"nobody's")
    return hmac.compare_digest(hashed, kept or "") and known


class Auth:
    """The `/auth/v1` endpoints. `clock` gives Unix seconds."""

    def __init__(self, pool: Pool, keys: ProjectKeys, *, clock: Callable[[], float] = time.time) -> None:
        self._pool = pool
        self._keys = keys
        self._clock = clock

    def routes(self) -> list[Route]:
        return [
            Route("/auth/v1/token", self._answer(self._token), methods=["POST"]),
            Route("/auth/v1/user", self._answer(self._user), methods=["GET"]),
            Route("/auth/v1/logout", self._answer(self._logout), methods=["POST"]),
            Route(
                "/auth/v1/{rest:path}",
                self._answer(self._rest),
                methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            ),
        ]

    def _answer(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                if request.headers.get("apikey") not in (self._keys.anon_key, self._keys.service_key):
                    return JSONResponse({"message": "Invalid API key"}, 401)  # the gateway's own form
                return await endpoint(request)
            except AuthError as error:
                return JSONResponse(error.body, error.status)
            except psycopg.OperationalError:
                return JSONResponse(AuthError(503, "unexpected_failure", "the database is away").body, 503)

        return answer

    async def _rest(self, request: Request) -> Response:
        what = f"{request.method} /auth/v1/{request.path_params['rest'][:200]}"
        raise AuthError(
            501, "not_implemented", f"{what}: not served by the local stand-in (docs/stand-in.md)"
        )

    # --- sessions

    async def _token(self, request: Request) -> Response:
        match request.query_params.get("grant_type"):
            case "password":
                user_id, session = await self._with_password(await _body(request, Password))
            case "refresh_token":
                user_id, session = await self._with_refresh(await _body(request, Refresh))
            case other:
                what = f"grant_type {(other or '')[:100]!r}"
                raise AuthError(
                    501, "not_implemented", f"{what}: not served by the local stand-in (docs/stand-in.md)"
                )
        return JSONResponse(await self._session(user_id, session))

    async def _with_password(self, body: Password) -> tuple[str, str]:
        async with self._pool.connection() as connection:
            query = "select id::text, encrypted_password from auth.users where lower(email) = lower(%s)"
            row = await (await connection.execute(query, [body.email])).fetchone()
        good = await asyncio.to_thread(is_password, body.password, row and row[1])
        if row is None or not good:
            raise AuthError(400, "invalid_credentials", "Invalid login credentials")
        session = str(uuid4())
        async with self._pool.connection() as connection:
            await connection.execute(
                "insert into auth.sessions (id, user_id) values (%s, %s)", [session, row[0]]
            )
        return row[0], session

    async def _with_refresh(self, body: Refresh) -> tuple[str, str]:
        stolen: str | None = None
        async with self._pool.connection() as connection, connection.transaction():
            query = (
                "select t.session_id::text, s.user_id::text, t.revoked, extract(epoch from now() - t.updated_at)"
                " from auth.refresh_tokens t join auth.sessions s on s.id = t.session_id where t.token = %s for update"
            )
            row = await (await connection.execute(query, [body.refresh_token])).fetchone()
            if row is None:
                text = "Invalid Refresh Token: Refresh Token Not Found"
                raise AuthError(400, "refresh_token_not_found", text)
            if not row[2]:
                used = "update auth.refresh_tokens set revoked = true, updated_at = now() where token = %s"
                await connection.execute(used, [body.refresh_token])
            elif row[3] > REUSE_SECONDS:
                stolen = row[0]
                await connection.execute("delete from auth.sessions where id = %s", [stolen])
        if stolen is not None:
            raise AuthError(400, "refresh_token_already_used", "Invalid Refresh Token: Already Used")
        return row[1], row[0]

    async def _session(self, user_id: str, session: str) -> dict[str, Any]:
        now = int(self._clock())
        user = await self._user_form(user_id)
        if user is None:
            raise AuthError(403, "user_not_found", "User from sub claim in JWT does not exist")
        claims = {
            "sub": user_id, "role": "authenticated", "aud": "authenticated", "iat": now, "exp": now + ACCESS_SECONDS,
            "email": user["email"], "phone": "", "app_metadata": user["app_metadata"],
            "user_metadata": user["user_metadata"], "aal": "aal1", "amr": [{"method": "password", "timestamp": now}],
            "session_id": session, "is_anonymous": False,
        }  # fmt: skip
        refresh = secrets.token_urlsafe(24)
        async with self._pool.connection() as connection:
            added = "insert into auth.refresh_tokens (token, user_id, session_id) values (%s, %s, %s)"
            try:
                await connection.execute(added, [refresh, user_id, session])
            except psycopg.errors.ForeignKeyViolation:  # signed out in between
                raise AuthError(400, "session_not_found", "Session from session_id claim not found") from None
        return {
            "access_token": self._keys.keyring.sign(claims), "token_type": "bearer", "expires_in": ACCESS_SECONDS,
            "expires_at": now + ACCESS_SECONDS, "refresh_token": refresh, "user": user,
        }  # fmt: skip

    # --- who am I

    async def _user(self, request: Request) -> Response:
        claims = await self._claims(request)
        user = await self._user_form(str(claims["sub"]))
        if user is None:
            raise AuthError(403, "user_not_found", "User from sub claim in JWT does not exist")
        return JSONResponse(user)

    async def _logout(self, request: Request) -> Response:
        claims = await self._claims(request)
        query = SCOPES.get(request.query_params.get("scope", "global"))
        if query is None:
            raise AuthError(400, "validation_failed", "scope must be global, local or others")
        async with self._pool.connection() as connection:
            values = {"user": claims["sub"], "session": str(claims.get("session_id", ""))}
            await connection.execute(query.encode(), values)
        return Response(status_code=204)

    async def _claims(self, request: Request) -> Claims:
        """Of a user's token whose session, where it names one, is not over. Raises `AuthError`."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise AuthError(401, "no_authorization", "This endpoint requires a valid Bearer token")
        try:
            claims = read_claims(self._keys.keyring, token, now=self._clock())
        except TokenRejected as error:
            raise AuthError(403, "bad_jwt", f"invalid JWT: {error}") from None
        query = (
            "select exists (select from auth.users where id::text = %s),"
            " exists (select from auth.sessions where id::text = %s)"
        )
        async with self._pool.connection() as connection:
            names = [str(claims.get("sub", "")), str(claims.get("session_id", ""))]
            row = await (await connection.execute(query, names)).fetchone()
        assert row is not None
        if not row[0]:
            raise AuthError(403, "user_not_found", "User from sub claim in JWT does not exist")
        if "session_id" in claims and not row[1]:
            text = "Session from session_id claim in JWT does not exist"
            raise AuthError(403, "session_not_found", text)
        return claims

    async def _user_form(self, user_id: str) -> dict[str, Any] | None:
        async with self._pool.connection() as connection:
            query = "select email, coalesce(raw_user_meta_data, '{}'), created_at from auth.users where id::text = %s"
            row = await (await connection.execute(query, [user_id])).fetchone()
        if row is None:
            return None
        made = (row[2] or datetime.fromtimestamp(0, UTC)).isoformat()
        return {
            "id": user_id, "aud": "authenticated", "role": "authenticated", "email": row[0], "phone": "",
            "email_confirmed_at": made, "confirmed_at": made, "created_at": made, "updated_at": made,
            "app_metadata": {"provider": "email", "providers": ["email"]}, "user_metadata": row[1],
            "identities": [], "is_anonymous": False,
        }  # fmt: skip


async def _body(request: Request, model: type[Body]) -> Body:
    try:
        return model.model_validate(orjson.loads(await request.body() or b"{}"))
    except (orjson.JSONDecodeError, ValidationError):
        wanted = " and ".join(model.model_fields)
        raise AuthError(400, "validation_failed", f"the body must be JSON with {wanted}") from None
