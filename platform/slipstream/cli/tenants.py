"""`slipstream tenants …`, for the admin, and `slipstream usage`."""

from __future__ import annotations

from typing import Annotated, Any

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
    no_args_is_help=True, help="What each tenant may use. Needs the admin key.", rich_markup_mode="markdown"
)
TenantArgument = Annotated[str, typer.Argument(help="The tenant.", show_default=False)]
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "tokens_per_month", "storage_bytes")


def _limit(what: str) -> Any:
    return typer.Option(help=f"{what}; 0 = no limit.", min=0, show_default=False)


@app.command("set")
def set_tenant(
    context: typer.Context,
    tenant: TenantArgument,
    *,
    requests_per_minute: Annotated[int | None, _limit("Requests a minute")] = None,
    tokens_per_minute: Annotated[int | None, _limit("Tokens of prompts and answers a minute")] = None,
    concurrent_requests: Annotated[int | None, _limit("Requests at once")] = None,
    tokens_per_month: Annotated[int | None, _limit("Tokens a calendar month")] = None,
    storage_bytes: Annotated[int | None, _limit("Bytes of adapters and training files")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Its share of busy engines, against others' 1.", show_default=False)
    ] = None,
    log_prompts: Annotated[
        bool | None,
        typer.Option(
            "--log-prompts/--no-log-prompts",
            help="Whether its prompts and answers go into logs and traces; off unless you say so.",
            show_default=False,
        ),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Change a tenant's limits; what is left out stays as it is.

    Example: slipstream tenants set acme --requests-per-minute 600 --tokens-per-minute 200000
    """
    given = (requests_per_minute, tokens_per_minute, concurrent_requests, tokens_per_month, storage_bytes)
    found = session(context, url, api_key)
    now = found.run(lambda client: client.get_tenant(tenant))
    changes = {name: value or None for name, value in zip(LIMITS, given, strict=True) if value is not None}
    quota = {**now["quota"], **changes}
    share = now["weight"] if weight is None else weight
    logged = now["log_prompts"] if log_prompts is None else log_prompts
    _show([found.run(lambda client: client.put_tenant(tenant, quota, share, logged))], as_json)


@app.command("list")
def list_tenants(
    context: typer.Context, *, url: UrlOption = DEFAULT_URL, api_key: KeyOption = "", as_json: JsonOption = False
) -> None:
    """List tenants with their limits.

    Example: slipstream tenants list
    """
    _show(session(context, url, api_key).run(lambda client: client.list_tenants()), as_json)


def usage(
    context: typer.Context,
    *,
    start: Annotated[str | None, typer.Option(help="First day, YYYY-MM-DD; else 30 days back.")] = None,
    end: Annotated[str | None, typer.Option(help="Last day, YYYY-MM-DD; else today.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for spreadsheets.")] = False,
    tenant: TenantOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show what a tenant has used, by day and model.

    Example: slipstream usage --start 2026-11-01 --csv > november.csv
    """
    found = session(context, url, api_key, tenant)
    if as_csv:
        typer.echo(found.run(lambda client: client.usage_csv(start, end)), nl=False)
        return
    answer = found.run(lambda client: client.usage(start, end))
    if as_json:
        show_json(answer)
        return
    counts = ("requests", "prompt_tokens", "completion_tokens", "drafted_tokens", "accepted_tokens")
    lines = [*answer["data"], {"day": "total", "model": "", **answer["total"]}] if answer["data"] else []
    rows = [[line["day"], line["model"], *(f"{line[name]:,}" for name in counts)] for line in lines]
    heads = ["DAY", "MODEL", "REQUESTS", "PROMPT", "ANSWER", "DRAFTED", "ACCEPTED"]
    show_table(heads, rows, f"Nothing was used from {answer['start']} to {answer['end']}.")


def _show(tenants: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        show_json(tenants)
        return
    rows = [
        [
            each["tenant"],
            *(_number(each["quota"][name]) for name in LIMITS),
            f"{each['weight']:g}",
            "logged" if each["log_prompts"] else "–",
        ]
        for each in tenants
    ]
    heads = ["TENANT", "REQUESTS/MIN", "TOKENS/MIN", "AT ONCE", "TOKENS/MONTH", "STORAGE BYTES", "WEIGHT", "PROMPTS"]
    show_table(heads, rows, "There are no tenants yet. Make a key for one: slipstream keys create --tenant acme")


def _number(limit: int | None) -> str:
    return "–" if limit is None else f"{limit:,}"
