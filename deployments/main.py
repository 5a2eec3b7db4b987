"""The `slipstream` command: the client's commands, and `serve`, which only this package can offer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deployments import registry_commands
from slipstream.cli import app
from slipstream.cli.train import use_workers
from slipstream.errors import ServerError

if TYPE_CHECKING:
    from slipstream.training.config import TrainingConfig
    from slipstream.training.phase import Fit


def _on_ray(config: TrainingConfig) -> Fit:
    from deployments.train_workers import fit_on_ray  # noqa: PLC0415 - with it come torch and Ray

    return fit_on_ray(config)


use_workers(_on_ray)
app.add_typer(registry_commands.app, name="registry")


@app.command()
def serve(
    port: Annotated[int | None, typer.Option(help="Port to listen on (variable PORT).", min=1, max=65535)] = None,
    home: Annotated[Path | None, typer.Option(help="Data folder (variable SLIPSTREAM_HOME).")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hugging Face id or folder (variable SLIPSTREAM_BASE_MODEL).")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4 base weights (variable SLIPSTREAM_QUANTIZE).")
    ] = None,
) -> None:
    """Serve on this machine: base model, registry, engine and HTTP, until Ctrl-C."""
    # Imported here: `slipstream adapters list` should not wait for them.
    from deployments.serve_local import serve_local  # noqa: PLC0415
    from slipstream.config import load_settings  # noqa: PLC0415

    options = {"port": port, "home": home, "base_model": base_model, "quantize": quantize}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        serve_local(load_settings(**given), Console(file=sys.stdout))
    except ServerError as error:
        typer.echo(f"slipstream serve: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def config(
    *,
    as_serve: Annotated[
        bool,
        typer.Option("--serve", help="Print a Ray Serve config (YAML) that starts what `slipstream serve` would."),
    ] = False,
    rayservice: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Print the kustomize patch (YAML) that gives the KubeRay RayService NAME what the settings say.",
        ),
    ] = None,
) -> None:
    """List every setting: its variable, its name in the configuration file, its default and its meaning.

    Examples: slipstream config --serve > slipstream-serve.yaml; serve run slipstream-serve.yaml

    SLIPSTREAM_CONFIG=slipstream.yaml slipstream config --rayservice slipstream > serve-config.yaml
    """
    from slipstream.config import load_settings, settings_table  # noqa: PLC0415

    if as_serve and rayservice:
        raise typer.BadParameter("Give one of --serve and --rayservice.")
    if not as_serve and rayservice is None:
        typer.echo(settings_table(), nl=False)
        return
    from deployments.app import rayservice_patch, serve_config  # noqa: PLC0415
    from deployments.serve_local import for_this_machine  # noqa: PLC0415

    try:
        settings = load_settings()
        page = rayservice_patch(settings, rayservice) if rayservice else serve_config(for_this_machine(settings))
        typer.echo(page, nl=False)
    except ServerError as error:
        typer.echo(f"slipstream config: {error}", err=True)
        raise typer.Exit(1) from error


def main() -> None:
    """Entry point."""
    app()
