"""The command tree."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import typer

from slipstream.cli import (
    adapters,
    aliases,
    audit,
    capacity,
    evaluate,
    jobs,
    keys,
    status,
    tenants,
    train,
    users,
    webhooks,
)

app = typer.Typer(
    name="slipstream",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="""Serve many tenants' Turbo LoRA adapters on one shared base model.

A first round:

    slipstream adapters push ./my-lora --name sql
    slipstream adapters list
    curl $SLIPSTREAM_URL/v1/completions -H "Authorization: Bearer $SLIPSTREAM_API_KEY" \
      -H 'Content-Type: application/json' -d '{"model": "sql", "prompt": "SELECT", "max_tokens": 32}'

Set SLIPSTREAM_URL and SLIPSTREAM_API_KEY once, and no command needs them as options.

Exit codes: 0 done; 1 refused, the message says what to change; 2 wrong usage; 3 the server failed or is
away.""",
)
app.add_typer(adapters.app, name="adapters")
app.add_typer(aliases.app, name="aliases")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")
app.add_typer(users.app, name="users")
app.add_typer(webhooks.app, name="webhooks")
app.command("evaluate")(evaluate.evaluate)
app.command("status")(status.status)
app.command("capacity")(capacity.capacity)
app.command("usage")(tenants.usage)
app.command("audit")(audit.audit)
train.register(app)


@app.command("version")
def show_version() -> None:
    """Print the installed version."""
    try:
        typer.echo(f"slipstream {version('slipstream')}")
    except PackageNotFoundError:  # run from a checkout that was never installed
        typer.echo("slipstream (not installed)")
