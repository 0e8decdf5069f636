"""Makes the door's own pages (waiting, blocked cookies, refused), each one self-contained HTML."""

from __future__ import annotations

import html
import json
import secrets
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final
from urllib.parse import urlencode

from orchestrator_stub.door.decision import ENTER, EVENTS, WAKE

LONGEST_LINE: Final = 400
"""Characters of a failing line that are shown."""

STEPS: Final[Mapping[str, str]] = {
    "requested": "Looking for a machine",
    "provisioning": "Starting a machine",
    "suspended": "Waking up",
    "starting": "Starting",
    "hydrating": "Fetching the files",
    "installing": "Installing packages",
    "serving": "Starting the dev server",
    "degraded": "Starting the dev server",
    "halted": "Stopped",
    "draining": "Ended",
    "gone": "Ended",
    "failed": "Ended",
}
"""What a person is told, by the state of the session while it has no agent, else by the agent's."""


@cache
def _template(name: str) -> str:
    return files("orchestrator_stub.door").joinpath(name).read_text()


def _page(name: str, **filled: str) -> tuple[bytes, bytes]:
    nonce = secrets.token_urlsafe(12)
    text = _template("frame.html").replace("{{body}}", _template(name))
    for key, value in {**filled, "nonce": nonce}.items():
        text = text.replace("{{" + key + "}}", value)
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self';"
        " base-uri 'none'; form-action 'self'"
    )
    return text.encode(), policy.encode()


def waiting() -> tuple[bytes, bytes]:
    """The page of a session that is not ready, and its content security policy."""
    return _page("waiting.html", title="Starting your preview", events=EVENTS, wake=WAKE)


def blocked(code: str | None, to: str) -> tuple[bytes, bytes]:
    """The page for a browser that kept no cookie; `code` leads in for as long as it is good."""
    again = f"{ENTER}?{urlencode({'code': code or '', 'to': to})}"
    return _page("blocked.html", title="Cookies are blocked", again=html.escape(again))


def refused(why: str) -> tuple[bytes, bytes]:
    """The page for somebody who is not let in."""
    return _page("refused.html", title="Not open", why=html.escape(why))


def told(progress: Mapping[str, Any] | None, *, ready: bool) -> str:
    """How far a start is, as the waiting page reads it: `{"ready", "step", "failing"}`.

    What an agent says is its word and the project's: texts are taken from it, cut, and nothing else.
    """
    if ready or progress is None:
        return json.dumps({"ready": ready, "step": "" if ready else STEPS["draining"], "failing": None})
    agent = progress["agent"] if progress["session"] in ("provisioning", "ready") else None
    step = STEPS.get(agent if isinstance(agent, str) else progress["session"], STEPS["starting"])
    return json.dumps({"ready": False, "step": step, "failing": failing(progress)})


def failing(progress: Mapping[str, Any]) -> str | None:
    """The line that says why it does not start; None: nothing failed."""
    problem = progress["problem"]
    if isinstance(problem, str) and problem:
        return problem[:LONGEST_LINE]
    problems = progress["problems"]
    for each in problems if isinstance(problems, list) else ():
        kind = each.get("kind") if isinstance(each, dict) else None
        if kind in FAILURES:
            lines = [line.strip() for line in str(each.get("detail") or "").splitlines() if line.strip()]
            telling = next((line for line in lines if "error" in line.lower()), lines[0] if lines else kind)
            return telling[:LONGEST_LINE]
    return None


FAILURES: Final = frozenset(
    {
        "install_failed", "dev_server_failed", "dev_server_backoff", "nothing_to_serve", "port_taken", "lock_unusable",
        "run_settings_unavailable", "snapshot_rejected", "snapshot_unavailable", "mass_delete", "disk_full",
        "read_only", "permission_denied",
    }
)  # fmt: skip
"""Problems of an agent that keep a preview from being served."""
