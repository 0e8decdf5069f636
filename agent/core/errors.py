"""Everything the agent raises on purpose.

    AgentError
    ├── SettingsError            the environment is wrong; every problem at once            exit 64
    ├── HydrationImpossible      the retry budget is spent                                  exit 69
    ├── CredentialRejected       token or snapshot URL refused for good                     exit 70
    ├── SessionGone              the orchestrator does not know this session any more         exit 70
    ├── Superseded               a newer machine of this session has taken over              exit 70
    ├── RootUnusable             the project directory cannot be written                    exit 71
    ├── DevServerFailed          failed for good and DEV_ESSENTIAL=true                     exit 75
    ├── PathRefused              a path that is never followed and never written
    ├── MalformedMessage         an event, manifest or answer that cannot be read
    ├── SnapshotRejected         an archive refused whole, with the rule it broke
    └── Unavailable              a peer did not answer, or asked us to wait                 (transient)
        └── TooLarge             413 or 422: it takes no request like this one: the same again cannot help, less can

A per-path failure is data (`core.model.Problem`), not an exception: the rest goes on.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import ClassVar


class AgentError(Exception):
    """Root of the hierarchy. `exit_code` is what the process ends with when nobody handles it."""

    exit_code: ClassVar[int] = 1


class SettingsError(AgentError):
    """The environment is missing or malformed. `problems` has one sentence per variable."""

    exit_code = 64

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class HydrationImpossible(AgentError):
    """The tree could not be made whole within the retry budget."""

    exit_code = 69


class CredentialRejected(AgentError):
    """A credential was refused for good; asking again with it cannot help."""

    exit_code = 70


class SessionGone(AgentError):
    """The orchestrator ended this session (404 or 410): no later answer for it will differ."""

    exit_code = 70


class Superseded(AgentError):
    """The orchestrator answered 409: another generation of this session's machine is the live one."""

    exit_code = 70


class RootUnusable(AgentError):
    """The project, staging or state directory cannot be used at all (permissions, disk full at start)."""

    exit_code = 71


class DevServerFailed(AgentError):
    """The dev server failed for good and the settings call it essential."""

    exit_code = 75


class PathRefused(AgentError):
    """A path that is never followed and never written.

    `rule` is one word for metrics and problems; `shown` is the path, safe to print.
    """

    def __init__(self, raw: object, rule: str) -> None:
        self.rule = rule
        self.shown = (repr(raw) if isinstance(raw, str) else reprlib.repr(raw))[:200]
        super().__init__(f"cannot use path {self.shown}: {rule}")


class MalformedMessage(AgentError):
    """An event, a manifest or an answer that does not have the protocol's form."""

    def __init__(self, what: str, reason: str) -> None:
        self.what = what
        self.reason = reason
        super().__init__(f"cannot read {what}: {reason}")


class SnapshotRejected(AgentError):
    """An archive refused as a whole: nothing of it reaches the project. `rule` names what it broke."""

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = rule
        self.detail = detail
        super().__init__(f"snapshot refused ({rule}): {detail}")


class Unavailable(AgentError):
    """A peer did not answer, or asked us to wait.

    `retry_after` is the least number of seconds to wait, when the peer said so.
    """

    def __init__(self, what: str, reason: str, retry_after: float | None = None) -> None:
        self.what = what
        self.reason = reason
        self.retry_after = retry_after
        super().__init__(f"{what} is unavailable: {reason}")


class TooLarge(Unavailable):
    """413 or 422: the peer, or something in front of it, takes no request like ours. Less can be asked."""
