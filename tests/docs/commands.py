"""Which commands our documents give, and how each is tried. Every command meets exactly one `Way`.

A command is a line of a ```sh block (continued lines joined, comments dropped), or inline code that begins with one of
`PROGRAMS` and says more than its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.docs.reading import DOCUMENTS, Code, blocks, spans

PROGRAMS = (
    "make", "preview-agent", "preview-orchestrator", "curl", "fly", "docker", "podman", "pip", "npm", "git", "psql",
    "pg_dump", "supabase", "python", "df", "ls", "cat", "dmesg", "env", "uv", "uvx", "apt-get", "flock", "nice",
)  # fmt: skip
"""What a command begins with, after a path like `.venv/bin/`."""


@dataclass(frozen=True, slots=True)
class Run:
    """Really run, by tests/docs/test_running.py. `until`: it does not end by itself; Ctrl-C once it says so."""

    exit: int = 0
    says: str = ""
    until: str = ""
    unless: str = ""
    """Skipped, with what it said, where the machine itself refuses it in these words."""


@dataclass(frozen=True, slots=True)
class Make:
    """The target exists and `make -n` gives its steps; what it does is run by CI or by the test named."""

    by: str


@dataclass(frozen=True, slots=True)
class ByTest:
    """Too long or too large for here: the same command is run by that test. Here the command line is read."""

    test: str


@dataclass(frozen=True, slots=True)
class OnlyRead:
    """It needs what is not here. Its syntax is read, its variables and paths are held against the code."""

    needs: str


Way = Run | Make | ByTest | OnlyRead

FLY = OnlyRead("an account on Fly")
REGISTRY = OnlyRead("an image registry")
CONTAINERS = OnlyRead("the Supabase CLI's own containers, from a registry")
MENTION = OnlyRead("the mention of a program, not a whole command")
FOLLOWED = ByTest("tests/image/test_compose.py::test_the_page_is_followed")
FOLLOWED_SECTIONS = (("operations.md", "Deploy on one machine"), ("operations.md", "Back it up"))
"""Their shell blocks are typed into one shell, all of them in order, and what they show is held against the page."""
ELSEWHERE = r"(make|apt-get|systemctl) .*"
"""What is not typed there: the test builds the images itself, and installs nothing."""

WAYS: tuple[tuple[str, Way], ...] = (
    # --- make
    (
        r"make dev( DIR=\S+)?( TRANSPORT=nats)?( OPTIONS=.+)?",
        Make("tests/system/test_spine.py, which starts what it starts"),
    ),
    (r"make help", Run(says="make check")),
    (r"make rooms", Run(says="imports between rooms")),
    (
        r"uvx --from '\./preview_sync-[\d.]+-py3-none-any\.whl\[orchestrator\]' preview-orchestrator dev \.",
        ByTest("tests/package/test_installed.py::test_uvx_serves_a_project_without_a_checkout"),
    ),
    (
        r"make (setup|check|test|test-browser|test-frameworks|test-image|image)( (WORKERS|TAG|IMAGE_\w+)=\S+)*",
        Make(".ci/run"),
    ),
    (r"make image-orchestrator", Make("make test-image, with a tag of its own")),
    (r"make wheel", Make("tests/package/test_installed.py")),
    (r"make page", Make("tests/browser/test_editor.py")),
    (r"make pictures", Make("by hand: it changes the pictures of README and docs")),
    (r"make (fmt|clean|lock)", Make("nothing else: it changes the checkout")),
    (
        r"make (test-nightly|frameworks|soak|capacity|bench|bench-\w+|fuzz)( (SECONDS|MINUTES|SESSIONS|QUICK)=\S+)?",
        Make("nightly, by hand"),
    ),
    # --- the agent
    (r"(\.venv/bin/)?preview-agent --help", Run(says="exit codes:")),
    (r"preview-agent check", Run(says="ok    settings")),
    (r"(\.venv/bin/)?preview-agent status --watch --url \S+", Run(until="serving|degraded|starting")),
    (r"preview-agent status --json", Run(says='"revision"')),
    (r"preview-agent status", Run(says="revision")),
    (r"env -u SUPABASE_SERVICE_ROLE_KEY preview-agent run", Run(until="shadow.begun")),
    (
        r"preview-agent modules (key DIR|pack DIR FILE)",
        ByTest("tests/agent/cli/test_modules.py::test_the_key_follows_from_the_files"),
    ),
    (r"preview-agent record \S+", Run(until="recording into")),
    (r"preview-agent replay \S+\.jsonl( .*)?", Run(says="^ok")),
    # --- the orchestrator
    (
        r"DATABASE_URL=\S+ preview-orchestrator migrate( --check| --adopt-files)?",
        Run(says="nothing to apply"),
    ),
    (r"preview-orchestrator migrate( --\w+)?", MENTION),
    (r"preview-orchestrator log [0-9a-f-]{36}", MENTION),
    (
        r"preview-orchestrator rollout( registry\.fly\.io/my-previews:v\d( --share 10%)?)?",
        ByTest("tests/system/test_rollout.py::test_there_and_back_and_stopped_by_a_bad_image"),
    ),
    (
        r"preview-orchestrator write-back -( --off|( --preset (lock|routes))+)?",
        ByTest("tests/orchestrator/write_back/test_command.py::test_a_preset_is_set_shown_and_taken_away"),
    ),
    (
        r"preview-orchestrator (log -|show - \d+|diff - \d+ \d+|restore - \d+)",
        ByTest(
            "tests/orchestrator/snapshots/test_history.py::test_beside_a_running_dev_a_dash_is_its_project"
        ),
    ),
    (
        r"for each in shards/\*\.env; do \(set -a; .*",
        ByTest(
            "tests/orchestrator/shards/test_two_databases.py::test_one_line_migrates_and_examines_them_all"
        ),
    ),
    (
        r"preview-orchestrator serve",
        ByTest("tests/orchestrator/test_serve.py::test_it_serves_is_watched_and_stops_in_order"),
    ),
    (
        r"preview-orchestrator stand-in",
        ByTest(
            "tests/orchestrator/test_stand_in.py::test_it_waits_for_its_database_makes_the_schema_and_serves"
        ),
    ),
    (
        r"preview-orchestrator secrets",
        ByTest("tests/orchestrator/test_stand_in.py::test_the_secrets_are_filled_in_and_fit_together"),
    ),
    (
        r"preview-orchestrator door",
        ByTest("tests/orchestrator/door/test_process.py::test_it_opens_and_stops_in_order"),
    ),
    (
        r"preview-orchestrator (relay|nats-keys DIRECTORY)",
        ByTest(
            "tests/orchestrator/relay/test_process.py::test_a_relay_is_started_with_keys_of_the_command_and_stopped"
        ),
    ),
    (
        r"preview-orchestrator (nats-keys keys|nats-region eu keys/eu|nats-mirror eu)|export NATS_ROUTES=.*"
        r"|NATS_NAME=\S+ NATS_STORE=\S+ (NATS_HUB=\S+ )?nats-server -c (hub|hub-of-three|region)\.conf",
        ByTest(
            "tests/orchestrator/relay/test_regions.py::"
            "test_a_leader_that_is_killed_loses_doubles_and_reorders_nothing"
        ),
    ),
    (
        r"preview-orchestrator doctor",
        ByTest("tests/orchestrator/doctor/test_doctor.py::test_all_is_well"),
    ),
    (
        r"preview-orchestrator machines",
        ByTest("tests/orchestrator/sessions/test_inventory.py::test_it_says_whose_every_machine_is"),
    ),
    (
        r"preview-orchestrator modules (build DIR|list|drop KEY)",
        ByTest("tests/orchestrator/modules/test_operator.py::test_a_layer_is_built_listed_and_dropped"),
    ),
    (r"(\.venv/bin/)?preview-orchestrator tail -", Run(until="file:update")),
    (
        r"\.venv/bin/preview-orchestrator dev DIR --once",
        ByTest("tests/system/test_dev_command.py::test_once_edits_measures_and_stops"),
    ),
    (
        r"preview-orchestrator dev DIR --timeline",
        ByTest("tests/system/test_modules.py::test_dev_opens_a_project_again_from_its_layer"),
    ),
    (
        r"preview-orchestrator dev --faults",
        OnlyRead("a whole stack; the faults themselves are asked for by the curl beside it"),
    ),
    # --- asking
    (r"curl -sf? .*|curl -X POST .*", Run()),
    # --- looking at a machine
    (r"(df|ls|cat) .*", Run()),
    (r"openssl rand -base64 32", Run()),
    (r"dmesg .*", Run(unless="not permitted|not found")),
    (r"(apt-get|systemctl) .*", OnlyRead("a machine to install on")),
    (r"podman (logs|stats|exec).*|docker compose", MENTION),
    (
        r"podman rm -f preview-orchestrator|podman-compose -f deploy/compose\.yaml up -d|sh deploy/door\.sh",
        ByTest("tests/image/test_compose.py::test_the_page_is_followed"),
    ),
    (r"promtool (check|test) rules \S+", Run(says="SUCCESS")),
    # --- elsewhere
    (r"fly .*", FLY),
    (r"docker (push|tag) .*", REGISTRY),
    (r"(podman|docker) run .*", ByTest("tests/image/test_image.py::test_what_is_in_it")),
    (
        r"supabase db push",
        ByTest("tests/referees/test_supabase_cli.py::test_db_push_makes_what_our_migrate_makes"),
    ),
    (r"supabase db reset|supabase test db", CONTAINERS),
    (
        r"pip install \./preview-sync",
        ByTest("tests/test_ci_snippet.py::test_the_snippet_runs_in_a_fresh_venv"),
    ),
    (
        r"pip install '\.\[orchestrator\]'",
        OnlyRead("a fresh image; the extra's name is the one in pyproject.toml"),
    ),
    (r"pg_dump .*", OnlyRead("a client of the server's own version")),
    (r"npm (ci|run dev|install)", MENTION),
    (r"\.venv/bin/python -m pytest tests/agent/core/test_reconcile\.py", OnlyRead("itself: this is it")),
    (r"git log", MENTION),
    (r"python -m tests\.docs\.test_\w+", Run()),
    (r"python -m bench --help", Run(says="too noisy")),
    (r"python -m bench \w+", ByTest("tests/bench/test_results.py::test_a_refused_number_appears_nowhere")),
)


@dataclass(frozen=True, slots=True)
class Command:
    """One command, where it stands and how it is tried."""

    code: Code
    text: str

    @property
    def id(self) -> str:
        return f"{self.code.place} {self.text[:60]}"

    @property
    def is_followed(self) -> bool:
        """Whether it stands in a shell block that a test types as it stands."""
        place = (self.code.path.name, section_of(self.code))
        return (
            self.code.lang == "sh" and place in FOLLOWED_SECTIONS and not re.fullmatch(ELSEWHERE, self.text)
        )

    @property
    def ways(self) -> list[Way]:
        if self.is_followed:
            return [FOLLOWED]
        return [way for pattern, way in WAYS if re.fullmatch(pattern, self.text)]


def section_of(code: Code) -> str:
    """The `## ` heading it stands below."""
    lines = code.path.read_text().splitlines()[: code.line]
    return next((line.removeprefix("## ") for line in reversed(lines) if line.startswith("## ")), "")


def program_of(line: str) -> str:
    """The program a line runs, assignments before it and the directory of it left out."""
    words = [word for word in line.split() if not re.match(r"[A-Z_]+=", word)]
    if words[:3] == ["env", "-u", "SUPABASE_SERVICE_ROLE_KEY"]:
        words = words[3:]
    return words[0].removeprefix(".venv/bin/").removeprefix("$ ") if words else ""


def lines_of(text: str) -> Iterator[str]:
    """The commands of a shell block: continued lines joined, comments and blank lines dropped."""
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s+)#( .*)?$", "", line).strip()
        if command:
            yield " ".join(command.split())


def all_commands() -> list[Command]:
    """Every command of every document, `a && b` taken apart."""
    found = []
    for path in DOCUMENTS:
        for block in blocks(path):
            if block.lang == "yaml":
                found += [
                    Command(block, " ".join(re.sub(r"\s#.*", "", step).split()))
                    for step in re.findall(r"- run: (.*)", block.text)
                ]
            if block.lang == "sh":
                found += [
                    Command(block, part) for line in lines_of(block.text) for part in line.split(" && ")
                ]
        for span in spans(path):
            if program_of(span.text) in PROGRAMS and " " in span.text:
                found.append(Command(span, span.text))
    return found
