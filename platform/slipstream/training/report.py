"""What travels with a version: the learning curve as a picture, the log, and a card that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from slipstream.evaluation.result import Evaluation
from slipstream.training.config import TrainingConfig
from slipstream.training.gate import Gate

CARD, PICTURE, LOG = "training_card.md", "learning_curve.png", "training_log.jsonl"
LOG_STEPS = 100
_LOCAL = {"data", "valid", "output", "adapter", "lora_reference", "base", "resume", "threads", "device", "report_to"}


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the card tells."""

    config: TrainingConfig
    base_id: str
    prompt_format: str
    data: Mapping[str, tuple[str, str, int]]  # what for → file name, sha256, rows
    steps: int
    tokens: int
    seconds: float
    history: Sequence[Mapping[str, float]]
    metrics: Mapping[str, float]
    evaluation: Evaluation | None
    gate: Gate
    lora: str  # how the LoRA compares with a plain one
    notes: Sequence[str] = field(default_factory=tuple)


def write_report(report: Report, folder: Path) -> None:
    """Write card, picture and log into an adapter folder."""
    lines = [json.dumps({k: _short(v) for k, v in sorted(row.items())}) for row in thinned(report.history)]
    (folder / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_curves(report.history, report.config.streams if report.config.method.trains_streams else 0, folder / PICTURE)
    (folder / CARD).write_text(card(report), encoding="utf-8")


def thinned(history: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """About `LOG_STEPS` of the steps, and every evaluation: the log travels with every version. `events.jsonl` has all."""
    steps = [i for i, row in enumerate(history) if "loss" in row]
    every = max(1, -(-len(steps) // LOG_STEPS))
    left_out = set(steps) - set(steps[::every]) - set(steps[-1:])
    return [row for i, row in enumerate(history) if i not in left_out]


def draw_curves(history: Sequence[Mapping[str, float]], streams: int, path: Path) -> None:
    """Loss of the LoRA on the left, top-1 of each stream and tokens per step on the right; dots are evaluations."""
    figure = Figure(figsize=(10, 3.6), layout=ConstrainedLayoutEngine())
    left, right = figure.subplots(1, 2)
    _curve(left, history, "lora_loss", "loss of the next token", "#5b8def")
    left.set_title("Language model loss", fontsize=10)
    left.set_yscale("log")
    shades = [f"C{k}" for k in range(8)]
    for k in range(streams):
        _curve(right, history, f"turbo_{k}_top1", f"stream {k} (token +{k + 2})", shades[k])
    right.set_title("Share of right drafts, by stream" if streams else "No speculator", fontsize=10)
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("optimiser step", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=90)


def _curve(axes: object, history: Sequence[Mapping[str, float]], key: str, label: str, colour: str) -> None:
    for prefix in ("", "eval_"):
        points = [(row["step"], row[prefix + key]) for row in history if prefix + key in row]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        if prefix:
            axes.plot(steps, values, "o", color=colour, markersize=5)  # type: ignore[attr-defined]
        else:
            axes.plot(steps, _smoothed(values), "-", color=colour, label=label, linewidth=1.2)  # type: ignore[attr-defined]


def _short(value: float) -> float:
    """Four digits, for the log travels with every version; steps stay whole."""
    return int(value) if float(value).is_integer() else float(f"{value:.4g}")


def _smoothed(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """An exponential average that starts at the first value."""
    found = [values[0]]
    for value in values[1:]:
        found.append(weight * found[-1] + (1 - weight) * value)
    return found


def card(report: Report) -> str:
    """Markdown."""
    config = report.config
    parts = [
        f"# {config.name or 'Adapter'}: {config.method}",
        f"Base model `{report.base_id}`, prompt format **{report.prompt_format}**, made {datetime.now(UTC):%Y-%m-%d}: "
        f"{report.steps} optimiser steps, {report.tokens} tokens, {report.seconds / 60:.1f} minutes.",
        f"Speculation **{'on' if report.gate.speculation else 'off'}**. {report.gate.reason}".rstrip(),
        *([f"LoRA: {report.lora}"] if report.lora else []),
        *(f"Note: {note}" for note in report.notes),
        _table(["data", "file", "rows", "sha256"], [[k, f, str(n), f"`{h}`"] for k, (f, h, n) in report.data.items()]),
    ]
    if report.evaluation is not None:
        parts += ["## Answers to held-out rows (greedy)", _evaluation_table(report.evaluation)]
    if report.metrics:
        parts += ["## Last evaluation (teacher-forced)", _metrics_table(report.metrics)]
    parts += [f"![learning curve]({PICTURE})", "## Configuration"]
    chosen = {k: v for k, v in config.model_dump(mode="json").items() if k not in _LOCAL}
    parts.append("```json\n" + json.dumps(chosen, indent=2) + "\n```")
    return "\n\n".join(parts) + "\n"


def _evaluation_table(evaluation: Evaluation) -> str:
    rows = [
        [
            name,
            f"{r.exact_match:.1%}",
            f"{r.rouge_l:.3f}",
            f"{r.tokens_per_step:.2f}",
            " ".join(f"{a:.2f}" for a in r.acceptance) or "-",
            f"{r.tokens_per_second:.0f}",
            str(r.rows),
        ]
        for name, r in evaluation.variants.items()
    ]
    return _table(["variant", "exact match", "ROUGE-L", "tokens/step", "acceptance", "tokens/s", "rows"], rows)


def _metrics_table(metrics: Mapping[str, float]) -> str:
    return _table(["metric", "value"], [[f"`{k}`", f"{v:.4f}"] for k, v in sorted(metrics.items()) if k != "epoch"])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
