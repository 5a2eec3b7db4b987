"""`slipstream registry …`: backups, for whoever runs the platform. It talks to Redis and the blob store, not to a gateway."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from adapter_registry.errors import RegistryError, StoreUnavailable
from slipstream.cli.session import FAILED, JsonOption, end, show_json, show_table
from slipstream.errors import SlipstreamError

if TYPE_CHECKING:
    from adapter_registry.backup.place import BackupPlace
    from adapter_registry.backup.records import Manifest
    from adapter_registry.backup.redis_data import RegistryData
    from adapter_registry.blobs import ObstoreBlobs

T = TypeVar("T")
Told = Callable[[str, int, int], None]
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="""Back up and restore the registry: adapters, keys, tenants, jobs and usage in Redis, and the files that they name.

For whoever runs the platform: these commands read the server's own settings (SLIPSTREAM_REDIS_URL, SLIPSTREAM_BLOB_URL,
SLIPSTREAM_HOME or slipstream.yaml) and talk to Redis and the blob store themselves.

    slipstream registry backup s3://backups/slipstream      # while serving goes on
    slipstream registry verify s3://backups/slipstream
    slipstream registry restore s3://backups/slipstream     # into an empty registry, with nothing running on it

Not in a backup: the admin key (SLIPSTREAM_ADMIN_KEY), base models, jobs' checkpoints on disk. A backup holds webhooks'
secrets and training files as they are: keep it as you would keep the registry.""",
)
PlaceArgument = Annotated[
    str,
    typer.Argument(help="Where backups lie: a folder, `s3://bucket/prefix`, `gs://…` or `az://…`.", show_default=False),
]
IdOption = Annotated[
    str | None, typer.Option("--id", help="Which backup, as `list` shows them; else the newest.", show_default=False)
]


@app.command()
def backup(
    place: PlaceArgument,
    *,
    keep: Annotated[
        int | None,
        typer.Option(
            help="Afterwards remove all but the newest so many backups, and blobs that none of them names.",
            min=1,
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Back the registry up, while it is in use.

    Each adapter's records are of one moment. A file that an earlier backup in the same place has already is not copied again.
    A backup that is broken off does not count as one; run it again. It fails when a file that the registry
    names is not there.

    Example: slipstream registry backup /var/backups/slipstream --keep 14
    """
    from adapter_registry.backup.place import BackupPlace  # noqa: PLC0415 - other commands should not wait for it
    from adapter_registry.backup.writing import back_up, prune  # noqa: PLC0415

    os.umask(0o077)  # what a backup holds is nobody else's business

    async def work(data: RegistryData, blobs: ObstoreBlobs, tell: Told) -> tuple[Manifest, tuple[int, int]]:
        target = BackupPlace.from_url(place, make=True)
        manifest = await back_up(data, blobs, target, tell)
        removed = await prune(target, keep) if keep is not None else ([], 0)
        return manifest, (len(removed[0]), removed[1])

    manifest, (backups, pruned) = _with_registry(work, alone=False)
    _show(manifest, as_json, "Backed up", removed_backups=backups, removed_blobs=pruned)


@app.command()
def restore(
    place: PlaceArgument,
    *,
    id_: IdOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove what the registry holds now; without it, it must be empty.")
    ] = False,
    trust_blobs: Annotated[
        bool,
        typer.Option(
            "--trust-blobs",
            help="Take files that are in the blob store already as they are, unread. Replicas check hashes as well.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Fill an empty registry from a backup.

    Stop everything that uses the registry first. The backup is read and every file is in the blob store before Redis is
    touched. When it is broken off, run it again: until it has ended, no gateway starts on the registry.

    Example: slipstream registry restore /var/backups/slipstream
    """
    from adapter_registry.backup.place import BackupPlace  # noqa: PLC0415
    from adapter_registry.backup.reading import Restore  # noqa: PLC0415

    async def work(data: RegistryData, blobs: ObstoreBlobs, tell: Told) -> Manifest:
        found = Restore(data, blobs, BackupPlace.from_url(place), tell)
        return await found.run(id_, replace=replace, trust_blobs=trust_blobs)

    _show(_with_registry(work, alone=True), as_json, "Restored")


@app.command()
def verify(place: PlaceArgument, *, id_: IdOption = None, as_json: JsonOption = False) -> None:
    """Read all of a backup and check every hash. The registry itself is not needed.

    Example: slipstream registry verify s3://backups/slipstream
    """
    from adapter_registry.backup.place import BackupPlace  # noqa: PLC0415
    from adapter_registry.backup.reading import verify as verify_backup  # noqa: PLC0415

    with _progress() as tell:
        manifest = _run(lambda: verify_backup(BackupPlace.from_url(place), id_, tell))
    _show(manifest, as_json, "Whole:")


@app.command("list")
def list_backups(place: PlaceArgument, *, as_json: JsonOption = False) -> None:
    """List the whole backups of a place, oldest first.

    Example: slipstream registry list s3://backups/slipstream
    """
    from adapter_registry.backup.place import BackupPlace  # noqa: PLC0415

    async def work() -> list[Manifest]:
        found: BackupPlace = BackupPlace.from_url(place)
        return [await found.manifest(id_) for id_ in await found.ids()]

    manifests = _run(work)
    if as_json:
        show_json([_summary(manifest) for manifest in manifests])
        return
    rows = [[str(value) for value in _summary(manifest).values()] for manifest in manifests]
    heads = ["ID", "SCHEMA", "CREATED", "TENANTS", "ADAPTERS", "VERSIONS", "FILES"]
    show_table(heads, rows, "There are no backups yet: slipstream registry backup FOLDER")


@app.command()
def check(*, as_json: JsonOption = False) -> None:
    """Look whether the registry's records agree with each other, and whether every file that they name is there.

    Changes nothing. Exit code 1 when something does not agree.

    Example: slipstream registry check
    """
    from adapter_registry.backup.reading import find_problems  # noqa: PLC0415

    problems = _with_registry(lambda data, blobs, _: find_problems(data, blobs), alone=False)
    if as_json:
        show_json(problems)
    else:
        for problem in problems:
            typer.echo(problem)
        typer.echo(
            f"{len(problems)} problems." if problems else "The registry's records agree, and every file is there."
        )
    raise typer.Exit(1 if problems else 0)


def _with_registry(work: Callable[[RegistryData, ObstoreBlobs, Told], Awaitable[T]], *, alone: bool) -> T:
    """Do it with connections to the registry of the settings."""
    from deployments.registry_access import registry_address  # noqa: PLC0415
    from slipstream.config import load_settings  # noqa: PLC0415

    try:
        with registry_address(load_settings(), alone=alone) as address, _progress() as tell:

            async def connected() -> T:
                data, blobs = address.open()
                try:
                    return await work(data, blobs, tell)
                finally:
                    await data.close()

            return _run(connected)
    except SlipstreamError as error:
        end(error)


def _run(work: Callable[[], Awaitable[T]]) -> T:
    """Run it; an expected error ends the command with one sentence and an exit code."""

    async def awaited() -> T:
        return await work()

    try:
        return asyncio.run(awaited())
    except (RegistryError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(FAILED if isinstance(error, StoreUnavailable) else 1) from error


@contextmanager
def _progress() -> Iterator[Told]:
    """Bars on a terminal, one for each thing that is told of; nothing in a log file."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, int] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total, visible=done < total)  # type: ignore[arg-type]

        yield tell


def _summary(manifest: Manifest) -> dict[str, object]:
    tenants = manifest.tenants
    return {
        "id": manifest.id,
        "schema": manifest.schema_version,
        "created_at": f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC",
        "tenants": len(tenants),
        "adapters": sum(each.adapters for each in tenants),
        "versions": sum(each.versions for each in tenants),
        "files": sum(each.blobs for each in tenants),
    }


def _show(manifest: Manifest, as_json: bool, did: str, **more: int) -> None:
    summary = _summary(manifest) | more
    if as_json:
        show_json(summary)
        return
    typer.echo(
        f"{did} {summary['id']}: {summary['tenants']} tenants, {summary['adapters']} adapters, {summary['versions']} "
        f"versions, {summary['files']} files."
    )
    if any(more.values()):
        typer.echo(
            f"Removed {more['removed_backups']} older backups and {more['removed_blobs']} files that only they named."
        )
