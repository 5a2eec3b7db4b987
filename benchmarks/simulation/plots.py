"""Pictures of simulations, in `benchmarks/results/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from benchmarks.results import FOLDER


def bars(name: str, panels: Mapping[str, Mapping[str, float]]) -> None:
    """One panel a figure, one bar a system."""
    count = max(map(len, panels.values()))
    figure = Figure(figsize=(5 * len(panels), 0.8 + 0.3 * count), layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.bar_label(axes.barh(list(values), list(values.values())), fmt="%.3g", padding=3, fontsize=8)
        axes.set_title(title, fontsize=10)
    axes.invert_yaxis()
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)


def lines(name: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, up: str) -> None:
    """Curves over time; the first one is drawn as an area."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for i, (label, (xs, ys)) in enumerate(curves.items()):
        if i == 0:
            axes.fill_between(xs, ys, alpha=0.25, label=label)
        else:
            axes.step(xs, ys, where="post", label=label, linewidth=1.2)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.legend(fontsize=8)
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=110)
