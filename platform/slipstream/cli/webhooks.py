"""`slipstream webhooks …`."""

from __future__ import annotations

from typing import Annotated

import typer

from slipstream.cli.session import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    TenantOption,
    UrlOption,
    session,
    show_json,
    show_table,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Have addresses told of new and deleted versions and of aliases that move. Needs a key of the role `admin`.",
    rich_markup_mode="markdown",
)


@app.command()
def add(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="https://…, on the public internet.", show_default=False)],
    *,
    events: Annotated[
        list[str] | None,
        typer.Option("--event", help="version.published, version.deleted or alias.moved; several; none = all."),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have an address told. Prints the secret that deliveries are signed with (standardwebhooks.com); it is shown only now.

    Example: slipstream webhooks add https://example.com/hooks --event alias.moved
    """
    made = session(context, url, api_key, tenant).run(lambda client: client.create_webhook(address, events or ()))
    if as_json:
        show_json(made)
        return
    typer.echo(made["secret"])
    typer.echo(f"{made['id']} tells {made['url']} of {', '.join(made['events'])}", err=True)


@app.command("list")
def list_webhooks(
    context: typer.Context,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List webhooks, and how the last delivery to each went.

    Example: slipstream webhooks list
    """
    found = session(context, url, api_key, tenant).run(lambda client: client.list_webhooks())
    if as_json:
        show_json(found)
        return
    rows = []
    for each in found:
        last = each["last_delivery"]
        how = (
            "–"
            if last is None
            else "taken"
            if last["ok"]
            else f"try {last['tries']}: {last['status'] or last['error']}"
        )
        rows.append([each["id"], each["url"], ", ".join(each["events"]), how, last["at"][:19] if last else "–"])
    show_table(
        ["ID", "ADDRESS", "EVENTS", "LAST DELIVERY", "WHEN"], rows, "No webhooks. Add one: slipstream webhooks add URL"
    )


@app.command()
def rm(
    context: typer.Context,
    webhook_id: Annotated[str, typer.Argument(help="Its id, from `webhooks list`.", show_default=False)],
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
) -> None:
    """Tell it nothing more.

    Example: slipstream webhooks rm wh-0123456789abcdef01234567
    """
    session(context, url, api_key, tenant).run(lambda client: client.delete_webhook(webhook_id))
    typer.echo(f"Removed {webhook_id}")
