"""`slipstream adapters …`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

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
from slipstream.client import SlipstreamClient, to_reference
from slipstream.client.resumable import is_worth_resuming, pull_from, push_in_parts
from slipstream.errors import InvalidRequest

app = typer.Typer(no_args_is_help=True, help="Publish, look at and remove adapters.", rich_markup_mode="markdown")


class Switch(StrEnum):
    """Speculation of a version, as the command line says it."""

    ON = "on"
    OFF = "off"


LabelOption = Annotated[list[str] | None, typer.Option("--label", help="A label, `key=value`; several.")]
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)]


@app.command()
def push(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="The folder that PEFT's save_pretrained wrote, a .zip or .tar.gz of it, or a URL that the server fetches: "
            "`s3://`, `gs://`, `az://`, `hf://owner/name`.",
            show_default=False,
        ),
    ],
    *,
    name: Annotated[str, typer.Option("--name", help="The name that requests use as `model`.", show_default=False)],
    base: Annotated[
        str | None, typer.Option("--base", help="Its base model, where the server has several.", show_default=False)
    ] = None,
    label: LabelOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a folder as the next version of an adapter.

    It answers requests as soon as this returns. Pushing the same content again gives the version that has it. Large folders
    go in parts: after a broken connection, run it again, and only what is missing is sent.

    Example: slipstream adapters push ./my-lora --name sql --label team=search
    """
    labels = _labels(label)

    async def work(client: SlipstreamClient) -> tuple[dict[str, Any], bool]:
        with _bar() as bar:
            task = bar.add_task(name, total=None)

            def show(sent: int, total: int) -> None:
                bar.update(task, completed=sent, total=total or None)

            wishes = {"labels": labels} | ({} if base is None else {"base": base})
            if "://" in source:
                return await pull_from(client, source, name, show, **wishes)
            path = Path(source)
            if is_worth_resuming(path):
                return await push_in_parts(client, path, name, show, **wishes)
            return await client.push(path, name, show, base=base, labels=labels)

    version, is_new = session(context, url, api_key, tenant).run(work)
    if as_json:
        show_json({**version, "new": is_new})
        return
    typer.echo(f"{'Published' if is_new else 'Already published as'} {version['ref']}  ({_kind(version)})")
    for warning in version["warnings"]:
        typer.echo(f"Warning: {warning}", err=True)


@app.command("list")
def list_adapters(
    context: typer.Context,
    *,
    label: LabelOption = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the tenant's adapters; with labels, those that have a version with all of them.

    Example: slipstream adapters list --label team=search
    """
    labels = _labels(label)
    found = session(context, url, api_key, tenant).run(lambda client: client.list_adapters(labels))
    if as_json:
        show_json(found)
        return
    rows = [
        [a["name"], str(a["current"] or "-"), str(len(a["versions"])), _aliases(a), _kind(a["versions"][0])]
        for a in found
    ]
    show_table(
        ["NAME", "CURRENT", "VERSIONS", "ALIASES", "NEWEST"],
        rows,
        "No adapters yet. Publish one: slipstream adapters push FOLDER --name NAME",
    )


@app.command()
def show(
    context: typer.Context,
    name: NameArgument,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show an adapter's versions and aliases.

    Example: slipstream adapters show sql
    """
    adapter = session(context, url, api_key, tenant).run(lambda client: client.get_adapter(name))
    if as_json:
        show_json(adapter)
        return
    typer.echo(
        f"{adapter['name']}  tenant {adapter['tenant']}  current {adapter['current'] or '-'}  {_aliases(adapter)}"
    )
    rows = [
        [
            v["ref"],
            v["state"],
            _kind(v),
            v["base_model"],
            f"{v['size_bytes'] / 1e6:.1f} MB",
            v["created_at"][:19],
            v["digest"][:19],
            _speculation(v),
        ]
        for v in adapter["versions"]
    ]
    show_table(["VERSION", "STATE", "KIND", "BASE", "SIZE", "CREATED", "DIGEST", "SPECULATION"], rows, "No versions.")
    for version in adapter["versions"]:
        if version["speculation"]["reason"]:
            typer.echo(f"Speculation {_speculation(version)}: {version['ref']}: {version['speculation']['reason']}")
        if version["labels"]:
            typer.echo(f"Labels of {version['ref']}: {_pairs(version['labels'])}")
        known = {name: value for name, value in version["lineage"].items() if value}
        if known:
            evaluation = known.pop("evaluation", {})
            typer.echo(f"Lineage of {version['ref']}: {_pairs({**known, **evaluation})}")
        for warning in version["warnings"]:
            typer.echo(f"Warning: {version['ref']}: {warning}", err=True)


@app.command()
def rm(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(help="`sql`, or one version: `sql@3`.", show_default=False)],
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove an adapter with all its versions, or one version.

    Example: slipstream adapters rm sql@3
    """
    name, version = _name_and_number(reference)
    removed = session(context, url, api_key, tenant).run(lambda client: client.delete_adapter(name, version))
    if as_json:
        show_json(removed)
        return
    typer.echo("Removed " + ", ".join(f"{name}@{number}" for number in removed["versions"]))


@app.command()
def speculation(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(help="One version: `sql@3`.", show_default=False)],
    state: Annotated[Switch, typer.Argument(help="What `auto` means for it.", show_default=False)],
    *,
    reason: Annotated[str, typer.Option("--reason", help="Why, for whoever looks at it later.")] = "",
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a version's speculation on or off.

    It holds for the next request that leaves `speculation` at `auto`; a request that sends `true` still speculates. The
    text of the answers never depends on it, only their speed.

    Example: slipstream adapters speculation sql@3 off --reason "accepts too few drafts"
    """
    name, version = _name_and_number(reference)
    if version is None:
        end(
            InvalidRequest(f"Give a version's number too, as in {name}@3: each version has its own speculation policy.")
        )
    changed = session(context, url, api_key, tenant).run(
        lambda client: client.set_speculation(name, version, enabled=state is Switch.ON, reason=reason)
    )
    if as_json:
        show_json(changed)
        return
    typer.echo(f"Speculation of {changed['ref']} is {state.value}")


@app.command("label")
def set_labels(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(help="A version: `sql@3`.", show_default=False)],
    labels: Annotated[list[str] | None, typer.Argument(help="`key=value`; several.", show_default=False)] = None,
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
) -> None:
    """Give a version labels, instead of those that it had; none takes them away.

    Example: slipstream adapters label sql@3 team=search stage=tested
    """
    name, version = _name_and_number(reference)
    if version is None:
        end(InvalidRequest(f"Give a version's number too, as in {name}@3: each version has its own labels."))
    wanted = _labels(labels)
    changed = session(context, url, api_key, tenant).run(lambda client: client.set_labels(name, version, wanted))
    typer.echo(f"{changed['ref']}: {_pairs(changed['labels']) or 'no labels'}")


@app.command()
def share(
    context: typer.Context,
    name: NameArgument,
    *,
    tenants: Annotated[list[str] | None, typer.Option("--with", help="A tenant; several.")] = None,
    public: Annotated[bool, typer.Option("--public", help="With every tenant.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
) -> None:
    """Say who else may call an adapter, as `tenant/name`. Who is left out no longer may; with no option nobody may.

    Its weights stay with its own tenant: others can call it, not download it.

    Example: slipstream adapters share sql --with globex --with initech
    """
    access = session(context, url, api_key, tenant).run(lambda client: client.set_access(name, tenants or (), public))
    who = "every tenant" if access["public"] else ", ".join(access["tenants"]) or "nobody else"
    typer.echo(f"{name} may be called by {who}")


@app.command()
def pull(
    context: typer.Context,
    reference: Annotated[str, typer.Argument(help="`sql`, or one version: `sql@3`, `sql@prod`.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Where to: a new or empty folder.", show_default=False)],
    *,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a version: its weights, and the card, curves and logs that were published with it.

    Every file is checked against its sha256. After a broken connection, run it again: what is complete is kept.

    Example: slipstream adapters pull sql@3 ./sql-3
    """

    async def work(client: SlipstreamClient) -> dict[str, Any]:
        with _bar() as bar:
            task = bar.add_task(reference, total=None)

            def show(received: int, total: int) -> None:
                bar.update(task, completed=received, total=total)

            return await client.fetch_files(reference, folder, show)

    version = session(context, url, api_key, tenant).run(work)
    if as_json:
        show_json(version)
        return
    count = len(version["files"]) + len(version["attachments"])
    typer.echo(f"{version['ref']} is in {folder}: {count} files ({_kind(version)})")


def _name_and_number(reference: str) -> tuple[str, int | None]:
    name, at, tag = to_reference(reference).partition("@")
    if at and not (tag.isascii() and tag.isdigit()):
        end(InvalidRequest(f"Give a version's number, as in {name}@3: '{tag}' is none."))
    return name, int(tag) if at else None


def _labels(texts: list[str] | None) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts or []]
    if wrong := next((key for key, equals, _ in pairs if not equals), None):
        end(InvalidRequest(f"A label is written as key=value, not '{wrong}'."))
    return {key: value for key, _, value in pairs}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )


def _bar() -> Progress:
    # On stderr, so that --json on stdout stays clean; and for people only.
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _kind(version: dict[str, Any]) -> str:
    parts = [str(version["kind"])]
    if version["rank"]:
        parts.append(f"rank {version['rank']}")
    if version["num_streams"]:
        parts.append(f"{version['num_streams']} streams")
    return ", ".join(parts)


def _speculation(version: dict[str, Any]) -> str:
    if not version["speculation"]["enabled"]:
        return Switch.OFF.value
    return Switch.ON.value if version["num_streams"] else "-"  # a plain LoRA has nothing to draft with


def _aliases(adapter: dict[str, Any]) -> str:
    return " ".join(f"{alias}={number}" for alias, number in sorted(adapter["aliases"].items()))
