"""`slipstream aliases …`: which version a name means, and what it meant before."""

from __future__ import annotations

from typing import Annotated

import typer

from slipstream.cli.session import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    TenantOption,
    UrlOption,
    end,
    session,
    show_json,
    show_table,
)
from slipstream.errors import InvalidRequest

app = typer.Typer(
    no_args_is_help=True,
    help="Move aliases between versions; `prod` is what an adapter's plain name means.",
    rich_markup_mode="markdown",
)
NameArgument = Annotated[str, typer.Argument(help="The adapter.", show_default=False)]
AliasArgument = Annotated[str, typer.Argument(help="The alias, such as prod or canary.", show_default=False)]


@app.command("set")
def set_alias(
    context: typer.Context,
    name: NameArgument,
    alias: AliasArgument,
    version: Annotated[int, typer.Argument(help="The version's number.", min=1, show_default=False)],
    *,
    split: Annotated[
        str | None, typer.Option("--split", help="VERSION=PART: where a part of its requests goes.", show_default=False)
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="The split's version answers as well, unseen, to be compared.")
    ] = False,
    max_error_rate: Annotated[
        float | None, typer.Option(help="Roll back when more of the newer version's requests fail.", show_default=False)
    ] = None,
    min_acceptance: Annotated[
        float | None, typer.Option(help="Roll back when fewer of its drafts are accepted.", show_default=False)
    ] = None,
    min_requests: Annotated[int, typer.Option(help="Requests before it is judged.", min=1)] = 50,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
) -> None:
    """Point an alias at a version; requests from now on go there. With --split a part of them goes to another version; the
    same `user` always goes to the same one. With a rate given it watches the newer version, and rolls back by itself.

    Example: slipstream aliases set sql prod 3 --split 4=0.1 --max-error-rate 0.05
    """
    part = _split(split) if split is not None else None
    if shadow and part is None:
        end(InvalidRequest("--shadow goes with --split VERSION=PART: that version shadows that part of the requests."))
    rates = {"max_error_rate": max_error_rate, "min_acceptance": min_acceptance}
    guard = {rate: value for rate, value in rates.items() if value is not None}
    session(context, url, api_key, tenant).run(
        lambda client: client.set_alias(
            name, alias, version, part, shadow=shadow, guard={**guard, "min_requests": min_requests} if guard else None
        )
    )
    rest = f", {part[1]:.0%} of it {'shadowed by ' * shadow}{name}@{part[0]}" if part is not None else ""
    typer.echo(f"{name}@{alias} is {name}@{version}{rest}{', watched' if guard else ''}")


@app.command()
def rollback(
    context: typer.Context,
    name: NameArgument,
    alias: AliasArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
) -> None:
    """Take a split away; without one, go to the version before the last move. Once more, and it is where it was.

    Example: slipstream aliases rollback sql prod
    """
    found = session(context, url, api_key, tenant).run(lambda client: client.roll_back_alias(name, alias))
    typer.echo(f"{name}@{alias} is {name}@{found['version']} again")


@app.command()
def rm(
    context: typer.Context,
    name: NameArgument,
    alias: AliasArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
) -> None:
    """Remove an alias; its version stays.

    Example: slipstream aliases rm sql canary
    """
    session(context, url, api_key, tenant).run(lambda client: client.delete_alias(name, alias))
    typer.echo(f"Removed {name}@{alias}")


@app.command()
def log(
    context: typer.Context,
    name: NameArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what became of an adapter's aliases, newest first.

    Example: slipstream aliases log sql
    """
    found = session(context, url, api_key, tenant).run(lambda client: client.alias_moves(name))
    if as_json:
        show_json(found)
        return
    rows = [
        [move["at"][:19], move["alias"], _number(move["before"]), _number(move["version"]), move["by"], move["reason"]]
        for move in found
    ]
    show_table(["WHEN", "ALIAS", "FROM", "TO", "BY KEY", "WHY"], rows, f"No alias of {name} was ever set.")


@app.command()
def outcomes(
    context: typer.Context,
    name: NameArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what lately became of the requests of aliases that have a split or a guard, by version.

    Example: slipstream aliases outcomes sql
    """
    found = session(context, url, api_key, tenant).run(lambda client: client.alias_outcomes(name))
    if as_json:
        show_json(found)
        return
    rows = [
        [
            f"{name}@{row['alias']}",
            str(row["version"]),
            str(row["requests"]),
            str(row["errors"]),
            _share(row["accepted_tokens"], row["drafted_tokens"]),
            _share(row["same"], row["compared"]),
        ]
        for row in found
    ]
    heads = ["ALIAS", "VERSION", "REQUESTS", "ERRORS", "ACCEPTED", "SAME AS SHADOWED"]
    show_table(heads, rows, f"No alias of {name} has a split or a guard, or nobody has called one yet.")


def _split(text: str) -> tuple[int, float]:
    version, _, part = text.partition("=")
    try:
        return int(version), float(part)
    except ValueError:
        end(InvalidRequest("--split is VERSION=PART, as in 4=0.1: version 4 answers a tenth."))


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "–"


def _number(version: int | None) -> str:
    return "–" if version is None else str(version)
