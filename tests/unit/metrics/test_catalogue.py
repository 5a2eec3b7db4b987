"""Names as Prometheus has them, and the documentation's table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from slipstream.metrics.catalogue import SPECS, Kind, Spec, metrics_table

ROOT = Path(__file__).resolve().parents[3]
UNITS = ("_seconds", "_ratio", "_bytes")
WRONG = re.compile(r"_(ms|milliseconds|percent|kb|mb|min)(_|$)")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_names_follow_the_conventions(spec: Spec) -> None:
    assert re.fullmatch(r"slipstream_[a-z][a-z_]*[a-z]", spec.name)
    assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER)
    assert not WRONG.search(spec.name)
    if spec.kind is Kind.HISTOGRAM:
        assert spec.name.endswith((*UNITS, "_sequences")), "a histogram's name ends with its unit"
        assert list(spec.buckets) == sorted(set(spec.buckets))
        assert len(spec.buckets) <= 16
    assert not {"le", "job", "instance", "namespace", "pod"} & set(spec.all_labels)


def test_names_are_different() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)


def test_the_documentation_has_this_table() -> None:
    page = (ROOT / "docs" / "operations" / "metrics.md").read_text(encoding="utf-8")
    assert metrics_table() in page, (
        "write it anew: python -c 'from slipstream.metrics.catalogue import *; print(metrics_table())'"
    )
