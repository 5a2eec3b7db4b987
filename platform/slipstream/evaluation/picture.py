"""The comparison as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from slipstream.errors import InvalidRequest
from slipstream.evaluation.result import Evaluation

COLOURS = {"base": "#9aa0a6", "lora": "#5b8def"}
FAST_COLOUR = "#e8743b"  # whatever speculates
FORMATS = (".png", ".svg", ".pdf")


def check_picture(path: Path) -> None:
    """Raise `InvalidRequest` when a picture cannot be written there, before anything is computed."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidRequest(f"{path} does not end in {', '.join(FORMATS)}: give such a file name.", param="picture")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"The folder of {path} does not exist. Make it first.", param="picture")


def draw(evaluation: Evaluation, path: Path, title: str) -> None:
    """Write exact match, tokens/s, tokens per step and acceptance by position. Raises `InvalidRequest` if it cannot."""
    names = list(evaluation.variants)
    results = list(evaluation.variants.values())
    figure = Figure(figsize=(12.5, 3.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    match, speed, steps, acceptance = figure.subplots(1, 4, width_ratios=(1, 1, 1, 1.2))
    _bars(match, names, [100 * r.exact_match for r in results], "{:.1f}", "Exact match (%)")
    _bars(speed, names, [r.tokens_per_second for r in results], "{:.0f}", "Output tokens per second")
    _bars(steps, names, [r.tokens_per_step for r in results], "{:.2f}", "Tokens per engine step")
    _acceptance(acceptance, evaluation)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}.", param="picture") from error


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], text: str, title: str) -> None:
    colours = [COLOURS.get(name, FAST_COLOUR) for name in names]
    bars = axes.bar(names, values, color=colours, width=0.65)
    axes.bar_label(bars, [text.format(value) for value in values], padding=2, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.set_ylim(0, max(1e-9, *values) * 1.15)
    axes.set_yticks([])  # each bar carries its number
    _plain(axes, left=False)


def _acceptance(axes: Any, evaluation: Evaluation) -> None:
    axes.set_title("Draft right when all before it were (%)", fontsize=10)
    drafting = [r.acceptance for r in evaluation.variants.values() if r.acceptance]
    if not drafting:
        axes.text(0.5, 0.5, "no speculator", ha="center", va="center", color="#5f6368", transform=axes.transAxes)
        axes.set_xticks([])
        axes.set_yticks([])
    for shares in drafting:
        places = list(range(1, len(shares) + 1))
        axes.plot(places, [100 * share for share in shares], "o-", color=FAST_COLOUR)
        for place, share in zip(places, shares, strict=True):
            axes.annotate(f"{100 * share:.0f}", (place, 100 * share), (0, 7), textcoords="offset points", ha="center")
        axes.set_xticks(places)
        axes.set_xlim(0.5, len(shares) + 0.5)
        axes.set_xlabel("draft position", fontsize=9)
        axes.set_ylim(0, 112)
        axes.set_yticks([0, 50, 100])
    _plain(axes, left=bool(drafting))


def _plain(axes: Any, *, left: bool) -> None:
    for side in ("top", "right", *(() if left else ("left",))):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)
