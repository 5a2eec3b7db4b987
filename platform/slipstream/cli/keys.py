"""`slipstream keys …`: for the admin."""

from __future__ import annotations

from typing import Annotated

import typer

from slipstream.cli.session import DEFAULT_URL, JsonOption, KeyOption, UrlOption, session, show_json, show_table

app = typer.Typer(
    no_args_is_help=True, help="Give tenants their keys. Needs the admin key.", rich_markup_mode="markdown"
)
TenantOption = Annotated[str, typer.Option("--tenant", help="Whose key.", show_default=False)]


@app.command()
def create(
    context: typer.Context,
    *,
    tenant: TenantOption,
    label: Annotated[str, typer.Option("--label", help="What it is for.")] = "",
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key for a tenant. The secret is shown once: only its hash is kept.

    Example: slipstream keys create --tenant acme --label ci
    """
    key = session(context, url, api_key).run(lambda client: client.create_key(tenant, label))
    if as_json:
        show_json(key)
        return
    typer.echo(f"Key {key['id']} for {key['tenant']}. It is shown this once; keep it safe:", err=True)
    typer.echo(key["secret"])  # alone on stdout, for $(…)


@app.command("list")
def list_keys(
    context: typer.Context,
    *,
    tenant: TenantOption,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """List a tenant's keys, without their secrets.

    Example: slipstream keys list --tenant acme
    """
    found = session(context, url, api_key).run(lambda client: client.list_keys(tenant))
    if as_json:
        show_json(found)
        return
    rows = [[key["id"], key["prefix"] + "…", key["created_at"][:19], key["label"]] for key in found]
    show_table(["ID", "KEY", "CREATED", "LABEL"], rows, f"{tenant} has no keys.")


@app.command()
def revoke(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(help="The key's id, from `keys list`.", show_default=False)],
    *,
    tenant: TenantOption,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
) -> None:
    """Take a key back. Gateways that know it forget it within seconds.

    Example: slipstream keys revoke key_0123456789abcdef --tenant acme
    """
    session(context, url, api_key).run(lambda client: client.revoke_key(tenant, key_id))
    typer.echo(f"Revoked {key_id}")
