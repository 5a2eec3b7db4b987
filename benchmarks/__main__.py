"""`python -m benchmarks COMMAND` (`--help` lists them): see README.md for what each measures."""

from __future__ import annotations

import typer

from benchmarks import (
    ablations,
    adapters,
    backups,
    drafts,
    engine,
    gpu,
    http,
    lossless,
    prompts,
    quantized,
    ranks,
    registry,
    replay,
    steps,
    sweep,
    training,
)
from benchmarks.simulation import routing, scaling

app = typer.Typer(help="Side-by-side measurements. Every figure in benchmarks/README.md names its command.")
app.command("engine")(engine.main)
app.command("sweep")(sweep.main)
app.command("steps")(steps.main)
app.command("quantized")(quantized.main)
app.command("prompts")(prompts.main)
app.command("adapters")(adapters.main)
app.command("gpu")(gpu.main)
app.command("http")(http.main)
app.command("replay")(replay.main)
app.command("ranks")(ranks.main)
app.command("registry")(registry.main)
app.command("backups")(backups.main)
app.command("routing")(routing.compare)
app.command("routing-cost")(routing.cost)
app.command("scaling")(scaling.compare)
app.command("lossless")(lossless.main)
app.command("drafts")(drafts.main)
app.command("training")(training.main)
app.command("streams")(ablations.streams)
app.command("gates")(ablations.gates)

if __name__ == "__main__":
    app()
