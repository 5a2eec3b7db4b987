"""`slipstream jobs …`: training on the server."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

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
from slipstream.client import SlipstreamClient
from slipstream.errors import InvalidRequest

app = typer.Typer(no_args_is_help=True, help="Train adapters on the server.", rich_markup_mode="markdown")
JobArgument = Annotated[str, typer.Argument(help="The job's id.", show_default=False)]


@app.command()
def create(
    context: typer.Context,
    *,
    name: Annotated[str, typer.Option("--name", help="The adapter that it publishes.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="Id of the base model.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="Training rows: .jsonl or .csv.", show_default=False)],
    valid: Annotated[Path | None, typer.Option("--valid", help="Validation rows.", show_default=False)] = None,
    method: Annotated[str, typer.Option("--method", help="lora, turbo_lora, turbo or medusa.")] = "turbo_lora",
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="What turbo and medusa make faster.", show_default=False)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Any other training option, as `epochs=3`; repeat it.", show_default=False),
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Upload rows and queue a training job. It is published when it is done.

    Example: slipstream jobs create --name sql --base HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl
    """
    options: dict[str, Any] = {"method": method, **_options(option or [])}
    if adapter is not None:
        options["adapter"] = adapter

    async def work(client: SlipstreamClient) -> dict[str, Any]:
        fields: dict[str, Any] = {"model": base, "suffix": name, "slipstream": options}
        fields["training_file"] = (await client.upload_file(data))["id"]
        if valid is not None:
            fields["validation_file"] = (await client.upload_file(valid))["id"]
        return await client.create_job(**fields)

    job = session(context, url, api_key, tenant).run(work)
    if as_json:
        show_json(job)
        return
    typer.echo(f"Queued {job['id']}. Follow it: slipstream jobs events {job['id']}")


@app.command("list")
def list_jobs(
    context: typer.Context,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the newest jobs.

    Example: slipstream jobs list
    """
    found = session(context, url, api_key, tenant).run(lambda client: client.list_jobs())
    if as_json:
        show_json(found)
        return
    rows = [[j["id"], j["slipstream"]["name"], j["status"], _when(j["created_at"]), _outcome(j)] for j in found]
    show_table(["ID", "ADAPTER", "STATUS", "CREATED", "OUTCOME"], rows, "No jobs yet: slipstream jobs create --help")


@app.command()
def show(
    context: typer.Context,
    job_id: JobArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a job stands.

    Example: slipstream jobs show ftjob-0123456789abcdef01234567
    """
    job = session(context, url, api_key, tenant).run(lambda client: client.get_job(job_id))
    if as_json:
        show_json(job)
        return
    typer.echo(f"{job['id']}  {job['status']}  {_outcome(job)}".rstrip())
    for field in ("model", "training_file", "validation_file", "trained_tokens"):
        if job[field] is not None:
            typer.echo(f"  {field}: {job[field]}")
    if job["status"] == "running" and job["estimated_finish"] is not None:
        typer.echo(f"  done by about {_when(job['estimated_finish'])}")
    for field, value in job["slipstream"].items():
        if value is not None:
            typer.echo(f"  {field}: {value}")


@app.command()
def events(
    context: typer.Context,
    job_id: JobArgument,
    *,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many of the newest.")] = 50,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print what a job said, oldest first.

    Example: slipstream jobs events ftjob-0123456789abcdef01234567
    """
    found = session(context, url, api_key, tenant).run(lambda client: client.list_job_events(job_id, limit))[::-1]
    if as_json:
        show_json(found)
        return
    for event in found:
        level = "" if event["level"] == "info" else f"{event['level']}: "
        typer.echo(f"{_when(event['created_at'])}  {level}{event['message']}")


@app.command()
def cancel(
    context: typer.Context,
    job_id: JobArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Cancel a job. Nothing of it is published.

    Example: slipstream jobs cancel ftjob-0123456789abcdef01234567
    """
    job = session(context, url, api_key, tenant).run(lambda client: client.cancel_job(job_id))
    if as_json:
        show_json(job)
        return
    typer.echo("Cancelled." if job["status"] == "cancelled" else "Its worker is being stopped.")


def _options(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            end(InvalidRequest(f"--option {pair!r} has no value: write it as epochs=3."))
        try:
            found[name] = json.loads(value)  # numbers, true, null; anything else is text
        except ValueError:
            found[name] = value
    return found


def _outcome(job: dict[str, Any]) -> str:
    return str(job["fine_tuned_model"] or (job["error"] or {}).get("message") or "")


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
