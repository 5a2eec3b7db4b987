"""The Helm chart renders what the overlays build to, and refuses values that it does not know."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.kube_schemas import problems
from support.kube_tools import helm, run
from support.manifests import (
    CHART,
    EVERYTHING,
    OVERLAYS,
    comparable,
    folder,
    kustomize,
    objects,
    pods,
    rayservice,
    template,
    values,
)

ALL = (*OVERLAYS, EVERYTHING.name)


@pytest.mark.parametrize("overlay", ALL)
def test_it_renders_the_overlay_object_by_object(overlay: str) -> None:
    built, rendered = comparable(kustomize(folder(overlay))), comparable(template(*values(overlay)))
    assert set(rendered) == set(built)
    for name, entry in built.items():
        assert rendered[name] == entry


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("templates/_helpers.tpl", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
        ("templates/networkpolicies.yaml", 'slipstream-client: "true"', 'slipstream-client: "yes"'),
        ("templates/redis.yaml", "appendonly yes", "appendonly no"),
        ("overlays/local.yaml", "max_replicas: 2", "max_replicas: 3"),
    ],
)
def test_a_chart_that_says_something_else_is_found(file: str, old: str, new: str, tmp_path: Path) -> None:
    chart = tmp_path / "slipstream"
    shutil.copytree(CHART, chart)
    text = (chart / file).read_text(encoding="utf-8")
    assert old in text
    (chart / file).write_text(text.replace(old, new), encoding="utf-8")
    rendered = comparable(template(f"--values={chart}/overlays/local.yaml", chart=chart))
    built = comparable(kustomize(folder("local")))
    assert [name for name in built if rendered[name] != built[name]]


BUCKET = "--set=settings.blob_url=s3://adapters"


def test_adapters_need_a_place_that_all_pods_share() -> None:
    done = run(helm(), "template", "slipstream", CHART, check=False)
    assert done.returncode
    assert "settings.blob_url" in done.stderr


def test_its_own_values_render_what_fits_the_schemas() -> None:
    found = template(BUCKET)
    assert len(found) > 10
    for entry in [*found, *pods(rayservice(found))]:
        assert problems(entry) == []


def test_two_releases_do_not_meet() -> None:
    """Names follow the release; policies, of which each namespace has one set, do not."""
    found = objects(run(helm(), "template", "other", CHART, "--namespace=elsewhere", BUCKET).stdout)
    assert {entry["metadata"]["namespace"] for entry in found} == {"elsewhere"}
    named = {entry["metadata"]["name"] for entry in found if entry["kind"] != "NetworkPolicy"}
    assert named == {"other", "other-head", "other-worker", "other-redis"}
    cluster = rayservice(found)["spec"]["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"] == "redis://other-redis:6379"


@pytest.mark.parametrize("overlay", ALL)
def test_helm_lints_it(overlay: str) -> None:
    run(helm(), "lint", "--strict", CHART, *values(overlay))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("imagee.tag=1", "imagee"),
        ("image.tag=latest", "tag"),
        ("redis.image=redis:latest", "image"),
        ("redis.enable=true", "enable"),
        ("settings.drain=1", "drain"),
        ("settings.drain_s=-1", "drain_s"),
        ("settings.redis_url=redis://in-plain-sight", "redis_url"),
        ("settings.models[0].max_replica=2", "max_replica"),
        ("settings.models[0].dtype=bf16", "dtype"),
        ("workerGroups[0].gpu=1", "gpu"),
        ("workerGroups[0].memory=8 GB", "memory"),
        ("upgrade.type=Rolling", "type"),
        ("podDisruptionBudgets.workers=50%", "workers"),
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong: str, named: str) -> None:
    done = run(helm(), "template", "slipstream", CHART, f"--set={wrong}", check=False)
    assert done.returncode
    assert named in done.stderr.split("\n- ")[-1]


def test_without_a_redis_its_address_is_asked_for() -> None:
    done = run(helm(), "template", "slipstream", CHART, "--set=redis.enabled=false", BUCKET, check=False)
    assert done.returncode
    assert "gcs.redisAddress" in done.stderr
