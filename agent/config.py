"""Reads the agent's settings, once, from the environment. The unit is in the name, the reason beside the number.

A refusal names everything that is wrong at once, one line for each variable and never its value, which may be a secret
in the wrong place. An environment is also refused for what the agent must not hold: the project's code runs beside it,
so a key that opens every project has no place in the container, neither as a variable nor as the role of the token.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from agent.core.errors import MalformedMessage, SettingsError
from agent.tokens import read_token

SERVICE_KEYS = (
    "SUPABASE_SERVICE_ROLE_KEY",
    "SUPABASE_SERVICE_KEY",
    "SERVICE_ROLE_KEY",
    "SUPABASE_SECRET_KEY",
)
"""Names under which a service-role key is commonly handed out."""

PASSED_ON = "DEV_ENV_"
"""`DEV_ENV_NAME=value` in the agent's environment becomes `NAME=value` in the program's."""
LOADS_CODE = frozenset({"GCONV_PATH", "LOCPATH", "GLIBC_TUNABLES"})
LOADS_CODE_PREFIXES = ("LD_", "DYLD_")
"""What the dynamic linker and the C library of *every* program obey, that of a shell or of `id` too: glibc itself drops
these where a program has more rights than who starts it. What one language reads (NODE_OPTIONS, PYTHONPATH, BASH_ENV)
reaches the project's own programs alone, which run its code anyway."""


def loads_code(name: str) -> bool:
    """Return whether a variable of that name makes the dynamic linker or the C library load code."""
    return name in LOADS_CODE or name.startswith(LOADS_CODE_PREFIXES)


def _words(text: object) -> object:
    """Split `text` as a shell would; None for no word. The message of the `ValueError` has nothing of the text."""
    if not isinstance(text, str):
        return text
    try:
        return tuple(shlex.split(text)) or None
    except ValueError as error:
        closing = " (a quotation mark is not closed)" if "closing quotation" in str(error) else ""
        raise ValueError(f"must be words as in a shell{closing}") from None


def _url(*schemes: str) -> AfterValidator:
    """Make the validator that refuses what is no URL of these schemes, without showing it."""

    def checked(url: str | SecretStr) -> str | SecretStr:
        text = url if isinstance(url, str) else url.get_secret_value()
        try:
            parts = urlsplit(text)
            good = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"must be a URL with a host, beginning with {', '.join(schemes)}")
        return url

    return AfterValidator(checked)


_WEB_URL = _url("http", "https")
NATS_SCHEMES = ("nats", "tls")
_SOCKET_URL = _url("ws", "wss", "http", "https", *NATS_SCHEMES)
_SHELL_WORDS = BeforeValidator(_words)
_SHELL_WORDS_OR_NONE = BeforeValidator(lambda text: _words(text) or ())
Port = Annotated[int, Field(ge=1, le=65535)]


class SnapshotLimits(BaseModel):
    """What a snapshot may cost before it is refused. The refusal names the bound."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    snapshot_max_compressed_bytes: PositiveInt = 512 * 2**20
    """Of the archive as it travels. Ten times the largest project measured (200 MB unpacks from about 50)."""
    snapshot_max_bytes: PositiveInt = 2**30 + 2**25
    """Of all entries together: the files and the manifest. A preview's disk is a few GB, and node_modules has to fit
    beside the project."""
    snapshot_max_file_bytes: PositiveInt = 100 * 2**20
    """Of one file. Twice what Supabase Storage takes by default (50 MB), so no asset that exists is refused."""
    snapshot_max_entries: PositiveInt = 50_001
    """Files, and the manifest. Large projects have a few thousand; each costs an inode and about 400 bytes here. The
    orchestrator sets this and the others by what the database takes (`preview.settings`)."""
    snapshot_max_ratio: PositiveInt = 200
    """Unpacked to packed size of one file that no manifest names with its size. Source text reaches 10, deflate itself
    1032; bombs come near that, and so does a blank picture, which the manifest names."""
    snapshot_ratio_floor_bytes: NonNegativeInt = 8 * 2**20
    """The ratio is not checked below this size: a small file of blanks is no attack."""
    snapshot_max_manifest_bytes: PositiveInt = 32 * 2**20
    """The manifest is the one entry held in memory whole; 50,000 files with long paths come to 16 MB."""
    snapshot_connect_seconds: PositiveFloat = 10.0
    """To reach the storage. Longer than three retries of a lost SYN (1 + 2 + 4 s)."""
    snapshot_stall_seconds: PositiveFloat = 20.0
    """Without a single byte arriving. Above the pause of a CDN that fetches the object first."""
    snapshot_total_seconds: PositiveFloat = 600.0
    """For one download. 50 MB at 1 Mbit/s takes 400 s; a slower line should show an error, not a spinner."""
    snapshot_attempts: Annotated[int, Field(ge=1)] = 8
    """Downloads before hydration is called impossible: with the waits below about a minute of a peer being away."""
    snapshot_attempts_per_url: Annotated[int, Field(ge=1)] = 3
    """Transient failures of one URL before a fresh one is asked for: perhaps it is the object that is ill."""
    snapshot_retry_seconds: PositiveFloat = 0.5
    """First bound of the full jitter between attempts; doubles each time."""
    snapshot_retry_max_seconds: PositiveFloat = 15.0
    """Last bound of it. `Retry-After` may ask for more."""


class Settings(SnapshotLimits, BaseSettings):
    """What a machine is told (protocol: environment of the container), and every knob with its default.

    Made of its arguments alone, so that neither a test nor the build of an image depends on what else is in its
    environment; `read_environment` and `read_settings` are what reads one.
    """

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # --- which project, and how to reach it
    project_id: UUID
    """Whose files these are."""
    session_id: UUID
    """For whom they are shown; the token is this session's alone."""
    snapshot_url: Annotated[SecretStr, _WEB_URL] | None = None
    """Signed URL of the first snapshot. Required unless a ledger can be resumed."""
    realtime_token: SecretStr | None = None
    """JWT of this session; required to go live."""
    realtime_token_file: Path | None = None
    """For platforms that rotate a file instead of an environment variable; re-read on change."""
    realtime_url: Annotated[str, _SOCKET_URL] | None = None
    """Of the channel, `wss://<project>.supabase.co/realtime/v1`; required. `nats://` or `tls://`: events come over NATS
    ([transports.md](transports.md))."""
    nats_jwt: SecretStr | None = None
    """What NATS is shown; required where `REALTIME_URL` is of NATS. `REALTIME_TOKEN` stays the session API's."""
    realtime_api_key: SecretStr | None = None
    """The publishable key, shown at the handshake; hosted Realtime wants it."""
    session_api_url: Annotated[str, _WEB_URL] | None = None
    """Where to catch up, renew the token and report. Unset: no catch-up but `snapshot:ready`, and status says so."""

    run_revision: NonNegativeInt | None = None
    """Which run settings of the project the orchestrator had when it made the machine; 0: none. Unset: it knows of
    none. Above 0 they are asked for before anything is installed."""
    run_names: Annotated[tuple[str, ...], NoDecode, _SHELL_WORDS_OR_NONE] = ()
    """Which of DEV_ROOT, DEV_COMMAND, DEV_SERVER_PORT, INSTALL_COMMAND and PREVIEW_HOST come from run settings: those
    follow a change of them, also to nothing."""

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
    shadow_settle_seconds: PositiveFloat = 10.0
    """How long a difference must stand, with both sides at rest, before it is one. Five looks, and above the delay of
    a flow that polls every few seconds; set it above the slowest save of the flow that is compared with."""
    shadow_ignore: Annotated[tuple[str, ...], NoDecode, _SHELL_WORDS] = (
        "dist", "build", ".vite", ".cache", "*.log", "*.tsbuildinfo"
    )  # fmt: skip
    """Names, with `*` and `?`, whose files are no difference when only the live directory has them: build output. What
    the database has is compared whatever its name. `node_modules` and `.git` are never looked at."""

    # --- the dev server
    dev_command: Annotated[tuple[str, ...] | None, NoDecode, _SHELL_WORDS] = None
    """What serves the preview, in a shell's spelling and run without one. Default: what package.json says."""
    dev_root: Annotated[str | None, Field(max_length=1024)] = None
    """Directory of the project to preview, relative to it. Default: the top, or the one below with a dev server."""
    dev_server_port: Port | None = None
    """Where the project's command listens when that is not DEV_PORT, where visitors come: they are passed on."""
    install_command: Annotated[tuple[str, ...] | None, NoDecode, _SHELL_WORDS] = None
    """What installs dependencies. Default: the package manager whose lock file is there."""
    dev_host: str = "::"
    """Where the dev server listens: all of both families, as Fly's proxy and its private network need."""
    dev_port: Port = 5173
    """As Vite's default."""
    dev_user: str | None = None
    """Who runs the project's code when the agent is root. Unset: the agent's own user, and status says so."""
    dev_essential: bool = False
    """True: a dev server that failed for good ends the agent with exit 75."""
    dev_processes: PositiveInt | None = None
    """RLIMIT_NPROC, threads included, of all that DEV_USER runs. Default 512 with a DEV_USER (Vite uses 20
    threads on two cores, npm 11), none without: there it would count the other programs of that user."""
    dev_files: PositiveInt = 65536
    """RLIMIT_NOFILE of the project's programs. Bundlers open a file a module; Node itself asks for all it may."""
    dev_probe_seconds: PositiveFloat = 5.0
    """Between two questions to a ready dev server, and how long each may take: three missed are a hung server."""
    dev_stop_seconds: PositiveFloat = 2.5
    """Between TERM and KILL. Vite ends in 50 ms; the rest of STOP_GRACE belongs to the drain."""
    preview_host: str | None = None
    """Domains under which the preview is reached, with spaces between, for the dev server's list of allowed hosts."""
    install_scripts: bool = False
    """Whether dependencies may run their install scripts. Most need none, and each is somebody's program."""
    install_seconds: PositiveFloat = 300.0
    """For one install. A cold one of a large project takes one to two minutes."""
    modules_dir: Path | None = None
    """Staged installs and the cache of finished ones; on the file system of `project_dir`, so that they are
    moved and hard-linked, not copied. Default `.preview-modules` beside it. Agents may share one, where
    their projects may trust each other."""
    modules_key: str | None = None
    """Names the layer of MODULES_PARTS, an archive of the node_modules that the project had last."""
    modules_parts: SecretStr | None = None
    """Its parts, as JSON: `[{"url", "sha256", "size"}]`. It is fetched beside the first snapshot."""
    modules_wait_seconds: PositiveFloat = 10.0
    """How long an install waits for a layer before it runs beside it. One of 250 MB is unpacked in 2 s, and in 8 while
    a disk is busy."""

    # --- following the project
    heartbeat_seconds: Annotated[float, Field(ge=0.2)] = 30.0
    """Between two status reports when nothing changes, spread by a fifth. Long enough to cost nothing with 100,000
    sessions, short enough that the loss of the very last event heals before anybody reports it."""
    drift_policy: Literal["report", "restore", "keep"] = "report"
    """What happens to a file that something else in the container changed: reported, restored, or kept in silence. The
    database's next word on that path wins in any case."""
    optimistic_events: bool = False
    """True: show a front end's events (no revision) at once and undo them unless confirmed within 5 s."""

    # --- being watched
    health_host: str = "::"
    """Where `/livez` `/readyz` `/status` `/metrics` listen: all of both families, as Fly's checks need."""
    health_port: Annotated[int, Field(ge=0, le=65535, validate_default=True)] = 9464
    """As OpenTelemetry's Prometheus exporter; 0 picks one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    log_format: Literal["json", "console", "auto"] = "auto"
    """`auto`: JSON unless on a terminal."""

    # --- being stopped
    stop_grace: PositiveFloat = 4.0
    """Seconds. Below Fly's default kill timeout of 5 s, so that the drain ends before the machine does."""

    @property
    def shadow(self) -> bool:
        """Whether another flow keeps PROJECT_DIR, and the agent only compares."""
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

    @field_validator("health_port")
    @classmethod
    def _not_the_dev_servers(cls, port: int, info: ValidationInfo) -> int:
        if port == info.data.get("dev_port"):
            raise ValueError("is DEV_PORT too; give each a port of its own")
        return port

    @classmethod
    def settings_customise_sources(cls, *_: Any, **sources: Any) -> tuple[PydanticBaseSettingsSource, ...]:
        return (sources["init_settings"],)


def read_environment(environ: Mapping[str, str]) -> Settings:
    """Read the settings of an agent that runs: complete, and without what it must not hold.

    Raises `SettingsError` with one sentence per problem; values are never shown.
    """
    given = {name.upper(): value for name, value in environ.items() if value != ""}
    problems = [*_forbidden(given), *_missing(given), *_token(given), *_loaded_code(environ)]
    try:
        settings = read_settings(environ)
        problems += _apart(settings) if settings.shadow else []
    except SettingsError as error:
        problems += error.problems
    if problems:
        raise SettingsError(sorted(problems))
    return settings


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the settings alone, whatever else `run` may need. Raises `SettingsError` with one sentence per problem."""
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in environ.items() if value != ""}
    try:
        return Settings(**source())
    except ValidationError as error:
        refused = error.errors(include_url=False, include_input=False)
    raise SettingsError(sorted({_sentence(each) for each in refused}))


def _sentence(refused: Mapping[str, Any]) -> str:
    """Say what is wrong with one variable, from its name, its type and its bounds alone."""
    name = str(refused["loc"][0])
    if refused["type"] == "missing":
        said = "is required and not set"
    elif refused["type"] == "value_error":  # of a validator above
        said = str(refused["ctx"]["error"])
    else:
        said = f"must be {_wanted(Settings.model_fields[name])}"
    return f"{name.upper()}: {said}"


def _wanted(field: FieldInfo) -> str:
    """Say in words what a setting takes."""
    kind: Any = field.annotation
    bounds = list(field.metadata)
    if get_origin(kind) in (Union, UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        bounds += more
    if get_origin(kind) is Literal:
        return f"one of {', '.join(sorted(get_args(kind)))}"
    if get_origin(kind) is tuple:
        return "words as in a shell"
    if kind in (int, float):
        words = (("gt", "above"), ("ge", "of at least"), ("le", "of at most"))
        said = [f"{word} {getattr(b, name):g}" for b in bounds for name, word in words if hasattr(b, name)]
        return f"{'a whole number' if kind is int else 'a number'} {' and '.join(said)}".rstrip()
    return {bool: "true or false", UUID: "a UUID"}.get(kind, "text")


def _forbidden(given: Mapping[str, str]) -> list[str]:
    """Refuse what must not be in the container, whatever else is right."""
    return [
        f"{name}: a service-role key must not be in the container; remove it (the agent needs REALTIME_TOKEN only)"
        for name in SERVICE_KEYS
        if name in given
    ]


def _loaded_code(environ: Mapping[str, str]) -> list[str]:
    """Refuse variables of the dev server by which code would be loaded into every program, the guard included."""
    names = {name: name.removeprefix(PASSED_ON) for name, value in environ.items() if value}
    return [
        f"{name}: has the system load code into every program; remove it, and set {inner} in the dev script for the"
        " program that needs it"
        for name, inner in names.items()
        if inner != name and loads_code(inner)
    ]


def _missing(given: Mapping[str, str]) -> list[str]:
    problems = []
    if "REALTIME_TOKEN" not in given and "REALTIME_TOKEN_FILE" not in given:
        problems.append("REALTIME_TOKEN: is required and not set (or REALTIME_TOKEN_FILE)")
    if "REALTIME_URL" not in given:
        problems.append("REALTIME_URL: is required and not set (wss://<project>.supabase.co/realtime/v1)")
    elif given["REALTIME_URL"].partition(":")[0] in NATS_SCHEMES:
        if "NATS_JWT" not in given:
            problems.append("NATS_JWT: is required with a REALTIME_URL of NATS, and not set")
        if find_spec("nats") is None:
            problems.append(
                "REALTIME_URL: is of NATS, which needs a package: pip install 'preview-sync[nats]'"
            )
    return problems


def _token(given: Mapping[str, str]) -> list[str]:
    if "REALTIME_TOKEN" not in given:
        return []
    try:
        token = read_token(given["REALTIME_TOKEN"])
    except MalformedMessage as error:
        return [f"REALTIME_TOKEN: {error.reason}"]
    if token.role == "service_role":
        return [
            "REALTIME_TOKEN: its role is service_role, which opens every project; mint one with the role preview_agent"
        ]
    return []


def _apart(settings: Settings) -> list[str]:
    """Refuse a directory of the agent's inside the one that it only compares."""
    live = settings.project_dir.resolve()
    ours = {
        "SHADOW_DIR": settings.tree_dir, "STAGING_DIR": settings.staging, "STATE_DIR": settings.state_dir
    }  # fmt: skip
    problems = [
        f"{name}: {path} is inside PROJECT_DIR, which SYNC_MODE=shadow never touches"
        for name, path in ours.items()
        if path.resolve().is_relative_to(live)
    ]
    if live.is_relative_to(settings.tree_dir.resolve()):
        problems.append(
            f"SHADOW_DIR: {settings.tree_dir} contains PROJECT_DIR, which is not the agent's to write"
        )
    return problems
