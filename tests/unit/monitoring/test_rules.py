"""The alerts, before promtool; and that rules, dashboards, documentation and code name the same metrics."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.metrics_page import GRAFANA, dashboard_queries, names_of
from support.prometheus import ROOT, RULES, needs_prometheus, promtool, write_rules

from slipstream.metrics.catalogue import SPECS

HERE = Path(__file__).parent
NAMES = {spec.name for spec in SPECS}
RUNBOOKS = ROOT / "docs" / "operations" / "incidents.md"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


@needs_prometheus
def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", write_rules(tmp_path / "rules.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
@pytest.mark.parametrize("cases", sorted(HERE.glob("*_test.yaml")), ids=lambda path: path.stem)
def test_alerts_fire_when_they_should(tmp_path: Path, cases: Path) -> None:
    write_rules(tmp_path / "rules.yaml")
    done = promtool("test", "rules", shutil.copy(cases, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_a_broken_rule_fails_its_test(tmp_path: Path) -> None:
    rules = write_rules(tmp_path / "rules.yaml")
    text = rules.read_text(encoding="utf-8")
    assert "slipstream_replica_up == 0" in text
    rules.write_text(text.replace("slipstream_replica_up == 0", "slipstream_replica_up == 2"), encoding="utf-8")
    page = yaml.safe_load((HERE / "rules_test.yaml").read_text(encoding="utf-8"))
    page["tests"] = [case for case in page["tests"] if case["name"].startswith("a replica hangs")]
    (tmp_path / "one_test.yaml").write_text(yaml.safe_dump(page), encoding="utf-8")
    done = promtool("test", "rules", tmp_path / "one_test.yaml")
    assert done.returncode != 0
    assert "SlipstreamReplicaDown" in done.stdout + done.stderr


def test_every_alert_is_tested_and_leads_to_a_runbook() -> None:
    cases = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("*_test.yaml"))
    for alert in alerts():
        name = alert["alert"]
        assert re.search(rf"alertname: {name}\n(?!.*exp_alerts: \[\])", cases), f"nothing shows that {name} fires"
        assert alert["annotations"]["runbook"] == f"docs/operations/incidents.md#{name.lower()}"
        assert alert["labels"]["severity"] in ("page", "ticket")


def test_every_alert_has_a_runbook() -> None:
    titles = re.findall(r"^#+ (.*)$", RUNBOOKS.read_text(encoding="utf-8"), re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert {alert["alert"].lower() for alert in alerts()} <= anchors


def test_rules_and_dashboards_name_metrics_that_there_are() -> None:
    for path in (RULES, *GRAFANA.glob("*.json"), *RUNBOOKS.parent.glob("*.md")):
        named = {name for name in names_of(path) if name.islower()}  # Serve's log files begin alike
        assert named <= NAMES, path


def test_every_metric_is_on_a_dashboard() -> None:
    queries = " ".join(query for _, _, query in dashboard_queries())
    shown = {name for name in NAMES if re.search(rf"\b{name}(_bucket|_sum|_count)?\b", queries)}
    assert shown == NAMES
