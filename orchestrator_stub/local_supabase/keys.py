"""Makes the API keys of the local stack.

As with the Supabase CLI, the two API keys are themselves tokens of the project's secret, one with the role
`anon`, one with `service_role`, so that every endpoint reads an API key as it reads any other token.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator_stub.platform.tokens import Keyring

FAR_FUTURE = 4_102_444_800
"""2100-01-01, Unix seconds. Tokens must carry `exp`; a local API key need never be renewed."""


@dataclass(frozen=True, slots=True)
class ProjectKeys:
    """A keyring, and the two API keys the gateway knows."""

    keyring: Keyring = field(repr=False)
    anon_key: str = field(repr=False)
    service_key: str = field(repr=False)

    @classmethod
    def of(cls, keyring: Keyring) -> ProjectKeys:
        """The API keys that follow from `keyring`; the same HS256 secret always gives the same two."""
        common = {"iss": "preview-sync", "exp": FAR_FUTURE}
        return cls(
            keyring,
            keyring.sign({**common, "role": "anon"}),
            keyring.sign({**common, "role": "service_role"}),
        )
