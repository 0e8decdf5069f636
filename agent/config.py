"""Settings from the environment, read once. The unit is in the name, the reason beside the number.

`agent.environment` reads them, so that every problem is told at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from uuid import UUID

from msgspec import Meta, Struct


class Secret:
    """Text that shows nowhere but where it is asked for by name."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


class SnapshotLimits(Struct, frozen=True, kw_only=True):
    """What a snapshot may cost us before it is refused. Each bound's rule is named in the refusal."""

    snapshot_max_compressed_bytes: Annotated[int, Meta(gt=0)] = 512 * 2**20
    """Of the archive as it travels. Ten times the largest project measured (200 MB unpacks from about 50)."""
    snapshot_max_bytes: Annotated[int, Meta(gt=0)] = 2**30
    """Of all files together. A preview's disk is a few GB, and node_modules has to fit beside the project."""
    snapshot_max_file_bytes: Annotated[int, Meta(gt=0)] = 100 * 2**20
    """Of one file. Twice what Supabase Storage takes by default (50 MB), so no asset that exists is refused."""
    snapshot_max_entries: Annotated[int, Meta(gt=0)] = 50_000
    """Files and directories. Large projects have a few thousand; each costs an inode and about 400 bytes here."""
    snapshot_max_ratio: Annotated[int, Meta(gt=0)] = 200
    """Unpacked to packed size of one file that no manifest names with its size. Source text reaches 10, deflate itself
    1032, bombs live near that, and so does a blank picture: what the database has been given is none."""
    snapshot_ratio_floor_bytes: Annotated[int, Meta(ge=0)] = 8 * 2**20
    """The ratio is not looked at below this size: a small file of blanks is no attack."""
    snapshot_max_manifest_bytes: Annotated[int, Meta(gt=0)] = 16 * 2**20
    """The manifest is the one entry held in memory whole; 50,000 files with long paths come to 12 MB."""
    snapshot_connect_seconds: Annotated[float, Meta(gt=0)] = 10.0
    """To reach the storage. Longer than three retries of a lost SYN (1 + 2 + 4 s)."""
    snapshot_stall_seconds: Annotated[float, Meta(gt=0)] = 20.0
    """Without a single byte arriving. Above the pause of a CDN that fetches the object first."""
    snapshot_total_seconds: Annotated[float, Meta(gt=0)] = 600.0
    """For one download. 50 MB at 1 Mbit/s takes 400 s; whoever is slower should see an error, not a spinner."""
    snapshot_attempts: Annotated[int, Meta(ge=1)] = 8
    """Downloads before hydration is called impossible: with the waits below about a minute of a peer being away."""
    snapshot_attempts_per_url: Annotated[int, Meta(ge=1)] = 3
    """Transient failures of one URL before a fresh one is asked for: perhaps it is the object that is ill."""
    snapshot_retry_seconds: Annotated[float, Meta(gt=0)] = 0.5
    """First bound of the full jitter between attempts; doubles each time."""
    snapshot_retry_max_seconds: Annotated[float, Meta(gt=0)] = 15.0
    """Last bound of it. `Retry-After` may ask for more."""


class Settings(SnapshotLimits, frozen=True, kw_only=True):
    """What a machine is told (protocol: environment of the container), and every knob with its default."""

    # --- which project, and how to reach it
    project_id: UUID
    """Whose files these are."""
    session_id: UUID
    """For whom they are shown; the token is this session's alone."""
    snapshot_url: Secret | None = None
    """Signed URL of the first snapshot. Required unless a ledger can be resumed."""
    realtime_token: Secret | None = None
    """JWT of this session; required to go live."""
    realtime_token_file: Path | None = None
    """For platforms that rotate a file instead of an environment variable; re-read on change."""
    realtime_url: str | None = None
    """Of the channel, `wss://<project>.supabase.co/realtime/v1`; required."""
    realtime_api_key: Secret | None = None
    """The publishable key, shown at the handshake; hosted Realtime wants it."""
    session_api_url: str | None = None
    """Where to catch up, renew the token and report. Unset: no catch-up but `snapshot:ready`, and status says so."""

    # --- where things are
    project_dir: Path = Path("/app/project")
    """The tree, and what the dev server serves."""
    state_dir: Path = Path("/var/lib/preview-agent")
    """The ledger. What survives a restart is resumed from; an empty one starts from the snapshot."""
    staging_dir: Path | None = None
    """Same file system as the tree, outside of it; default `.preview-sync` beside it."""

    # --- beside another flow
    sync_mode: Literal["live", "shadow"] = "live"
    """`shadow`: hydrate and follow into SHADOW_DIR, compare PROJECT_DIR with it, which another flow keeps, and never
    touch that; no dev server is started. The step before switching a project over."""
    shadow_dir: Path | None = None
    """The tree of `shadow`; default `.preview-shadow` beside PROJECT_DIR."""
    shadow_settle_seconds: Annotated[float, Meta(gt=0)] = 10.0
    """How long a difference must stand, with both sides at rest, before it is one. Five looks, and above the delay of
    a flow that polls every few seconds; set it above the slowest save of the flow that is compared with."""
    shadow_ignore: tuple[str, ...] = ("dist", "build", ".vite", ".cache", "*.log", "*.tsbuildinfo")
    """Names, with `*` and `?`, whose files are no difference when only the live directory has them: build output. What
    the database has is compared whatever its name. `node_modules` and `.git` are never looked at."""

    # --- the dev server
    dev_command: tuple[str, ...] | None = None
    """What serves the preview, in a shell's spelling and run without one. Default: what package.json says."""
    install_command: tuple[str, ...] | None = None
    """What installs dependencies. Default: the package manager whose lock file is there."""
    dev_host: str = "::"
    """Where the dev server listens: all of both families, as Fly's proxy and its private network need."""
    dev_port: Annotated[int, Meta(ge=1, le=65535)] = 5173
    """As Vite's default."""
    dev_user: str | None = None
    """Who runs the project's code when the agent is root. Unset: the agent's own user, and status says so."""
    dev_essential: bool = False
    """True: a dev server that failed for good ends the agent with exit 75."""
    dev_processes: Annotated[int, Meta(gt=0)] | None = None
    """RLIMIT_NPROC, threads included, of all that DEV_USER runs. Default 512 with a DEV_USER (Vite uses 20
    threads on two cores, npm 11), none without: there it would count the other programs of that user."""
    dev_files: Annotated[int, Meta(gt=0)] = 65536
    """RLIMIT_NOFILE of the project's programs. Bundlers open a file a module; Node itself asks for all it may."""
    dev_probe_seconds: Annotated[float, Meta(gt=0)] = 5.0
    """Between two questions to a ready dev server, and how long each may take: three missed are a hung server."""
    dev_stop_seconds: Annotated[float, Meta(gt=0)] = 2.5
    """Between TERM and KILL. Vite ends in 50 ms; the rest of STOP_GRACE belongs to the drain."""
    preview_host: str | None = None
    """Domain under which the preview is reached, for the dev server's list of allowed hosts."""
    install_scripts: bool = False
    """Whether dependencies may run their install scripts. Most need none, and each is somebody's program."""
    install_seconds: Annotated[float, Meta(gt=0)] = 300.0
    """For one install. A cold one of a large project takes one to two minutes."""
    modules_dir: Path | None = None
    """Staged installs and the cache of finished ones; on the file system of `project_dir`, so that they are
    moved and hard-linked, not copied. Default `.preview-modules` beside it. Agents may share one."""

    # --- following the project
    heartbeat_seconds: Annotated[float, Meta(ge=0.2)] = 30.0
    """Between two status reports when nothing changes, spread by a fifth. Long enough to cost nothing with 100,000
    sessions, short enough that the loss of the very last event heals before anybody reports it."""
    drift_policy: Literal["report", "restore", "keep"] = "report"
    """What happens to a file that something else in the container changed: shown, put back, or left in silence. The
    database's next word on that path wins in any case."""
    optimistic_events: bool = False
    """True: show a front end's events (no revision) at once and undo them unless confirmed within 5 s."""

    # --- being watched
    health_host: str = "::"
    """Where `/livez` `/readyz` `/status` `/metrics` listen: all of both families, as Fly's checks need."""
    health_port: Annotated[int, Meta(ge=0, le=65535)] = 9464
    """As OpenTelemetry's Prometheus exporter; 0 picks one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    log_format: Literal["json", "console", "auto"] = "auto"
    """`auto`: JSON unless on a terminal."""

    # --- being stopped
    stop_grace: Annotated[float, Meta(gt=0)] = 4.0
    """Seconds. Below Fly's default kill timeout of 5 s, so that the drain ends before the machine does."""

    @property
    def shadow(self) -> bool:
        """Whether another flow keeps PROJECT_DIR, and we look on."""
        return self.sync_mode == "shadow"

    @property
    def tree_dir(self) -> Path:
        """The directory that the agent keeps equal to the database."""
        if not self.shadow:
            return self.project_dir
        return self.shadow_dir or self.project_dir.parent / ".preview-shadow"

    @property
    def staging(self) -> Path:
        return self.staging_dir or self.tree_dir.parent / ".preview-sync"

    @property
    def ledger(self) -> Path:
        """What was written, by mode: after the switch nothing of the other flow's is taken for ours."""
        return self.state_dir / ("shadow.sqlite" if self.shadow else "ledger.sqlite")

    @property
    def modules(self) -> Path:
        return self.modules_dir or self.project_dir.parent / ".preview-modules"
