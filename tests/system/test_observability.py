"""The dashboard and the alert rules ask for what there is, and do what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from agent.core.model import ProblemKind
from agent.core.reconcile import Reason
from agent.devserver.state import Phase
from agent.link.types import LinkState
from orchestrator_stub.sessions.lifecycle import PROBLEMS
from orchestrator_stub.sessions.lifecycle import State as SessionState
from tests.system.scrape import Scraped
from tests.system.test_metrics import AGENT, ORCHESTRATOR

pytestmark = pytest.mark.system

DOCS = Path(__file__).parents[2] / "docs"
PLACE = DOCS / "observability"
NAME = re.compile(r"\b(preview_(?:agent|orchestrator)_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
SCRAPED = {"instance", "job"}
"""Labels that Prometheus adds."""

VALUES: dict[tuple[str, str], set[str]] = {
    ("preview_agent_link_state", "state"): {each.value for each in LinkState},
    ("preview_agent_dev_server_state", "state"): {each.value for each in Phase},
    ("preview_agent_problems", "kind"): set(get_args(ProblemKind)),
    ("preview_agent_resyncs_total", "reason"): {each.value for each in Reason},
    ("preview_orchestrator_sessions", "state"): {each.value for each in SessionState},
    ("preview_orchestrator_session_problems", "problem"): set(PROBLEMS),
}
"""What the labels can be, where the code has a closed list."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


@pytest.fixture
def series(scraped: Scraped) -> dict[str, set[str]]:
    return {**scraped.agent.series(), **scraped.orchestrator.series()}


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((PLACE / "dashboard.json").read_text())
    return read


def panels() -> Iterator[dict[str, Any]]:
    for panel in dashboard()["panels"]:
        if panel["type"] != "row":
            yield panel


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PLACE / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[tuple[str, str]]:
    """Where from, and the query, of everything that is asked."""
    asked = [(f"panel {panel['title']}", target["expr"]) for panel in panels() for target in panel["targets"]]
    return asked + [(f"alert {rule['alert']}", rule["expr"]) for rule in rules()]


def test_every_metric_and_label_that_is_asked_for_exists(series: dict[str, set[str]]) -> None:
    seen = 0
    for where, expression in expressions():
        for name, selector in NAME.findall(expression):
            assert name in series, f"{where}: there is no {name}"
            seen += 1
            for label, wanted in MATCHER.findall(selector or ""):
                if label in SCRAPED:
                    continue
                closed = VALUES.get((name, label))
                assert closed is not None or label in series[name], f"{where}: {name} has no label {label}"
                if closed is not None and "$" not in wanted:
                    assert set(wanted.split("|")) <= closed, f"{where}: {wanted}"
    assert seen > 80


def test_every_metric_of_ours_has_its_place_on_the_dashboard() -> None:
    asked = " ".join(target["expr"] for panel in panels() for target in panel["targets"])
    shown = {name for name, _ in NAME.findall(asked)}
    for prefix, wanted in (("preview_agent_", AGENT), ("preview_orchestrator_", ORCHESTRATOR)):
        for name, (kind, _) in wanted.items():
            full = prefix + name + {"counter": "_total", "histogram": "_bucket"}.get(kind, "")
            assert full in shown, f"no panel shows {full}"


def test_the_dashboard_is_one_that_grafana_lays_out() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    variables = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used == variables == {"datasource", "instance"}
    assert all(panel["description"] and panel["targets"] for panel in panels())


@needs_promtool
def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    recorded = [
        {
            "record": f"panel:{n}",
            "expr": target["expr"].replace("$__rate_interval", "5m").replace("$instance", ".*"),
        }
        for n, target in enumerate(target for panel in panels() for target in panel["targets"])
    ]
    path = tmp_path / "panels.json"  # YAML, as all JSON is
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": recorded}]}))
    checked = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(recorded)} rules found" in checked.stdout


@needs_promtool
@pytest.mark.parametrize(("command", "file"), [("check", "alerts.yml"), ("test", "alerts_test.yml")])
def test_promtool_passes_the_rules(command: str, file: str) -> None:
    told = subprocess.run(
        ["promtool", command, "rules", PLACE / file], capture_output=True, text=True, timeout=120, cwd=PLACE
    )
    assert told.returncode == 0, told.stdout + told.stderr


def test_every_alert_is_seen_to_fire_and_to_keep_still() -> None:
    tests = yaml.safe_load((PLACE / "alerts_test.yml").read_text())["tests"]
    expected = [
        (case["alertname"], bool(case["exp_alerts"])) for test in tests for case in test["alert_rule_test"]
    ]
    for rule in rules():
        assert (rule["alert"], True) in expected, f"{rule['alert']} is never seen to fire"
        assert (rule["alert"], False) in expected, f"{rule['alert']} is never seen to keep still"


def test_every_alert_says_how_urgent_it_is_and_where_the_remedy_stands() -> None:
    headings = {
        re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in (DOCS / "operations.md").read_text().splitlines()
        if line.startswith("#")
    }
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert file == "docs/operations.md"
        assert anchor == rule["alert"].lower()
        assert anchor in headings, f"docs/operations.md has no section {rule['alert']}"
    assert len({rule["alert"] for rule in rules()}) == len(rules())
