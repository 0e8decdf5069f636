"""Settings from the environment, read once. The unit is in the name, the reason beside the number."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class SnapshotLimits(BaseModel):
    """What a snapshot may cost us before it is refused. Each bound's rule is named in the refusal."""

    model_config = ConfigDict(frozen=True)

    snapshot_max_compressed_bytes: int = Field(default=512 * 2**20, gt=0)
    """Of the archive as it travels. Ten times the largest project measured (200 MB unpacks from about 50)."""
    snapshot_max_bytes: int = Field(default=2**30, gt=0)
    """Of all files together. A preview's disk is a few GB, and node_modules has to fit beside the project."""
    snapshot_max_file_bytes: int = Field(default=100 * 2**20, gt=0)
    """Of one file. Twice what Supabase Storage takes by default (50 MB), so no asset that exists is refused."""
    snapshot_max_entries: int = Field(default=50_000, gt=0)
    """Files and directories. Large projects have a few thousand; each costs an inode and about 400 bytes here."""
    snapshot_max_ratio: int = Field(default=200, gt=0)
    """Unpacked to packed size of one file. Source text reaches 10, deflate itself 1032, bombs live near that."""
    snapshot_ratio_floor_bytes: int = Field(default=8 * 2**20, ge=0)
    """The ratio is not looked at below this size: a small file of blanks is no attack."""
    snapshot_max_depth: int = Field(default=64, gt=0)
    """Segments of a path. Deeper than any project, far above what tools that recurse can bear."""
    snapshot_max_manifest_bytes: int = Field(default=16 * 2**20, gt=0)
    """The manifest is the one entry held in memory whole; 50,000 files with long paths come to 12 MB."""
    snapshot_connect_seconds: float = Field(default=10.0, gt=0)
    """To reach the storage. Longer than three retries of a lost SYN (1 + 2 + 4 s)."""
    snapshot_stall_seconds: float = Field(default=20.0, gt=0)
    """Without a single byte arriving. Above the pause of a CDN that fetches the object first."""
    snapshot_total_seconds: float = Field(default=600.0, gt=0)
    """For one download. 50 MB at 1 Mbit/s takes 400 s; whoever is slower should see an error, not a spinner."""
    snapshot_attempts: int = Field(default=8, ge=1)
    """Downloads before hydration is called impossible: with the waits below about a minute of a peer being away."""
    snapshot_attempts_per_url: int = Field(default=3, ge=1)
    """Transient failures of one URL before a fresh one is asked for: perhaps it is the object that is ill."""
    snapshot_retry_seconds: float = Field(default=0.5, gt=0)
    """First bound of the full jitter between attempts; doubles each time."""
    snapshot_retry_max_seconds: float = Field(default=15.0, gt=0)
    """Last bound of it. `Retry-After` may ask for more."""


class Settings(SnapshotLimits, BaseSettings):
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
    dev_host: str = "::"
    """Where the dev server listens: all of both families, as Fly's proxy and its private network need."""
    dev_port: int = Field(5173, ge=1, le=65535)
    dev_user: str | None = None
    """Who runs the project's code when the agent is root. Unset: the agent's own user, and status says so."""
    dev_essential: bool = False
    """True: a dev server that failed for good ends the agent with exit 75."""
    dev_processes: int | None = Field(None, gt=0)
    """RLIMIT_NPROC, threads included, of all that DEV_USER runs. Default 512 with a DEV_USER (Vite uses 20
    threads on two cores, npm 11), none without: there it would count the other programs of that user."""
    dev_files: int = Field(65536, gt=0)
    """RLIMIT_NOFILE of the project's programs. Bundlers open a file a module; Node itself asks for all it may."""
    dev_probe_seconds: float = Field(5.0, gt=0)
    """Between two questions to a ready dev server, and how long each may take: three missed are a hung server."""
    dev_stop_seconds: float = Field(2.5, gt=0)
    """Between TERM and KILL. Vite ends in 50 ms; the rest of STOP_GRACE belongs to the drain."""
    preview_host: str | None = None
    """Domain under which the preview is reached, for the dev server's list of allowed hosts."""
    install_scripts: bool = False
    """Whether dependencies may run their install scripts. Most need none, and each is somebody's program."""
    install_seconds: float = Field(300.0, gt=0)
    """For one install. A cold one of a large project takes one to two minutes."""
    modules_dir: Path | None = None
    """Staged installs and the cache of finished ones; on the file system of `project_dir`, so that they are
    moved and hard-linked, not copied. Default `.preview-modules` beside it. Agents may share one."""

    # --- following the project
    heartbeat_seconds: float = Field(30.0, ge=0.2)
    """Between two status reports when nothing changes, spread by a fifth. Long enough to cost nothing with 100,000
    sessions, short enough that the loss of the very last event heals before anybody reports it."""
    drift_policy: Literal["report", "restore", "keep"] = "report"
    """What happens to a file that something else in the container changed: shown, put back, or left in silence. The
    database's next word on that path wins in any case."""
    optimistic_events: bool = False
    """True: show a front end's events (no revision) at once and undo them unless confirmed within 5 s."""

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

    @property
    def modules(self) -> Path:
        return self.modules_dir or self.project_dir.parent / ".preview-modules"

    @field_validator("dev_command", "install_command", mode="before")
    @classmethod
    def _words(cls, value: object) -> object:
        """A command is written as in a shell, and run without one."""
        if not isinstance(value, str):
            return value
        return tuple(shlex.split(value)) or None
