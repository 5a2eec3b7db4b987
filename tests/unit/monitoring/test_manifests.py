"""The monitoring component: made by kubectl's kustomize, and as far as that can be checked without the operator's schemas."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from support.boards import Number, Plot, Rows
from support.dashboards import BOARDS, build
from support.metrics_page import GRAFANA
from support.processes import eventually
from support.prometheus import ROOT, needs_prometheus, running_prometheus

MONITORING = ROOT / "k8s" / "monitoring"


def documents(name: str) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all((MONITORING / name).read_text(encoding="utf-8")) if each]


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_dashboards_are_what_the_builder_makes(name: str) -> None:
    assert (GRAFANA / f"{name}.json").read_text(encoding="utf-8") == build(BOARDS[name]), "run `make dashboards`"


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_panels_do_not_overlap_and_leave_the_data_source_open(name: str) -> None:
    board = json.loads((GRAFANA / f"{name}.json").read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    kinds = {Plot: "timeseries", Number: "stat", Rows: "table"}
    expected = [kinds[type(panel)] for row in BOARDS[name].rows for panel in row.panels]
    assert [panel["type"] for panel in board["panels"] if panel["type"] != "row"] == expected


def test_uids_and_titles_are_different() -> None:
    assert (
        len({board.uid for board in BOARDS.values()}) == len({board.title for board in BOARDS.values()}) == len(BOARDS)
    )


def test_monitors_find_what_kuberay_makes() -> None:
    service, pods = documents("monitors.yaml")
    built = list(yaml.safe_load_all((ROOT / "tests/k8s/snapshots/local.yaml").read_text()))
    (ray,) = [each for each in built if each["kind"] == "RayService"]
    selector = service["spec"]["selector"]
    assert selector["matchLabels"]["ray.io/originated-from-cr-name"] == ray["metadata"]["name"]
    (endpoint,) = service["spec"]["endpoints"]
    groups = [ray["spec"]["rayClusterConfig"]["headGroupSpec"], *ray["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
    for group in groups:
        labels = group["template"]["metadata"]["labels"]
        assert pods["spec"]["selector"]["matchLabels"].items() <= labels.items()
        ports = [port["name"] for container in group["template"]["spec"]["containers"] for port in container["ports"]]
        assert endpoint["port"] in ports
    (container,) = groups[0]["template"]["spec"]["containers"]
    (read,) = [each for each in container["env"] if each["name"] == "SLIPSTREAM_METRICS_KEY"]
    key = endpoint["authorization"]["credentials"]
    assert key.items() <= read["valueFrom"]["secretKeyRef"].items()


@needs_prometheus
def test_however_many_pods_there_are_the_service_is_one_target() -> None:
    """The pods behind the Service, as the operator has Prometheus find them, and the monitor's own relabelling after its."""
    service, _ = documents("monitors.yaml")
    own = [_relabelling(each) for each in service["spec"]["endpoints"][0]["relabelings"]]
    operators = [
        {"source_labels": [f"__meta_kubernetes_{source}"], "target_label": target}
        for source, target in (("namespace", "namespace"), ("service_name", "service"), ("pod_name", "pod"))
    ] + [{"target_label": "endpoint", "replacement": "serve"}]
    pods = [
        {
            "targets": [f"10.0.0.{number}:8000"],
            "labels": {
                "__meta_kubernetes_namespace": "slipstream",
                "__meta_kubernetes_service_name": "slipstream-serve-svc",
                "__meta_kubernetes_pod_name": f"worker-{number}",
            },
        }
        for number in range(3)
    ]
    scrape = {"static_configs": pods, "scrape_interval": "1h"}
    plain = {**scrape, "job_name": "plain", "relabel_configs": operators}
    ours = {**scrape, "job_name": "slipstream", "relabel_configs": operators + own}
    with running_prometheus(plain, ours, rules=False) as prometheus:
        assert eventually(lambda: len(prometheus.active_targets()) >= 4)
        found = prometheus.active_targets()
    (target,) = [each for each in found if each["scrapePool"] == "slipstream"]
    assert len(found) == 3 + 1
    assert target["scrapeUrl"] == "http://slipstream-serve-svc.slipstream.svc:8000/metrics"
    assert target["labels"] == {
        "instance": "slipstream", "job": "slipstream", "namespace": "slipstream", "service": "slipstream-serve-svc",
    }  # fmt: skip


def _relabelling(rule: dict[str, Any]) -> dict[str, Any]:
    names = {"sourceLabels": "source_labels", "targetLabel": "target_label"}
    return {names.get(name, name): value for name, value in rule.items()}
