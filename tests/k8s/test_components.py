"""Components that the chart does not have, on an overlay: what kustomize makes of them, and who may talk to whom then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.dashboards import BOARDS
from support.kube_schemas import problems
from support.manifests import K8S, Object, kustomize

MONITORS = {
    "ServiceMonitor",
    "PodMonitor",
    "PrometheusRule",
}  # of the Prometheus operator: no schema of theirs is at hand
NAMESPACE = {"namespaceSelector": {"matchLabels": {"slipstream-monitoring": "true"}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Object]:
    """By kind and name: the overlay `local` with both."""
    root: Path = tmp_path_factory.mktemp("monitored")
    shutil.copytree(K8S, root / "k8s")
    page: dict[str, object] = {
        "resources": ["../k8s/overlays/local"],
        "components": ["../k8s/monitoring", "../k8s/components/backup"],
        "namespace": "slipstream",
    }
    page["images"] = [{"name": "slipstream", "newTag": "0.1.0"}]  # as an overlay of one's own has it
    (root / "overlay").mkdir()
    (root / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(page), encoding="utf-8")
    return {(each["kind"], each["metadata"]["name"]): each for each in kustomize(root / "overlay")}


def test_it_adds_monitors_rules_and_dashboards(made: dict[tuple[str, str], Object]) -> None:
    assert {kind for kind, _ in made} >= MONITORS | {"RayService"}
    dashboards = made["ConfigMap", "slipstream-dashboards"]
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert {json.loads(text)["uid"] for text in dashboards["data"].values()} == {b.uid for b in BOARDS.values()}
    assert len(json.dumps(dashboards)) < 1 << 20, "a ConfigMap holds a MiB"
    assert [problem for (kind, _), each in made.items() if kind not in MONITORS for problem in problems(each)] == []


def test_prometheus_may_scrape_and_replicas_may_send_traces(made: dict[tuple[str, str], Object]) -> None:
    policies = [each["spec"] for (kind, _), each in made.items() if kind == "NetworkPolicy"]
    scraped = {
        port["port"]
        for policy in policies
        for rule in policy.get("ingress", ())
        if NAMESPACE in rule.get("from", ())
        for port in rule["ports"]
    }
    assert scraped >= {8000, 8080}
    sent = [
        rule["ports"] for policy in policies for rule in policy.get("egress", ()) if NAMESPACE in rule.get("to", ())
    ]
    assert sent == [[{"port": 4318, "protocol": "TCP"}]]


def test_a_backup_reaches_redis_and_the_bucket(made: dict[tuple[str, str], Object]) -> None:
    pod = made["CronJob", "slipstream-backup"]["spec"]["jobTemplate"]["spec"]["template"]
    mine = pod["metadata"]["labels"]["app.kubernetes.io/component"]
    assert made["NetworkPolicy", "backup"]["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == mine
    ((source,),) = (rule["from"] for rule in made["NetworkPolicy", "redis"]["spec"]["ingress"])
    (allowed,) = source["podSelector"]["matchExpressions"]
    assert mine in allowed["values"]
    ports = {port["port"] for rule in made["NetworkPolicy", "backup"]["spec"]["egress"] for port in rule["ports"]}
    assert ports >= {53, 6379, 443}
    (container,) = pod["spec"]["containers"]
    assert ":" in container["image"], "the overlay's tag, not the latest"
