"""Makes the Grafana dashboards of `k8s/monitoring/grafana`: `make dashboards`. A test compares them with what lies there.

Grafana's own builders check the shape of every panel; queries are checked against a real Prometheus.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    VariableHide,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from support.boards import MODEL, OVERVIEW, TENANTS, Board, Number, Plot, Rows
from support.replica_boards import ADAPTERS, REPLICAS

FOLDER = Path(__file__).resolve().parents[2] / "k8s" / "monitoring" / "grafana"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
PLOT_HEIGHT, STAT_HEIGHT = 8, 4
BOARDS = {"overview": OVERVIEW, "adapter": ADAPTERS, "tenant": TENANTS, "replica": REPLICAS}


def build(board: Board) -> str:
    """A dashboard's JSON."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.text)
        .tags(["slipstream"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .link(
            dashboard.DashboardLink("Slipstream")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["slipstream"])
            .as_dropdown(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for name, metric in board.variables.items():
        made = made.with_variable(_variable(name, metric, board))
    numbers = count(1)
    for row in board.rows:
        made = made.with_row(dashboard.Row(row.title).id(next(numbers)))
        for panel in row.panels:
            made = made.with_panel(_panel(panel).id(next(numbers)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _variable(name: str, metric: str, board: Board) -> dashboard.QueryVariable:
    where = "{" + MODEL + "}" if name != "model" and "model" in board.variables else ""
    everything = VariableOption(selected=True, text="All", value="$__all")
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .query(f"label_values({metric}{where}, {name})")
        .datasource(SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .hide(VariableHide.DONT_HIDE)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def _panel(panel: Plot | Number | Rows) -> timeseries.Panel | stat.Panel | table.Panel:
    if isinstance(panel, Number):
        return (
            stat.Panel()
            .title(panel.title)
            .description(panel.text)
            .datasource(SOURCE)
            .unit(panel.unit)
            .height(STAT_HEIGHT)
            .span(4)
            .with_target(prometheus.Dataquery().expr(panel.query).instant())
        )
    if isinstance(panel, Rows):
        return (
            table.Panel()
            .title(panel.title)
            .description(panel.text)
            .datasource(SOURCE)
            .height(PLOT_HEIGHT)
            .span(8)
            .with_target(prometheus.Dataquery().expr(panel.query).instant().format(PromQueryFormat.TABLE))
        )
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .unit(panel.unit)
        .min(0)
        .height(PLOT_HEIGHT)
        .span(8)
        .fill_opacity(20 if panel.stacked else 5)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for number, (query, legend) in enumerate(panel.queries):
        made = made.with_target(
            prometheus.Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + number)).range()
        )
    return made


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, board in BOARDS.items():
        (FOLDER / f"{name}.json").write_text(build(board), encoding="utf-8")


if __name__ == "__main__":
    main()
