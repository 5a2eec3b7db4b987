"""`slipstream users …`: the people and programs of a tenant."""

from __future__ import annotations

from typing import Annotated

import typer

from adapter_registry.keys import Role
from slipstream.cli.keys import TenantOption
from slipstream.cli.session import DEFAULT_URL, JsonOption, KeyOption, UrlOption, session, show_json, show_table

app = typer.Typer(
    no_args_is_help=True,
    help="People and programs of a tenant, to whom keys belong. Needs the admin key; with a key of the role `admin`, for its "
    "own tenant.",
    rich_markup_mode="markdown",
)
UserArgument = Annotated[str, typer.Argument(help="A name or an e-mail address.", show_default=False)]


@app.command("set")
def set_user(
    context: typer.Context,
    user: UserArgument,
    *,
    role: Annotated[Role, typer.Option("--role", help="What its keys may at most.")] = Role.PUBLISHER,
    tenant: TenantOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
) -> None:
    """Make a user, or change what its keys may: those that may more are lowered.

    Example: slipstream users set ann@example.com --role publisher --tenant acme
    """
    made = session(context, url, api_key).run(lambda client: client.put_user(user, role, tenant))
    typer.echo(f"{made['name']} is {made['role']} of {made['tenant']}")


@app.command("list")
def list_users(
    context: typer.Context,
    *,
    tenant: TenantOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """List a tenant's users.

    Example: slipstream users list --tenant acme
    """
    found = session(context, url, api_key).run(lambda client: client.list_users(tenant))
    if as_json:
        show_json(found)
        return
    rows = [[user["name"], user["role"], user["created_at"][:10]] for user in found]
    show_table(["USER", "ROLE", "SINCE"], rows, f"{tenant or 'This tenant'} has no users: its keys belong to nobody.")


@app.command()
def rm(
    context: typer.Context,
    user: UserArgument,
    *,
    tenant: TenantOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
) -> None:
    """Remove a user and revoke all its keys.

    Example: slipstream users rm ann@example.com --tenant acme
    """
    gone = session(context, url, api_key).run(lambda client: client.delete_user(user, tenant))
    typer.echo(f"Removed {user} and revoked {len(gone['keys'])} keys")
