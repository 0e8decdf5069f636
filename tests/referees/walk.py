"""What the documentation of supabase-py and storage3 shows, method by method, against one server. Each line that goes
out is one method: `{"method", "failure"}`.

    python walk.py URL ANON_KEY SERVICE_KEY EMAIL PASSWORD PROJECT
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import httpx
from postgrest import CountMethod
from postgrest.exceptions import APIError
from storage3.exceptions import StorageApiError
from supabase_auth.errors import AuthApiError

from supabase import create_client

URL, ANON, SERVICE, EMAIL, PASSWORD, PROJECT = sys.argv[1:]
BUCKET = "walk"
service = create_client(URL, SERVICE)
supabase = create_client(URL, ANON)
storage = service.storage
at = storage.from_(BUCKET)


def refused(call: Callable[[], Any], expected: str) -> None:
    try:
        call()
    except StorageApiError as error:
        found = str(error.status)
    except (APIError, AuthApiError) as error:
        found = str(error.code)
    else:
        found = "no error"
    assert found == expected, f"{found} instead of {expected}"


def create_bucket() -> None:
    options = {"public": False, "allowed_mime_types": ["image/*", "text/plain"], "file_size_limit": 1_000_000}
    storage.create_bucket(BUCKET, options=options)  # type: ignore[arg-type]
    refused(lambda: storage.create_bucket(BUCKET), "409")


def get_bucket() -> None:
    assert storage.get_bucket(BUCKET).file_size_limit == 1_000_000


def list_buckets() -> None:
    assert BUCKET in [bucket.id for bucket in storage.list_buckets()]


def update_bucket() -> None:
    storage.update_bucket(BUCKET, {"public": True, "file_size_limit": 2000})
    assert storage.get_bucket(BUCKET).public


def upload() -> None:
    text = {"content-type": "text/plain"}
    at.upload("a b/ü.txt", b"one", {**text, "cache-control": "60", "metadata": {"by": "walk"}})  # type: ignore[arg-type]
    at.upload("folder/raw.txt", b"raw", text)  # type: ignore[arg-type]
    at.upload("form.txt", b"form", text)  # type: ignore[arg-type]
    refused(lambda: at.upload("form.txt", b"again", text), "409")  # type: ignore[arg-type]
    refused(lambda: at.upload("page.html", b"x", {"content-type": "text/html"}), "415")
    refused(lambda: at.upload("big.txt", b"x" * 2001, text), "413")  # type: ignore[arg-type]
    at.upload("form.txt", b"upserted", {**text, "upsert": "true"})  # type: ignore[arg-type]


def update() -> None:
    at.update("form.txt", b"newer", {"content-type": "text/plain"})


def download() -> None:
    assert at.download("a b/ü.txt") == b"one"
    refused(lambda: at.download("nothing"), "404")


def info() -> None:
    described = at.info("a b/ü.txt")
    assert (described["size"], described["metadata"]) == (3, {"by": "walk"})


def exists() -> None:
    assert at.exists("form.txt")
    assert not at.exists("nothing")


def list_folder() -> None:
    listed = at.list("", {"limit": 2, "sortBy": {"column": "name", "order": "desc"}})
    assert [each["name"] for each in listed] == ["form.txt", "folder"]


def list_v2() -> None:
    first = at.list_v2({"limit": 2, "prefix": "f"})
    assert [each.name for each in first.objects] == ["folder/raw.txt", "form.txt"]
    page = at.list_v2({"limit": 1, "with_delimiter": True})
    assert (page.hasNext, [each.name for each in page.folders]) == (True, ["a b/"])
    assert page.nextCursor is not None
    following = at.list_v2({"limit": 1, "with_delimiter": True, "cursor": page.nextCursor})
    assert [each.name for each in following.folders] == ["folder/"]


def create_signed_url() -> None:
    url = at.create_signed_url("a b/ü.txt", 60, {"download": "as.txt"})["signedUrl"]
    assert httpx.get(str(url)).content == b"one"


def create_signed_urls() -> None:
    there, missing = at.create_signed_urls(["a b/ü.txt", "nothing"], 60)
    assert httpx.get(str(there["signedUrl"])).content == b"one"
    assert missing["error"]


def get_public_url() -> None:
    assert httpx.get(at.get_public_url("a b/ü.txt")).content == b"one"


def upload_to_signed_url() -> None:
    signed = at.create_signed_upload_url("signed.txt")
    at.upload_to_signed_url(signed["path"], signed["token"], b"signed", {"content-type": "text/plain"})
    assert at.download("signed.txt") == b"signed"


def move() -> None:
    at.move("signed.txt", "moved/signed.txt")
    refused(lambda: at.move("nothing", "moved/nothing"), "404")


def copy() -> None:
    at.copy("form.txt", "copy.txt")
    assert at.exists("copy.txt")


def remove() -> None:
    assert [each["name"] for each in at.remove(["copy.txt", "nothing"])] == ["copy.txt"]


def transform() -> None:
    refused(lambda: at.create_signed_url("form.txt", 60, {"transform": {"width": 100}}), "501")


def empty_bucket() -> None:
    storage.empty_bucket(BUCKET)


def delete_bucket() -> None:
    storage.delete_bucket(BUCKET)
    refused(lambda: storage.delete_bucket(BUCKET), "404")


def sign_in_with_password() -> None:
    signed_in = supabase.auth.sign_in_with_password({"email": EMAIL, "password": PASSWORD})
    assert signed_in.user is not None
    assert signed_in.user.email == EMAIL
    wrong = create_client(URL, ANON).auth
    refused(lambda: wrong.sign_in_with_password({"email": EMAIL, "password": "wrong"}), "invalid_credentials")


def get_user() -> None:
    answer = supabase.auth.get_user()
    assert answer is not None
    assert answer.user.email == EMAIL


def refresh_session() -> None:
    before = supabase.auth.get_session()
    after = supabase.auth.refresh_session().session
    assert before is not None
    assert after is not None
    assert before.refresh_token != after.refresh_token


def sign_up() -> None:
    other = create_client(URL, ANON).auth
    refused(lambda: other.sign_up({"email": "a@example.com", "password": "secret"}), "not_implemented")


def rpc() -> None:
    saved = {"project_uuid": PROJECT, "p_file_path": "a.py", "p_content": "a"}
    assert supabase.rpc("upsert_project_file", saved).execute().data["version"] == 1
    supabase.rpc("upsert_project_file", {**saved, "p_file_path": "b.py"}).execute()
    listing = supabase.rpc("list_current_files", {"project_uuid": PROJECT}, count=CountMethod.exact)
    listed = (
        listing.select("file_path").like("file_path", "%.py").order("file_path", desc=True).limit(1).execute()
    )
    assert (listed.data, listed.count) == ([{"file_path": "b.py"}], 2)
    refused(lambda: supabase.rpc("nothing", {}).execute(), "PGRST202")


def select() -> None:
    table = supabase.table("project_files_current").select("file_path, version", count=CountMethod.exact)
    found = table.eq("project_id", PROJECT).in_("file_path", ["a.py", "c.py"]).execute()
    assert (found.data, found.count) == ([{"file_path": "a.py", "version": 1}], 1)


def insert() -> None:
    refused(lambda: supabase.table("projects").insert({"name": "x"}).execute(), "PGRST000")


def sign_out() -> None:
    supabase.auth.sign_out()
    assert supabase.auth.get_session() is None


METHODS = {
    "storage": [
        create_bucket, get_bucket, list_buckets, update_bucket, upload, update, download, info, exists, list_folder,
        list_v2, create_signed_url, create_signed_urls, get_public_url, upload_to_signed_url, move, copy, remove,
        transform, empty_bucket, delete_bucket,
    ],
    "auth": [sign_in_with_password, get_user, refresh_session, sign_up],
    "rest": [rpc, select, insert],
    "auth ": [sign_out],
}  # fmt: skip

for part, methods in METHODS.items():
    for method in methods:
        failure = None
        try:
            method()
        except Exception:
            failure = traceback.format_exc()
        sys.stdout.write(
            json.dumps({"method": f"{part.strip()} {method.__name__}", "failure": failure}) + "\n"
        )
