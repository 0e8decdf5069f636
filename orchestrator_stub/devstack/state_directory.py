"""Keeps what one `dev` leaves for the next, and tells other programs where it runs.

STATE/postgres        the embedded database          STATE/machines/{session}   the agent's machine
STATE/storage         Supabase Storage's objects     STATE/editor.json          what of DIR was sent
STATE/keys.json       the JWT keys, owner only       STATE/session.json         the session to take up again
STATE/run-settings.key   encrypts variables, owner only
STATE/dev.lock        one `dev` at a time            STATE/dev.json             where everything is
"""

from __future__ import annotations

import fcntl
import json
import os
from base64 import b64encode
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Self
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from orchestrator_stub.config import Settings
from orchestrator_stub.devstack.terminal import CannotStart, DevInfo
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.platform.sealing import KEY_BYTES, SealingKeys
from orchestrator_stub.platform.tokens import Keyring, local_keyring

HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Names the session that `dev` asks for: the same key and a higher generation replace its machine."""

    key: str
    generation: int

    @classmethod
    def fresh(cls) -> SessionKey:
        return cls(f"dev-{uuid4()}", 1)


def running_dev(state: Path) -> dict[str, Any]:
    """What `dev.json` says of the `dev` that runs with this state directory.

    Raises `OSError` or `ValueError` when there is none: a file that a killed one left is told by its lock.
    """
    with suppress(FileNotFoundError), (state / "dev.lock").open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            pass  # a dev holds it
        else:
            raise ValueError("no dev runs there any more")
    info = json.loads((state / "dev.json").read_text())
    if not isinstance(info, dict):
        raise ValueError("it is no JSON object")
    return info


class StateDirectory:
    """One state directory. `given` is its path as the person wrote it, for messages."""

    def __init__(self, given: Path) -> None:
        self._given = given
        self.path = given.absolute()

    def lock(self) -> AbstractContextManager[object]:
        """Hold the directory until the context ends.

        Raises `CannotStart` when another `dev` holds it, or it cannot be used.
        """
        held = ExitStack()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "dev.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise CannotStart(f"cannot use the state directory {self.path}: {error.strerror}") from None
        held.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            held.close()
            raise CannotStart(
                f"another dev (process {owner}) uses {self._given}; stop it, or give another --state"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return held

    def keyring(self) -> Keyring:
        """The keys of this directory, made at the first start. Raises `CannotStart`."""
        file = self.path / "keys.json"
        try:
            keys = local_keyring(file)
        except (OSError, ValueError) as error:
            raise CannotStart(f"cannot use {file}: {error}; remove it") from None
        if keys.problems()["cannot_sign"]:
            raise CannotStart(f"cannot use {file}: none of its keys is private; remove it")
        return keys

    def run_settings_keys(self) -> str:
        """The key of this directory's run settings, made at the first start. Raises `CannotStart`."""
        return self._own_key("run-settings.key")

    def door_keys(self) -> str:
        """The key of this directory's door, made at the first start. Raises `CannotStart`."""
        return self._own_key("door.key")

    def _own_key(self, name: str) -> str:
        file = self.path / name
        try:
            with (
                suppress(FileExistsError),
                os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new,
            ):
                new.write(f"local:{b64encode(os.urandom(KEY_BYTES)).decode()}")
            keys = file.read_text()
            SealingKeys.read(keys)
        except (OSError, ValueError) as error:
            raise CannotStart(f"cannot use {file}: {error}; remove it") from None
        return keys

    def next_session(self, project_id: UUID) -> SessionKey:
        """The session of the last start, one generation later; a fresh one when there is none of this project."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads((self.path / "session.json").read_text())
            if kept["project_id"] == str(project_id):
                return SessionKey(str(kept["key"]), int(kept["generation"]) + 1)
        return SessionKey.fresh()

    def keep_session(self, project_id: UUID, session: SessionKey) -> None:
        """Write the session down for the next start."""
        form = {"key": session.key, "generation": session.generation, "project_id": str(project_id)}
        (self.path / "session.json").write_text(json.dumps(form))

    @property
    def nats_keys(self) -> Path:
        """Of the NATS server that runs, where one does."""
        return self.path / "nats" / "keys" / "nats-keys.json"

    def settings(
        self,
        port: int,
        door_port: int,
        dsn: str,
        keys: ProjectKeys,
        *,
        ttl: float,
        nats_url: str | None = None,
    ) -> Settings:
        """What the control plane of this directory is told; `ttl`: seconds that a session lives at most."""
        nats = {"nats_url": nats_url, "nats_keys_file": self.nats_keys, "agent_transport": "nats"}
        return Settings.of(
            {
                **(nats if nats_url else {}),
                "database_url": dsn,
                "supabase_url": f"http://{HOST}:{port}",
                "supabase_anon_key": keys.anon_key,
                "supabase_service_role_key": keys.service_key,
                "host": HOST,
                "port": port,
                "session_ttl_max": ttl,
                "cors_origins": "*",
                "template_dir": None,
                "machines_dir": self.path / "machines",
                "run_settings_keys": self.run_settings_keys(),
                "preview_domain": f"localhost:{door_port}",
                "door_keys": self.door_keys(),
                "door_port": door_port,
            }
        )

    def publish(self, info: DevInfo) -> None:
        """Replace dev.json as a whole. Only its owner can read it: it holds the service key."""
        draft = self.path / "dev.json.new"
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(info), file, indent=2)
        draft.rename(self.path / "dev.json")

    def withdraw(self) -> None:
        """Remove dev.json: nothing runs any more."""
        (self.path / "dev.json").unlink(missing_ok=True)


class Publication:
    """dev.json of a `dev` that runs: true while the context lasts, gone afterwards."""

    def __init__(self, state: StateDirectory, info: DevInfo) -> None:
        self._state = state
        self._info = info

    def __enter__(self) -> Self:
        self._state.publish(self._info)
        return self

    def __exit__(self, *_: object) -> None:
        self._state.withdraw()

    def agent_is(self, pid: int) -> bool:
        """Note the agent's process; True when it is another than before, which dev.json says now."""
        if pid == self._info.agent_pid:
            return False
        self._info = replace(self._info, agent_pid=pid)
        self._state.publish(self._info)
        return True


def identities(directory: Path) -> tuple[UUID, UUID]:
    """The local user and the project, the same at every start for the same directory."""
    return (
        uuid5(NAMESPACE_URL, "preview-sync:local-user"),
        uuid5(NAMESPACE_URL, directory.resolve().as_uri()),
    )
