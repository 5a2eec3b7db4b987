"""`slipstream audit`: who did what."""

from __future__ import annotations

from typing import Annotated

import typer

from slipstream.cli.session import DEFAULT_URL, JsonOption, KeyOption, UrlOption, session, show_json, show_table


def audit(
    context: typer.Context,
    *,
    tenant: Annotated[
        str | None, typer.Option("--tenant", help="Whose; a tenant's admin may leave it out.", show_default=False)
    ] = None,
    limit: Annotated[int, typer.Option(help="Most entries.", min=1, max=1000)] = 50,
    before: Annotated[str | None, typer.Option(help="An entry's id: only older ones.", show_default=False)] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show who published, deleted, moved, shared and made keys: newest first.

    Example: slipstream audit --tenant acme --limit 20
    """
    found = session(context, url, api_key).run(lambda client: client.audit_log(tenant, limit, before))
    if as_json:
        show_json(found)
        return
    rows = [[e["id"], e["at"][:19], e["by"], e["action"], e["subject"], e["detail"]] for e in found]
    show_table(["ID", "WHEN", "BY KEY", "WHAT", "OF", "DETAIL"], rows, "Nothing was done yet.")
