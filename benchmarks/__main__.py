"""`python -m benchmarks engine|sweep|http|lossless|drafts|training|streams|gates`: see README.md for what each measures."""

from __future__ import annotations

import typer

from benchmarks import ablations, drafts, engine, http, lossless, sweep, training

app = typer.Typer(help="Side-by-side measurements. Every figure in benchmarks/README.md names its command.")
app.command("engine")(engine.main)
app.command("sweep")(sweep.main)
app.command("http")(http.main)
app.command("lossless")(lossless.main)
app.command("drafts")(drafts.main)
app.command("training")(training.main)
app.command("streams")(ablations.streams)
app.command("gates")(ablations.gates)

if __name__ == "__main__":
    app()
