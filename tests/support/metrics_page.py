"""Reading `/metrics`, and asking dashboards' questions of a Prometheus."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from support.prometheus import ROOT, Prometheus

GRAFANA = ROOT / "k8s" / "monitoring" / "grafana"
Series = tuple[str, frozenset[tuple[str, str]]]
_PARTS = re.compile(r"_(bucket|sum|count)$")
_WINDOW = "60s"  # what Grafana would put for `$__rate_interval`, of all that the test did


def scrape(url: str, key: str | None) -> dict[Series, float]:
    """All series of a page, whose samples must all be different."""
    headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
    answer = httpx.get(f"{url}/metrics", headers=headers, timeout=30, trust_env=False)
    assert answer.status_code == httpx.codes.OK, answer.text
    return parse(answer.text)


def parse(text: str) -> dict[Series, float]:
    """All series of a page; each but once, and each family but once."""
    found: dict[Series, float] = {}
    names: set[str] = set()
    for family in text_string_to_metric_families(text):
        assert family.name not in names, f"{family.name} comes twice"
        names.add(family.name)
        for sample in family.samples:
            series = (sample.name, frozenset(sample.labels.items()))
            assert series not in found, f"{series} comes twice"
            found[series] = sample.value
    return found


def of(page: Mapping[Series, float], name: str) -> Iterator[tuple[dict[str, str], float]]:
    """Labels and values of a metric's series."""
    for (each, labels), value in page.items():
        if each == name:
            yield dict(labels), value


def total(page: Mapping[Series, float], name: str, **labels: str) -> float:
    """The sum of a metric's series with these labels."""
    return sum(value for found, value in of(page, name) if labels.items() <= found.items())


def is_counter(series: Series) -> bool:
    """Whether it only ever grows, process for process."""
    return series[0].endswith(("_total", "_bucket", "_count"))


def families(names: Iterable[str]) -> set[str]:
    """Metrics by their names in the catalogue."""
    return {_PARTS.sub("", name) for name in names}


def dashboard_queries() -> Iterator[tuple[str, str, str]]:
    """Dashboard, panel and query, variables filled in, of all dashboards; queries of variables among them."""
    for path in sorted(GRAFANA.glob("*.json")):
        board = json.loads(path.read_text(encoding="utf-8"))
        values = {v["name"]: ".*" for v in board["templating"]["list"]} | {"__rate_interval": _WINDOW}
        for variable in board["templating"]["list"]:
            if variable["type"] == "query":
                found = re.fullmatch(r"label_values\((.*), \w+\)", variable["query"])
                assert found, variable
                yield path.stem, f"${variable['name']}", _filled(found[1], values)
        for panel in _panels(board["panels"]):
            for target in panel.get("targets", ()):
                yield path.stem, panel["title"], _filled(target["expr"], values)


def _panels(panels: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for panel in panels:
        yield panel
        yield from _panels(panel.get("panels", ()))


def _filled(query: str, values: Mapping[str, str]) -> str:
    filled = re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], query)
    assert "$" not in filled, query
    return filled


def queries_without_data(prometheus: Prometheus) -> list[tuple[str, str, str]]:
    """Those that give no series, or none with a number in it."""
    return [each for each in dashboard_queries() if not _has_number(prometheus, each[2])]


def _has_number(prometheus: Prometheus, query: str) -> bool:
    return any(not math.isnan(float(series["value"][1])) for series in prometheus.query(query))


def names_of(path: Path) -> set[str]:
    """Metrics of ours that a file's expressions name, recorded ones aside."""
    return families(re.findall(r"\bslipstream_\w+", path.read_text(encoding="utf-8")))
