"""Settings from the environment, read once. The unit is in the name, the reason beside the number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """What a machine is told (protocol: environment of the container), and every knob with its default."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # --- which project, and how to reach it
    project_id: UUID
    session_id: UUID
    snapshot_url: SecretStr | None = None
    """Signed URL of the first snapshot. Required unless a ledger can be resumed."""
    realtime_token: SecretStr | None = None
    """JWT of this session; required to go live."""
    realtime_token_file: Path | None = None
    """For platforms that rotate a file instead of an environment variable; re-read on change."""
    realtime_url: str | None = None
    realtime_api_key: SecretStr | None = None
    session_api_url: str | None = None

    # --- where things are
    project_dir: Path = Path("/app/project")
    state_dir: Path = Path("/var/lib/preview-agent")
    staging_dir: Path | None = None
    """Same file system as `project_dir`, outside the watched tree; default `.preview-sync` beside it."""

    # --- the dev server
    dev_command: Annotated[tuple[str, ...] | None, NoDecode] = None
    install_command: Annotated[tuple[str, ...] | None, NoDecode] = None
    dev_port: int = Field(5173, ge=1, le=65535)
    dev_user: str | None = None
    dev_essential: bool = False
    """True: a dev server that failed for good ends the agent with exit 75."""

    # --- being watched
    health_host: str = "::"
    health_port: int = Field(9464, ge=0, le=65535)
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["json", "console", "auto"] = "auto"

    # --- being stopped
    stop_grace: float = Field(4.0, gt=0)
    """Seconds. Below Fly's default kill timeout of 5 s, so that the drain ends before the machine does."""

    @property
    def staging(self) -> Path:
        return self.staging_dir or self.project_dir.parent / ".preview-sync"
