"""What the protocol lists is there under exactly those names and labels, in a form that every scraper takes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

import pytest

from tests.system.scrape import Scrape, Scraped

pytestmark = pytest.mark.system

AGENT: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "event_lag_seconds": ("histogram", ()),
    "apply_seconds": ("histogram", ()),
    "hydrate_seconds": ("histogram", ()),
    "snapshot_build_seconds": ("histogram", ()),
    "session_start_seconds": ("gauge", ()),
    "events": ("counter", ("event", "outcome")),
    "resyncs": ("counter", ("reason",)),
    "revision": ("gauge", ()),
    "head_revision": ("gauge", ()),
    "link_state": ("gauge", ("state",)),
    "dev_server_state": ("gauge", ("state",)),
    "dev_server_restarts": ("counter", ("reason",)),
    "problems": ("gauge", ("kind",)),
    "queue_depth": ("gauge", ()),
    "clock_jumps": ("counter", ()),
    # faults.md, "what shows"
    "pending_files": ("gauge", ()),
    "coalesced": ("counter", ()),
    "patches": ("counter", ("outcome",)),
    "patches_saved_bytes": ("counter", ()),
    "drift_files": ("gauge", ()),
    "installs": ("counter", ("result",)),
    "link_refusals": ("counter", ("reason",)),
    # docs/start.md
    "modules": ("counter", ("outcome",)),
    "modules_seconds": ("histogram", ()),
    # docs/write-back.md
    "write_back": ("counter", ("outcome",)),
    # ours
    "problems_opened": ("counter", ("kind",)),
    "shown_seconds": ("histogram", ()),
    "gate_seconds": ("histogram", ()),
    "preview_errors": ("gauge", ("kind",)),
    "preview_observed": ("gauge", ()),
    "watch_renewals": ("counter", ()),
    "agent_errors": ("counter", ("part",)),
    "loop_stall_seconds": ("gauge", ()),
    "log_lines_dropped": ("counter", ()),
    "clock_skew_seconds": ("gauge", ()),
    "clock_skew_uncertainty_seconds": ("gauge", ()),
    "process_resident_memory_bytes": ("gauge", ()),
    "process_cpu_seconds": ("counter", ()),
}
"""Name after the prefix and without `_total` → type and labels (protocol.md, "Metrics and logs")."""

ORCHESTRATOR: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "requests": ("counter", ("method", "route", "status")),
    "request_seconds": ("histogram", ("route",)),
    "session_ready_seconds": ("histogram", ()),
    "provision_seconds": ("histogram", ("part",)),
    "sessions": ("gauge", ("state",)),
    "session_problems": ("gauge", ("problem",)),
    "agents": ("gauge", ("state",)),
    "suspends": ("counter", ()),
    "wakes_seconds": ("histogram", ()),
    "last_sweep_timestamp_seconds": ("gauge", ()),
    "key_problems": ("gauge", ("kind",)),
    "snapshot_build_seconds": ("histogram", ()),
    "snapshot_offers": ("counter", ("how",)),
    "turns": ("counter", ("outcome",)),
    "door_requests": ("counter", ("outcome",)),
    "door_sockets": ("gauge", ()),
    "door_connections": ("gauge", ()),
    "relay_published": ("counter", ("outcome",)),
    "relay_buckets": ("gauge", ()),
    "outbox_rows": ("gauge", ()),
    "outbox_age_seconds": ("gauge", ()),
    "turns_open": ("gauge", ()),
    "turns_oldest_seconds": ("gauge", ()),
    "forgotten": ("counter", ("what",)),
    "modules_dropped": ("counter", ()),
    "offered_changes": ("counter", ("outcome", "rule")),
    "rooms_open": ("gauge", ()),
    "room_members": ("gauge", ()),
    "room_saves": ("counter", ("outcome",)),
    "modules_bytes": ("gauge", ("owner",)),
    "upkeep_overdue_seconds": ("gauge", ()),
    "deleted_projects": ("gauge", ()),
    "deleted_projects_oldest_seconds": ("gauge", ()),
    "process_resident_memory_bytes": ("gauge", ()),
    "process_cpu_seconds": ("counter", ()),
}

SIDES = [("agent", "preview_agent_", AGENT), ("orchestrator", "preview_orchestrator_", ORCHESTRATOR)]


def side(scraped: Scraped, name: str) -> Scrape:
    found: Scrape = getattr(scraped, name)
    return found


@pytest.mark.parametrize(("name", "prefix", "wanted"), SIDES)
def test_every_metric_is_there_and_no_other(
    scraped: Scraped, name: str, prefix: str, wanted: Mapping[str, tuple[str, tuple[str, ...]]]
) -> None:
    families = side(scraped, name).families()
    ours = {
        family.removeprefix(prefix): metric
        for family, metric in families.items()
        if family.startswith(prefix)
    }
    assert set(families) - {prefix + each for each in ours} == {"python_info"}, "the platform's own"
    undocumented = {each for each in set(ours) - set(wanted) if not each.startswith("process_")}
    assert undocumented == set()
    for each, (kind, labels) in wanted.items():
        assert each in ours, f"{prefix}{each} is missing"
        assert ours[each].type == kind, each
        assert ours[each].documentation, each
        for sample in ours[each].samples:
            assert set(sample.labels) - {"le"} == set(labels), sample


def test_the_figures_are_of_what_happened(scraped: Scraped) -> None:
    value = {
        (sample.name.removeprefix("preview_agent_"), *sorted(sample.labels.values())): sample.value
        for family in scraped.agent.families().values()
        for sample in family.samples
    }
    assert value["event_lag_seconds_count",] == 2, "also the one that came by reference"
    assert value["events_total", "applied", "file:update"] == 1
    assert value["events_total", "file:update", "waiting"] == 1
    assert value["resyncs_total", "reference"] == 1
    assert value["hydrate_seconds_count",] == 1
    assert value["revision",] == value["head_revision",] == 3
    assert value["session_start_seconds",] == 0, "a project without a dev server is never ready"
    assert value["link_state", "live"] == 1
    assert sum(number for key, number in value.items() if key[0] == "link_state") == 1
    assert value["dev_server_state", "absent"] == 1
    assert (value["queue_depth",], value["pending_files",]) == (0, 0)
    assert value["clock_skew_seconds",] == 0, "one machine has one clock"
    assert 0 < value["clock_skew_uncertainty_seconds",] <= 1.1
    served = {
        sample.labels["state"]: sample.value
        for sample in scraped.orchestrator.families()["preview_orchestrator_agents"].samples
    }
    assert served == {"degraded": 1}, "there is nothing to serve"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
@pytest.mark.parametrize("name", ["agent", "orchestrator"])
def test_promtool_finds_nothing_to_say(scraped: Scraped, name: str) -> None:
    checked = subprocess.run(
        ["promtool", "check", "metrics"],
        input=side(scraped, name).text,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
