"""Takes secrets out of the orchestrator's logs: its keys, and whatever it signs for others.

Known secrets go by value; tokens, signed URLs and secret keys by their shape, since new ones are made all the time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr
from structlog.typing import EventDict, WrappedLogger

from orchestrator_stub.config import Settings

REDACTED = "[redacted]"
SHORTEST = 8
"""Characters. Taking out less than that would take out words."""

_SHAPES = (
    (re.compile(r"eyJ[A-Za-z0-9_-]+\.eyJ[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"), REDACTED),
    (
        re.compile(r"(?i)([?&](?:token|apikey|sig|signature|x-(?:amz|goog)-[a-z-]+)=)[^&\s\"']+"),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"sb_secret_[A-Za-z0-9_-]+"), REDACTED),
    (re.compile(r"(?i)\b((?:postgres(?:ql)?|rediss?)://[^:/@\s]*:)[^@/\s]+(?=@)"), rf"\1{REDACTED}"),
)


def secrets_of(settings: Settings) -> list[str]:
    """Every secret of the settings, and the password inside the database's address."""
    values = (getattr(settings, name) for name in type(settings).model_fields)
    secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
    password = conninfo_to_dict(settings.database_url.get_secret_value()).get("password")
    return [*secrets, str(password)] if password else secrets


class Redactor:
    """A structlog processor: no string leaves with a secret in it, however deep, whatever its key."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets = sorted({each for each in secrets if len(each) >= SHORTEST}, key=len, reverse=True)

    def text(self, value: str) -> str:
        """`value` without secrets."""
        for secret in self._secrets:
            value = value.replace(secret, REDACTED)
        for shape, instead in _SHAPES:
            value = shape.sub(instead, value)
        return value

    def value(self, value: object) -> object:
        """Any JSON-like value without secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.value(key): self.value(each) for key, each in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.value(each) for each in value]
        if value is None or isinstance(value, (int, float, bool)):
            return value
        return self.text(str(value))

    def __call__(self, logger: WrappedLogger, method: str, event_dict: EventDict) -> EventDict:
        return {key: self.value(each) for key, each in event_dict.items()}
