"""Defines the two NATS accounts and signs the tokens for them; servers check these without asking us.

**PREVIEW** has the stream, and only the relay is in it. **EDGE** has the machines, has no JetStream, and imports what
the stream publishes again, `pv.out.*`. They are two because a server does not check where an answer goes: who may ask a
stream anything, in the stream's own account, may have the answer sent to any subject, and so write into another
project's. A machine may publish nothing at all and hear its own project's subject, for as long as its token says.

The operator signs the accounts once, at `preview-orchestrator nats-keys`; the orchestrator has the accounts' signing
keys alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from uuid import UUID

from orchestrator_stub.relay.keys import Key

STREAM: Final = "PREVIEW"

IN: Final = "pv.in."
"""With a project's id behind it: where the relay publishes its events."""

OUT: Final = "pv.out."
"""The same, once the stream has them: what machines hear."""

HUB: Final = "hub"
"""The JetStream domain that has the stream; each other region's has a mirror of it."""

MIRROR_INBOX: Final = "_INBOX.mirror"
"""Where a region's answers go to."""

SUBSCRIPTIONS: Final = 3
"""Of one connection of a machine: it needs one."""

_UNLIMITED: Final = {
    "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1
}  # fmt: skip

_JETSTREAM: Final = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}


@dataclass(frozen=True, slots=True)
class Account:
    """An account's public key, and a key that signs its users."""

    public: str
    signing: Key

    def user(
        self, name: str, permissions: dict[str, Any], expires_at: float | None = None, key: Key | None = None
    ) -> str:
        """A token of a new user of this account.

        Args:
            name: Of the user, in the servers' logs.
            permissions: What it may do.
            expires_at: Unix seconds; None: it does not.
            key: Who shows it must have this key too. None: whoever has the token is the user.
        """
        claims = {
            "sub": (key or Key("user")).public,
            "name": name,
            "iat": int(time.time()),
            "nats": {
                "type": "user", "version": 2, "issuer_account": self.public, "bearer_token": key is None,
                "data": -1, "payload": -1, "subs": -1, **permissions,
            },
        }  # fmt: skip
        return self.signing.sign(claims if expires_at is None else {**claims, "exp": int(expires_at)})


@dataclass(frozen=True, slots=True)
class NatsKeys:
    """What the orchestrator signs with."""

    preview: Account
    edge: Account

    def machine_token(self, project_id: UUID, session_id: UUID, expires_at: float) -> str:
        """What a session's machine connects with: it hears its project and says nothing."""
        return self.edge.user(
            f"session:{session_id}",
            {
                "pub": {"deny": [">"]},
                "sub": {"allow": [f"{OUT}{project_id}", f"_INBOX.{session_id}.>"]},
                "subs": SUBSCRIPTIONS,
            },
            expires_at,
        )

    def relay_token(self, inbox: str, expires_at: float) -> str:
        """What the relay connects with: it publishes events, and makes the stream; `inbox` has its answers."""
        api = [f"$JS.API.STREAM.{verb}.{STREAM}" for verb in ("INFO", "CREATE", "UPDATE")]
        return self.preview.user(
            "relay", {"pub": {"allow": [f"{IN}*", *api]}, "sub": {"allow": [f"{inbox}.>"]}}, expires_at
        )

    def mirror_token(self, region: str, inbox: str, expires_at: float) -> str:
        """What makes the mirror in a region, and asks how far it is; `inbox` has its answers."""
        api = [f"$JS.{region}.API.STREAM.{verb}.{STREAM}" for verb in ("INFO", "CREATE", "UPDATE")]
        return self.preview.user(
            "mirror", {"pub": {"allow": api}, "sub": {"allow": [f"{inbox}.>"]}}, expires_at
        )

    def region_credentials(self, region: str) -> str:
        """What a region's servers show the hub: a credentials file, of which the key is a secret.

        They may follow the stream, have the mirror made, and nothing else: no event can be published from there.
        """
        key, create = Key("user"), f"$JS.{HUB}.API.CONSUMER.CREATE.{STREAM}"
        may = {
            # A mirror asks the stream for a consumer, and says how far it has read.
            "pub": {"allow": [create, f"{create}.>", "$JS.FC.>", f"{MIRROR_INBOX}.>"]},
            # What asks for the mirror, what answers the mirror, and what it is sent.
            "sub": {"allow": [f"$JS.{region}.API.>", "$JSC.R.>", "$JS.M.>"]},
        }
        token = self.preview.user(f"region:{region}", may, key=key)
        return (
            f"-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{key.seed}\n------END USER NKEY SEED------\n"
        )

    def listener_token(self, project_id: UUID, expires_at: float) -> str:
        """What an operator's `tail` connects with: as a machine of that project."""
        return self.machine_token(project_id, UUID(int=0), expires_at)

    @classmethod
    def read(cls, file: Path) -> Self:
        """The keys that `Operator.write` wrote. Raises `OSError`, and `ValueError` without a word of a key."""
        try:
            form = json.loads(file.read_text())
            accounts = [
                Account(form[name]["account"], Key.from_seed(form[name]["signing_seed"]))
                for name in ("preview", "edge")
            ]
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError("it is no file of `preview-orchestrator nats-keys`") from None
        return cls(*accounts)


@dataclass(frozen=True, slots=True)
class MachineNats:
    """How machines reach NATS, and which of them do."""

    keys: NatsKeys
    url: str
    transport: str
    """Of projects whose run settings do not say."""

    def environment(
        self, project_id: UUID, session_id: UUID, wanted: object, expires_at: float
    ) -> dict[str, str]:
        """What a new machine is told beside the rest; `wanted`: the run setting `transport`."""
        if (wanted or self.transport) != "nats":
            return {}
        token = self.keys.machine_token(project_id, session_id, expires_at)
        return {"REALTIME_URL": self.url, "NATS_JWT": token}


class Operator:
    """Who signs the accounts; a deployment has one, and needs it again only to change them."""

    def __init__(self) -> None:
        self._operator = Key("operator")
        self._system, self._preview, self._edge = (Key("account") for _ in range(3))
        self.keys = NatsKeys(
            Account(self._preview.public, Key("account")), Account(self._edge.public, Key("account"))
        )

    def accounts_conf(self) -> str:
        """The part of a server's configuration that says who is trusted; no secret is in it."""
        listen = {"name": "events", "subject": f"{OUT}*", "type": "stream"}
        signed = [
            (self._system, self._account(self._system, "SYS")),
            (
                self._preview,
                self._account(
                    self._preview,
                    STREAM,
                    signing=self.keys.preview.signing,
                    exports=[listen],
                    limits=_JETSTREAM,
                ),
            ),
            (
                self._edge,
                self._account(
                    self._edge,
                    "EDGE",
                    signing=self.keys.edge.signing,
                    imports=[{**listen, "account": self._preview.public}],
                ),
            ),
        ]
        preload = "".join(f"  {key.public}: {token}\n" for key, token in signed)
        operator = self._operator.sign(
            {
                "sub": self._operator.public, "name": "preview-sync", "iat": int(time.time()),
                "nats": {"type": "operator", "version": 2, "system_account": self._system.public},
            }
        )  # fmt: skip
        return (
            f"operator: {operator}\nsystem_account: {self._system.public}\n"
            f"resolver: MEMORY\nresolver_preload: {{\n{preload}}}\n"
        )

    def _account(
        self,
        account: Key,
        name: str,
        *,
        signing: Key | None = None,
        exports: Sequence[dict[str, str]] = (),
        imports: Sequence[dict[str, str]] = (),
        limits: dict[str, int] | None = None,
    ) -> str:
        return self._operator.sign(
            {
                "sub": account.public, "name": name, "iat": int(time.time()),
                "nats": {
                    "type": "account", "version": 2, "limits": {**_UNLIMITED, **(limits or {})},
                    "signing_keys": [signing.public] if signing else [],
                    "exports": list(exports), "imports": list(imports),
                    # Of a user whose token names none: nothing.
                    "default_permissions": {"pub": {"deny": [">"]}, "sub": {"deny": [">"]}},
                },
            }
        )  # fmt: skip

    def write(self, directory: Path) -> list[Path]:
        """Write accounts.conf for the servers, nats-keys.json for the orchestrator and operator.json for the safe.

        Raises `OSError`, `FileExistsError` where one of them is there: machines trust the keys of before.
        """
        names = {
            "nats-keys.json": self._form(),
            "operator.json": self._seeds(),
            "accounts.conf": self.accounts_conf(),
        }
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in names.items():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(directory / name, flags, 0o600), "w") as file:
                file.write(text)
        return [directory / name for name in names]

    def _form(self) -> str:
        each = {"preview": self.keys.preview, "edge": self.keys.edge}
        form = {n: {"account": a.public, "signing_seed": a.signing.seed} for n, a in each.items()}
        return json.dumps(form, indent=2) + "\n"

    def _seeds(self) -> str:
        keys = {
            "operator": self._operator,
            "system": self._system,
            "preview": self._preview,
            "edge": self._edge,
        }
        return json.dumps({name: key.seed for name, key in keys.items()}, indent=2) + "\n"
