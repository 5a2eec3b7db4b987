"""`slipstream keys …`: for the platform's admin, and for tenants' admins."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapter_registry.keys import Role
from slipstream.cli.session import DEFAULT_URL, JsonOption, KeyOption, UrlOption, session, show_json, show_table

app = typer.Typer(
    no_args_is_help=True,
    help="Give tenants their keys. Needs the admin key; with a key of the role `admin`, for its own tenant.",
    rich_markup_mode="markdown",
)
TenantOption = Annotated[
    str | None, typer.Option("--tenant", help="Whose key; a tenant's admin may leave it out.", show_default=False)
]
IdArgument = Annotated[str, typer.Argument(help="The key's id, from `keys list`.", show_default=False)]


@app.command()
def create(
    context: typer.Context,
    *,
    tenant: TenantOption = None,
    label: Annotated[str, typer.Option("--label", help="What it is for.")] = "",
    role: Annotated[
        Role,
        typer.Option("--role", help="caller: call models; publisher: adapters and training, too; admin: keys, too."),
    ] = Role.PUBLISHER,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="A model or adapter that it may call; several; none = all.")
    ] = None,
    expires_at: Annotated[
        str | None, typer.Option("--expires-at", help="When it ends, as 2027-01-31T00:00:00Z.", show_default=False)
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", help="Whose it is, from `users list`.", show_default=False)
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key for a tenant. The secret is shown once: only its hash is kept.

    Example: slipstream keys create --tenant acme --label app --role caller --model sql
    """
    wanted = session(context, url, api_key)
    _show(wanted.run(lambda client: client.create_key(tenant, label, role, models or (), expires_at, user)), as_json)


@app.command()
def rotate(
    context: typer.Context,
    key_id: IdArgument,
    *,
    tenant: TenantOption = None,
    grace_s: Annotated[int, typer.Option("--grace-s", help="Seconds that the old key goes on working.")] = 3600,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Replace a key by a new one that may the same; the old one goes on for a while.

    Example: slipstream keys rotate key_0123456789abcdef --tenant acme --grace-s 86400
    """
    _show(session(context, url, api_key).run(lambda client: client.rotate_key(key_id, tenant, grace_s)), as_json)


@app.command("list")
def list_keys(
    context: typer.Context,
    *,
    tenant: TenantOption = None,
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
    rows = [
        [
            key["id"], key["prefix"] + "…", key["role"], ", ".join(key["models"] or ["all"]), _minute(key["created_at"]),
            _minute(key["last_used_at"]), _minute(key["expires_at"]), key["user"] or "–", key["label"],
        ]
        for key in found
    ]  # fmt: skip
    heads = ["ID", "KEY", "ROLE", "MODELS", "CREATED", "LAST USED", "EXPIRES", "USER", "LABEL"]
    show_table(heads, rows, f"{tenant or 'This tenant'} has no keys.")


@app.command()
def revoke(
    context: typer.Context,
    key_id: IdArgument,
    *,
    tenant: TenantOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
) -> None:
    """Take a key back. Gateways that know it forget it within seconds.

    Example: slipstream keys revoke key_0123456789abcdef --tenant acme
    """
    session(context, url, api_key).run(lambda client: client.revoke_key(tenant, key_id))
    typer.echo(f"Revoked {key_id}")


def _show(key: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(key)
        return
    typer.echo(f"Key {key['id']} for {key['tenant']}. It is shown this once; keep it safe:", err=True)
    typer.echo(key["secret"])  # alone on stdout, for $(…)


def _minute(when: str | None) -> str:
    return when[:16].replace("T", " ") if when else "–"
