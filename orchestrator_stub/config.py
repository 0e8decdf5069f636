"""Settings of the control plane, read once. The unit is in the name or the docstring, the reason beside it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, HttpUrl, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things may take. Seconds."""

    provision: float = 300.0
    """From request to `ready`. A cold image pull on Fly takes about a minute, an install another; and two hundred
    sessions asked for at once are made in as many seconds, Fly allowing one a second."""
    rollout: float = 180.0
    """The same, where a rollout replaced a machine that served: the image is known to the platform by then, and the
    preview is away meanwhile."""
    lease: float = 120.0
    """Without a heartbeat. Four of the agent's (30 s, jittered), so that one slow answer ends nothing."""
    claim: float = 60.0
    """One orchestrator's turn at making a machine, above the slowest single call; then another may."""
    wake: float = 20.0
    """From a wake to `ready`, until another machine is made: what is woken has its files and its dev server running."""
    asleep: float = 20 * 3600.0
    """A machine may sleep so long: its token can be renewed for 24 hours after its expiry."""
    drain: float = 120.0
    """From `draining` to `gone` before the sweeper reports the machine driver as stuck."""


Read = TypeVar("Read", bound=BaseSettings)

_TIMING = Timing()
_EXAMPLE = Path(__file__).parent.parent / "examples" / "react-app"


def _words(text: object) -> object:
    return shlex.split(text) if isinstance(text, str) else text


def _unless_empty(text: object) -> object:
    return None if text == "" else text


def _checked_dsn(dsn: SecretStr) -> SecretStr:
    """Refuses an address that the database's library would take apart in the wrong place, and quote a piece of the
    password in its error.
    """
    problem = dsn_problem(dsn.get_secret_value())
    if problem:
        raise ValueError(problem)
    return dsn


def _checked_origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses what no browser sends as `Origin`: a path, a slash at the end, capitals."""
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:\d{1,5})?", origin):
            raise ValueError(
                f"{origin!r} is no origin: scheme://host[:port] in lower case, with nothing behind it"
            )
    return origins


def _checked_nats(servers: str | None) -> str | None:
    """Refuses what no NATS client would connect to, and a password, which tokens take the place of."""
    for server in servers.split(",") if servers else []:
        if not re.fullmatch(r"(nats|tls)://[A-Za-z0-9.\-\[\]:]+", server.strip()):
            raise ValueError("is nats://HOST:PORT or tls://HOST:PORT, or several of them separated by commas")
    return servers


def _checked_domain(domain: str | None) -> str | None:
    """Refuses what a browser does not send as the end of a `Host`."""
    if domain is not None and not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*(:\d{1,5})?", domain):
        raise ValueError("is a host name in lower case, with its port where that is not the usual: no scheme")
    return domain


def dsn_problem(dsn: str) -> str | None:
    """What is wrong with a connection string, without a word of it; None when nothing is."""
    encode = "percent-encode @ : / and # in its password"
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return f"is not a PostgreSQL connection string; {encode}"
    host, port = str(parts.get("host", "")), str(parts.get("port", ""))
    if "@" in host or (not port.replace(",", "").isdecimal() and port):
        return f"its host or port is not one; {encode}"
    return None


class SettingsError(Exception):
    """The environment is missing or malformed; one sentence per variable in `problems`."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class ProcessSettings(BaseSettings):
    """What every process of ours is told by its environment."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # --- the parts we stand on
    database_url: Annotated[SecretStr, AfterValidator(_checked_dsn)]
    """PostgreSQL, as the owner of the schema: a direct or session-mode connection, not a transaction pooler
    (advisory locks and LISTEN need the session)."""
    database_wait: float = Field(60, ge=0)
    """Seconds for which a start waits for a database that is starting, recovers, or where nothing answers: a new one
    makes its data directory first, which takes about ten. What it refuses, as a wrong password, ends the process at
    once."""

    # --- being watched
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged; machines are given the same."""
    log_format: Literal["json", "console", "auto"] = "auto"
    """`auto`: JSON unless on a terminal."""

    @classmethod
    def from_environment(cls) -> Self:
        """Settings from the environment. Raises `SettingsError` with every problem at once."""
        settings = _checked(cls, {})
        if problems := settings.missing():
            raise SettingsError(problems)
        return settings

    def missing(self) -> list[str]:
        """What is needed besides what is set, a sentence each."""
        return []


class RelaySettings(ProcessSettings):
    """What `preview-orchestrator relay` is told by its environment."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # --- events over NATS
    nats_url: Annotated[str | None, BeforeValidator(_unless_empty), AfterValidator(_checked_nats)] = None
    """Where the relay publishes events ([transports.md](transports.md)): `nats://` or `tls://`, several servers of one
    cluster separated by commas. Unset: no relay, and machines hear Realtime."""
    nats_keys_file: Path | None = None
    """The `nats-keys.json` of `preview-orchestrator nats-keys DIRECTORY`: it signs what machines and the relay connect
    with. Required with `NATS_URL`."""
    nats_replicas: int = Field(1, ge=1, le=5)
    """Servers that store each event before it counts as published: 3 in a cluster, which survives the loss of one."""
    relay_metrics_port: int | None = Field(None, ge=1, le=65535)
    """Where `preview-orchestrator relay` serves its metrics, on loopback; unset: nowhere. Inside `serve` they are
    `serve`'s."""

    def missing(self) -> list[str]:
        return (
            ["NATS_URL is needed: it is where events go"] if self.nats_url is None else self._nats_missing()
        )

    def _nats_missing(self) -> list[str]:
        if self.nats_url is not None and self.nats_keys_file is None:
            return ["NATS_KEYS_FILE is needed with NATS_URL: it signs what machines connect with"]
        return []


class DoorSettings(ProcessSettings):
    """What `preview-orchestrator door` is told by its environment: all of it, and no key of Supabase's."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # --- the door
    preview_domain: Annotated[str | None, BeforeValidator(_unless_empty), AfterValidator(_checked_domain)] = (
        None
    )
    """Previews are reached at `https://LABEL.PREVIEW_DOMAIN` ([door.md](door.md)): a domain of their own, apart from
    the product's, with its port where that is not 443. `localhost` and what ends in `.localhost` is reached by http.
    Unset: no door."""
    door_keys: SecretStr | None = None
    """What codes and cookies of the door are signed with: words `ID:KEY`, a key being 32 bytes in base64
    (`openssl rand -base64 32`). The first signs, all verify. The same for every door and `serve`, for nothing else."""
    door_host: str = "127.0.0.1"
    """Where the door listens; `::` where what ends TLS is on another machine."""
    door_port: int = Field(54380, ge=0, le=65535)
    """Of the door, for what ends TLS in front of it."""
    door_metrics_port: int | None = Field(None, ge=1, le=65535)
    """Where `preview-orchestrator door` serves its own metrics; unset: nowhere. Inside `serve` they are `serve`'s."""
    door_replay: Annotated[str | None, BeforeValidator(_unless_empty)] = None
    """The Fly app of the machines: has Fly's proxy send requests to them (`fly-replay`) instead of copying them. The
    door's cookie reaches the project's code then, open sockets are not closed when access is taken back, and a body
    has at most 1 MB."""

    def missing(self) -> list[str]:
        """What is needed besides what is set, a sentence each."""
        if self.preview_domain is None:
            return ["PREVIEW_DOMAIN is needed: below it each preview has its name"]
        return self._door_missing()

    def _door_missing(self) -> list[str]:
        if self.preview_domain is not None and self.door_keys is None:
            return ["DOOR_KEYS is needed with PREVIEW_DOMAIN: they sign what lets a browser in"]
        return []


class Settings(DoorSettings, RelaySettings):
    """What `preview-orchestrator serve` is told by its environment; `dev` fills in the local stack's values."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # --- the parts we stand on
    supabase_url: HttpUrl
    """`https://<ref>.supabase.co`; Realtime and Storage are found below it."""
    supabase_anon_key: SecretStr
    """The publishable key, which the agents show at the Realtime handshake."""
    supabase_service_role_key: SecretStr
    """Storage uploads and signing; and what the product's backend shows us as Bearer."""
    supabase_jwt_secret: SecretStr | None = None
    """HS256: what Realtime checks tokens with. Either this or `JWT_KEYS_FILE`."""
    jwt_keys_file: Path | None = None
    """A JSON Web Key Set; the first private key signs. Re-read when it changes; a key that cannot be used is left out
    and an error in the log."""
    storage_object_limit: int = Field(50 * 1024 * 1024, ge=1024 * 1024)
    """Bytes of one object that Storage takes: an archive of a project, compressed, must fit. Hosted, 50 MB until it is
    raised in the project's Storage settings; then say the same here."""
    redis_url: SecretStr | None = None
    """Where signed URLs and manifests are cached when set; PostgreSQL otherwise."""

    # --- where we are
    host: str = "127.0.0.1"
    """Where it listens; `::` behind Fly's proxy."""
    port: int = Field(54321, ge=0, le=65535)
    """As the Supabase CLI's local gateway."""
    public_url: HttpUrl | None = None
    """How an agent reaches us; default `http://HOST:PORT`."""
    rooms_url: HttpUrl | None = None
    """How a browser reaches the rooms of this process ([rooms.md](rooms.md)); default `PUBLIC_URL`. Where several
    orchestrators stand behind one address, each needs one of its own: a file's room is in one of them."""
    shards: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ()
    """Where projects are spread over several databases ([scale](scale/README.md)): the `PUBLIC_URL` of each one's
    orchestrators, apart by blanks, the same line for all. The place in it, from 0, is the database's number, which the
    ids of its projects say: so a further one is added at the end, and none is ever moved."""
    cors_origins: Annotated[
        tuple[str, ...], NoDecode, BeforeValidator(_words), AfterValidator(_checked_origins)
    ] = ()
    """Web origins, such as `https://app.example.com`, whose pages may call `/v1` with a user's token; several are
    separated by blanks, `*` is any. None: a browser is told nothing, and the product's backend asks."""

    # --- what agents get
    token_role: str = "preview_agent"  # noqa: S105 - a role's name
    """The PostgreSQL role in session tokens. `authenticated` where hosted Realtime cannot assume a custom role."""
    token_ttl: float = Field(600, ge=60, le=3600)
    """Seconds. Minutes, because it cannot be taken back; the agent renews at 70 %."""
    token_renew_grace: float = Field(24 * 3600, ge=0)
    """Seconds after its expiry for which a token can still be exchanged for a new one, by the current machine of a
    live session and for nothing else. A machine that restarts has only the token it was born with (Fly does not
    refresh the environment), so this is the longest a session lives."""
    agent_transport: Literal["realtime", "nats"] = "realtime"
    """By which way new machines hear events, where a project's run settings do not say (`transport`). The database must
    send them that way: `update preview.settings set transport = 'both'` first ([transports.md](transports.md))."""
    nats_agent_url: Annotated[str | None, BeforeValidator(_unless_empty), AfterValidator(_checked_nats)] = (
        None
    )
    """Where machines reach NATS: one address, `tls://` across any network that is not private. Unset: the first of
    `NATS_URL`."""
    snapshot_url_ttl: float = Field(600, ge=60, le=3600)
    """Seconds. Above the slowest cold start of a machine, so that the first download still finds it good."""
    session_ttl: float = Field(8 * 3600, ge=60)
    """Seconds a session lives when its creator does not say: a working day."""
    session_ttl_max: float = Field(24 * 3600, ge=60)
    """Seconds. More than a day in one machine is a leak, not a session."""
    session_stored_bytes: int = Field(256 * 2**20, ge=2**20)
    """Bytes of archives that one session may have stored in an hour; above it the next is refused until there is room.
    Five of the largest that Storage takes by default, and a hundred of the deltas that a slow agent needs."""
    user_sessions: int = Field(20, ge=1)
    """Sessions at a time that one user may ask for with their own token. The service's are not counted against it."""
    project_sessions: int = Field(10, ge=1)
    """Sessions at a time of one project, for users that ask for one more; the service may always."""
    inline_limit: int = Field(2_000_000, ge=1_000)
    """Bytes of content that a sync answer carries in JSON; past it a delta snapshot is cheaper."""
    sync_mode: Literal["live", "shadow"] = "live"
    """`shadow`: agents follow beside the flow that the product has, compare and touch nothing (docs/rollout.md), and
    the silence of one ends no session: PROVISION_SECONDS and LEASE_SECONDS do not count."""

    modules_layer_bytes: int = Field(180 * 2**20, ge=0, le=2**30)
    """Bytes of one archive of node_modules, compressed, that a machine may send: some 1.2 GB unpacked. 0: none is taken
    from machines, and only those of `modules build` are used."""
    modules_project_bytes: int = Field(500 * 2**20, ge=0)
    """Bytes of such archives that one project keeps; those used longest ago go first."""
    modules_total_bytes: int = Field(100 * 2**30, ge=0)
    """The same of all projects together, the shared ones apart: what the bucket may grow to."""
    modules_keep_seconds: float = Field(30 * 24 * 3600, ge=3600)
    """Since one was used last. A project that nobody opens for a month is installed once more."""

    run_settings_keys: SecretStr | None = None
    """What `env` and `npmrc` of run settings are encrypted with: words `ID:KEY`, a key being 32 bytes in base64
    (`openssl rand -base64 32`). The first encrypts, all decrypt. Unset: none of either are kept."""

    # --- new projects
    template_dir: Annotated[Path | None, BeforeValidator(_unless_empty)] = (
        _EXAMPLE if _EXAMPLE.is_dir() else None
    )
    """What a project without any file is given at its first session; empty: it stays without. The example is a
    checkout's: an installed package has none, and `serve` says so at its start."""

    # --- machines
    machine_driver: Literal["local", "container", "fly"] = "local"
    """`local`: a process; `container`: podman or docker; `fly`: a Fly Machine."""
    machines_dir: Path = Path(".preview-sync/machines")
    """Of the local driver."""
    agent_image: str = "preview-agent:latest"
    """Of the container and fly drivers."""
    container_cli: str | None = None
    """`podman` or `docker`; default: the first of them on the PATH."""
    container_options: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ()
    """Further options of the engine's `run`, as on its command line: `--network previews`. Where root may not raise its
    own limits (inside a container, say), podman needs `--ulimit nofile=1024:1024 --ulimit nproc=1000:1000`: it asks for
    a million of each."""
    fly_api_url: HttpUrl = HttpUrl("https://api.machines.dev/v1")
    """Of the Machines API; `http://_api.internal:4280/v1` from inside Fly's network."""
    fly_api_token: SecretStr | None = None
    """Required with `fly`: `fly tokens create deploy` makes one that reaches one app, `fly tokens create org` one for
    several."""
    fly_app: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)] = ()
    """Required with `fly`: the app whose machines are the previews. Orchestrators of several databases may share it.
    Several are separated by blanks: sessions are spread over them, and FLY_PER_SECOND is each one's."""
    fly_region: str | None = None
    """Where machines are made; unset: Fly chooses."""
    fly_preview_url: str = "http://{machine_id}.vm.{app}.internal:5173"
    """Where the door reaches a machine's preview; `{machine_id}` and `{app}` are filled in. The default is Fly's
    private network."""
    fly_per_second: float = Field(1, gt=0)
    """Machines made, and changes to each, a second: what Fly allows everybody. It raises it for who asks."""
    fly_cpus: int = Field(1, ge=1)
    """Shared ones. Vite keeps one busy at its start and none afterwards."""
    fly_memory_mb: int = Field(1024, ge=256, multiple_of=256)
    """Vite takes 140-250 MB, npm install three times that; Fly sells multiples of 256."""

    # --- time
    provision_seconds: float = _TIMING.provision
    """From request to `ready`. A cold image pull and an install take a minute each; Fly makes one machine a second."""
    rollout_seconds: float = Field(_TIMING.rollout, gt=0)
    """The same where a rollout replaced a machine that served, after which the former image is back: an install's time
    and more, and how long a bad image may take a preview away."""
    lease_seconds: float = _TIMING.lease
    """Without a heartbeat before the session is ended: four of the agent's."""
    idle_suspend_seconds: float = Field(0, ge=0)
    """Put a session's machine to sleep once nobody had its preview open and nothing was saved for so long; 0: never.
    Only where the dev server is observed is it known that nobody looks."""
    wake_on_save: bool = False
    """Wake a sleeping session when its project is saved; else when somebody wants to see it."""
    claim_seconds: float = _TIMING.claim
    """One orchestrator's turn at making a machine, above the slowest single call; then another may."""
    drain_seconds: float = _TIMING.drain
    """From `draining` to `gone` before the machine driver is reported as stuck."""
    sweep_seconds: float = Field(15, gt=0)
    """Between two sweeps: small against the lease, so that a lapse is seen within an eighth of it."""
    create_wait: float = Field(10, ge=0)
    """Seconds that `POST /v1/sessions` waits for the machine before it answers with the state as it is."""
    request_timeout: float = Field(30, gt=0)
    """Seconds for any one request; above every single call it makes."""
    write_back_registries: str = ""
    """Hosts, apart by blanks, that a lock file which a container gives back may name, beside npm's and Yarn's public
    ones and those that the project's own lock file installs from already."""
    body_limit: int = Field(65_536, ge=1024)
    """Bytes. The largest honest body of the session API, a status with its problems, is cut to 32 KB by the agent."""

    @property
    def timing(self) -> Timing:
        """What `sessions.judge` goes by.

        Beside another flow somebody works in the machine whether our agent speaks or not: its silence ends nothing
        then, only the session's own end does.
        """
        if self.sync_mode == "shadow":
            longest = self.session_ttl_max
            return Timing(
                provision=longest,
                rollout=longest,
                lease=longest,
                claim=self.claim_seconds,
                drain=self.drain_seconds,
            )
        return Timing(
            provision=self.provision_seconds,
            rollout=self.rollout_seconds,
            lease=self.lease_seconds,
            claim=self.claim_seconds,
            drain=self.drain_seconds,
        )

    @property
    def realtime_url(self) -> str:
        """Where an agent's socket goes: `…/realtime/v1`, with ws for http and wss for https."""
        return "ws" + str(self.supabase_url).rstrip("/").removeprefix("http") + "/realtime/v1"

    @property
    def nats_url_of_agents(self) -> str | None:
        """Where machines are told that NATS is; None: there is none."""
        return self.nats_agent_url or (self.nats_url.split(",")[0].strip() if self.nats_url else None)

    @property
    def storage_url(self) -> str:
        return str(self.supabase_url).rstrip("/") + "/storage/v1"

    @property
    def agent_facing_url(self) -> str:
        """The base of the session API, as agents are told it."""
        return str(self.public_url or f"http://{self.host}:{self.port}").rstrip("/")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from `values` alone, nothing read from the environment. Raises `SettingsError`."""
        return _checked(_Explicit, values)

    def missing(self) -> list[str]:
        problems = [*self._door_missing(), *self._nats_missing()]
        if self.agent_transport == "nats" and self.nats_url is None:
            problems.append("NATS_URL is needed with AGENT_TRANSPORT=nats: it is where events go")
        if self.supabase_jwt_secret is None and self.jwt_keys_file is None:
            problems.append(
                "SUPABASE_JWT_SECRET or JWT_KEYS_FILE is needed: one of them signs session tokens"
            )
        if self.machine_driver == "fly":
            missing = [n for n in ("fly_api_token", "fly_app") if not getattr(self, n)]
            problems.extend(f"{name.upper()} is needed with MACHINE_DRIVER=fly" for name in missing)
        return problems

    @staticmethod
    def database_url_from_environment() -> str:
        """`DATABASE_URL` alone, for what needs nothing else. Raises `SettingsError`."""
        value = os.environ.get("DATABASE_URL")
        if not value:
            raise SettingsError(["DATABASE_URL: set it, or give --database-url"])
        if problem := dsn_problem(value):
            raise SettingsError([f"DATABASE_URL: {problem}"])
        return value


class StandInSettings(ProcessSettings):
    """What `preview-orchestrator stand-in` is told by its environment."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)

    # --- the parts we stand on
    database_url: Annotated[SecretStr, AfterValidator(_checked_dsn)]
    """A PostgreSQL of its own, as a superuser: it is given Supabase's roles and schemas, then the migrations."""
    supabase_jwt_secret: SecretStr
    """What tokens are signed with; the two API keys follow from it, as `preview-orchestrator secrets` makes them."""
    storage_dir: Path = Path(".preview-sync/storage")
    """Where Storage's objects are kept. A backup is this directory and the database, taken together."""

    # --- where it is
    host: str = "127.0.0.1"
    """Where it listens. In a container `0.0.0.0`; it has no rate limits, so nothing but your own should reach it."""
    port: int = Field(54321, ge=0, le=65535)
    """As the Supabase CLI's local gateway."""


class _Explicit(Settings):
    """`Settings` that looks nowhere but at what it is given."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


def _checked(kind: type[Read], values: Mapping[str, Any]) -> Read:
    try:
        return kind(**values)
    except ValidationError as error:
        raise SettingsError(
            [f"{'.'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in error.errors()]
        ) from None
