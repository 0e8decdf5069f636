"""Signing in: password, refresh, who am I, sign out; and what is not served says so."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import jwt
import pytest

from orchestrator_stub.local_supabase.auth import hash_password, is_password
from tests.fakes.serving import Local

pytestmark = pytest.mark.asyncio(loop_scope="module")

PASSWORD = "correct horse \N{SNOWMAN}"
HASH = hash_password(PASSWORD)


async def new_user(local: Local) -> tuple[str, str]:
    user, email = str(uuid4()), f"{uuid4().hex[:8]}@Example.com"
    query = "insert into auth.users (id, email, encrypted_password) values (%s, %s, %s)"
    await local.sql(query, user, email, HASH)
    return user, email


async def ask(local: Local, grant: str, **body: Any) -> httpx.Response:
    return await local.http.post(f"/auth/v1/token?grant_type={grant}", json=body)


def bearer(session: dict[str, Any]) -> dict[str, str]:
    return {"authorization": f"Bearer {session['access_token']}"}


def refusal(answer: httpx.Response) -> tuple[int, str]:
    body = answer.json()
    assert set(body) == {"code", "error_code", "msg"}
    assert body["code"] == answer.status_code
    return body["code"], body["error_code"]


async def test_a_password_is_good_for_a_session(local: Local) -> None:
    user, email = await new_user(local)
    answer = await ask(local, "password", email=email.upper(), password=PASSWORD)
    assert answer.status_code == 200, answer.text
    session = answer.json()
    assert (session["token_type"], session["expires_in"], session["user"]["id"]) == ("bearer", 3600, user)
    claims = jwt.decode(session["access_token"], options={"verify_signature": False})
    assert (claims["sub"], claims["role"], claims["aud"]) == (user, "authenticated", "authenticated")
    assert claims["exp"] == session["expires_at"] == claims["iat"] + 3600
    me = await local.http.get("/auth/v1/user", headers=bearer(session))
    assert (me.json()["id"], me.json()["email"]) == (user, email)
    rows = await local.http.get("/rest/v1/projects?select=id", headers=bearer(session))
    assert rows.json() == [], "the database takes it for a user's"


@pytest.mark.parametrize("email", ["nobody@example.com", None])
async def test_a_wrong_password_and_an_unknown_user_are_told_the_same(
    local: Local, email: str | None
) -> None:
    _, known = await new_user(local)
    answer = await ask(local, "password", email=email or known, password="wrong")
    assert refusal(answer) == (400, "invalid_credentials")
    await local.sql("update auth.users set encrypted_password = null")
    assert refusal(await ask(local, "password", email=known, password=PASSWORD))[1] == "invalid_credentials"


async def test_a_refresh_token_is_good_once(local: Local) -> None:
    user, email = await new_user(local)
    first = (await ask(local, "password", email=email, password=PASSWORD)).json()
    second = (await ask(local, "refresh_token", refresh_token=first["refresh_token"])).json()
    assert second["user"]["id"] == user
    assert second["refresh_token"] != first["refresh_token"]
    # Two tabs at once are no theft.
    tab = await ask(local, "refresh_token", refresh_token=first["refresh_token"])
    assert tab.status_code == 200
    await local.sql("update auth.refresh_tokens set updated_at = now() - interval '11 seconds'")
    late = await ask(local, "refresh_token", refresh_token=first["refresh_token"])
    assert refusal(late) == (400, "refresh_token_already_used")
    ended = await ask(local, "refresh_token", refresh_token=second["refresh_token"])
    assert refusal(ended) == (400, "refresh_token_not_found")
    assert refusal(await local.http.get("/auth/v1/user", headers=bearer(second))) == (
        403,
        "session_not_found",
    )


@pytest.mark.parametrize(("scope", "left"), [("global", []), ("local", [1]), ("others", [0])])
async def test_signing_out_ends_sessions(local: Local, scope: str, left: list[int]) -> None:
    _, email = await new_user(local)
    sessions = [(await ask(local, "password", email=email, password=PASSWORD)).json() for _ in range(2)]
    out = await local.http.post(f"/auth/v1/logout?scope={scope}", headers=bearer(sessions[0]))
    assert out.status_code == 204
    alive = [
        n
        for n, session in enumerate(sessions)
        if (await ask(local, "refresh_token", refresh_token=session["refresh_token"])).is_success
    ]
    assert alive == left
    if 0 not in left:
        again = await local.http.post("/auth/v1/logout", headers=bearer(sessions[0]))
        assert refusal(again) == (403, "session_not_found")


async def test_who_is_nobody(local: Local) -> None:
    user, _ = await new_user(local)
    for token, expected in (
        ("no token", (403, "bad_jwt")),
        (local.token("authenticated", sub=user, ttl=-1), (403, "bad_jwt")),
        (local.token("authenticated", sub=str(uuid4())), (403, "user_not_found")),
        (local.token("authenticated", sub="no uuid"), (403, "user_not_found")),
        (local.keys.anon_key, (403, "user_not_found")),
    ):
        headers = {"authorization": f"Bearer {token}"}
        assert refusal(await local.http.get("/auth/v1/user", headers=headers)) == expected
        assert refusal(await local.http.post("/auth/v1/logout", headers=headers)) == expected
    own = {"authorization": f"Bearer {local.token('authenticated', sub=user)}"}
    assert (await local.http.get("/auth/v1/user", headers=own)).json()["id"] == user
    assert (await local.http.get("/auth/v1/user", headers={**own, "apikey": "x"})).status_code == 401


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"{}", b'{"email": 7, "password": "x"}', b'{"email": "a\\u0000", "password": "x"}']
)
async def test_what_is_malformed_is_a_400(local: Local, body: bytes) -> None:
    for grant in ("password", "refresh_token"):
        answer = await local.http.post(f"/auth/v1/token?grant_type={grant}", content=body)
        assert refusal(answer) == (400, "validation_failed")


@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("POST", "signup"), ("POST", "otp"), ("POST", "recover"), ("GET", "authorize"), ("PUT", "user"),
        ("POST", "admin/users"), ("GET", "factors"), ("POST", "token?grant_type=pkce"), ("GET", "settings"),
    ],
)  # fmt: skip
async def test_what_is_not_served_says_its_name(local: Local, method: str, at: str) -> None:
    answer = await local.http.request(method, f"/auth/v1/{at}")
    assert refusal(answer) == (501, "not_implemented")
    assert at.rpartition("=")[2] in answer.json()["msg"]


async def test_a_page_of_any_origin_may_sign_in(local: Local) -> None:
    """The gateway's CORS, as hosted: nothing goes by cookies."""
    for at in ("auth/v1/token", "storage/v1/bucket", "rest/v1/rpc/x"):
        asked = await local.http.options(
            f"/{at}",
            headers={
                "origin": "https://app.example.com",
                "access-control-request-method": "POST",
                "access-control-request-headers": "apikey,authorization,content-type,x-client-info",
            },
        )
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, "*")
        assert "x-client-info" in asked.headers["access-control-allow-headers"]
    answer = await ask(local, "password")
    assert "access-control-allow-origin" not in answer.headers, "nobody asked"
    answer = await local.http.post(
        "/auth/v1/token?grant_type=password", headers={"origin": "https://x.example"}
    )
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_a_hash_is_of_its_password_alone() -> None:
    assert is_password(PASSWORD, HASH)
    for other in (None, "", "scrypt$$", "$2a$10$bcrypt", HASH[:-4], HASH.replace("scrypt", "x")):
        assert not is_password(PASSWORD, other)
    assert not is_password(PASSWORD + " ", HASH)
