"""Every run of a benchmark as JSON, as Markdown and as a picture, in `benchmarks/results/`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.report import Series, ratio, table

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass
class Results:
    """Output tokens/s of several systems at several numbers of requests at once, round by round."""

    name: str
    title: str
    counts: Sequence[int]
    speed: dict[tuple[str, int], Series] = field(default_factory=dict)
    tokens_per_step: dict[tuple[str, int], float] = field(default_factory=dict)

    def add(self, system: str, count: int, tokens_per_s: float, tokens_per_step: float) -> None:
        """One run."""
        self.speed.setdefault((system, count), Series()).values.append(tokens_per_s)
        self.tokens_per_step[system, count] = tokens_per_step

    @property
    def systems(self) -> list[str]:
        """In the order of their first run."""
        return list(dict.fromkeys(system for system, _ in self.speed))

    def markdown(self, pairs: Sequence[tuple[str, str]]) -> str:
        """Figures, tokens per step, and ratios of the pairs."""
        heads = [f"{n} at once" for n in self.counts]
        rows = [[s, *(str(self.speed[s, n]) for n in self.counts)] for s in self.systems]
        text = [f"{self.title}\n", table(["output tokens/s, median (min–max)", *heads], rows)]
        found = [(a, b) for a, b in pairs if a in self.systems and b in self.systems]
        rows = [[f"{a} / {b}", *(ratio(self.speed[a, n], self.speed[b, n]) for n in self.counts)] for a, b in found]
        text += ["", table(["ratio, round by round", *heads], rows)]
        rows = [[s, *(f"{self.tokens_per_step[s, n]:.2f}" for n in self.counts)] for s in self.systems]
        rows = [row for row in rows if set(row[1:]) != {"1.00"}]
        return "\n".join([*text, "", table(["tokens per step", *heads], rows), ""])

    def write(self, pairs: Sequence[tuple[str, str]], settings: Mapping[str, object]) -> str:
        """All three files; returns the Markdown."""
        FOLDER.mkdir(exist_ok=True)
        machine = {"processor": torch.backends.cpu.get_cpu_capability(), "python": platform.python_version()}
        record = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": {**machine, "torch": torch.__version__, "threads": torch.get_num_threads()},
            "settings": dict(settings),
            "runs": [
                {"system": s, "at_once": n, "tokens_per_s": [round(v, 2) for v in series.values],
                 "tokens_per_step": round(self.tokens_per_step[s, n], 3)}
                for (s, n), series in self.speed.items()
            ],
        }  # fmt: skip
        text = self.markdown(pairs)
        (FOLDER / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (FOLDER / f"{self.name}.md").write_text(text, encoding="utf-8")
        self._draw(FOLDER / f"{self.name}.png")
        return text

    def _draw(self, path: Path) -> None:
        import matplotlib as mpl  # noqa: PLC0415  # machines that only measure may do without
        from matplotlib.figure import Figure  # noqa: PLC0415

        figure = Figure(figsize=(9, 0.7 + 0.28 * len(self.systems) * len(self.counts)), layout="constrained")
        axes = figure.subplots()
        colours = mpl.colormaps["tab20"]
        step = len(self.systems) + 1
        for i, system in enumerate(self.systems):
            places = [c * step + i for c in range(len(self.counts))]
            medians = [self.speed[system, n].median for n in self.counts]
            bars = axes.barh(places, medians, color=colours(i % 20), label=system)
            axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
        axes.set_yticks(
            [c * step + (step - 2) / 2 for c in range(len(self.counts))], [f"{n} at once" for n in self.counts]
        )
        axes.invert_yaxis()
        axes.set_xlabel("output tokens/s")
        axes.set_title(self.title, fontsize=10)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=110)
