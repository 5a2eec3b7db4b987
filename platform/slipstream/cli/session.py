"""What every command shares: where the server is, how answers are shown, and how errors end a command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, TypeVar

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from slipstream.client import SlipstreamClient
from slipstream.errors import ClientError, InvalidRequest, SlipstreamError

T = TypeVar("T")
REFUSED, FAILED = 1, 3  # exit codes; 2 is the shell's convention for wrong usage
DEFAULT_URL = "http://127.0.0.1:8000"

UrlOption = Annotated[
    str, typer.Option("--url", envvar="SLIPSTREAM_URL", help="Where the server is.", show_default=True)
]
KeyOption = Annotated[
    str,
    typer.Option(
        "--api-key", envvar="SLIPSTREAM_API_KEY", help="A tenant's key, or the admin key.", show_default=False
    ),
]
TenantOption = Annotated[
    str | None, typer.Option("--as-tenant", help="With the admin key: the tenant to act for.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@dataclass(frozen=True, slots=True)
class Session:
    """One command's connection; tests put their own transport into the context."""

    url: str
    api_key: str
    tenant: str | None = None
    transport: httpx.AsyncBaseTransport | None = None

    def run(self, work: Callable[[SlipstreamClient], Awaitable[T]]) -> T:
        """Run `work` with a client; an expected error ends the command with one sentence and an exit code."""
        try:
            return asyncio.run(self._work(work))
        except SlipstreamError as error:
            end(error)

    async def _work(self, work: Callable[[SlipstreamClient], Awaitable[T]]) -> T:
        if not self.api_key:
            raise InvalidRequest("No key: set SLIPSTREAM_API_KEY or give --api-key.")
        async with SlipstreamClient(self.url, self.api_key, tenant=self.tenant, transport=self.transport) as client:
            return await work(client)


def session(context: typer.Context, url: str, api_key: str, tenant: str | None = None) -> Session:
    """The session of a command; `context.obj` may be a transport (tests: the application itself)."""
    transport = context.obj if isinstance(context.obj, httpx.AsyncBaseTransport) else None
    return Session(url, api_key, tenant, transport)


def end(error: SlipstreamError) -> NoReturn:
    """Say what is wrong and leave."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble(("Error: ", "bold red"), error.message), soft_wrap=True)
    raise typer.Exit(REFUSED if isinstance(error, ClientError) else FAILED)


def show_json(data: Any) -> None:
    """Print JSON on stdout, untouched by colours and line wraps."""
    typer.echo(json.dumps(data, indent=2))


def show_table(columns: list[str], rows: list[list[str]], empty: str) -> None:
    """Print a table, or a hint when there is nothing in it."""
    console = Console(highlight=False)
    if not rows:
        console.print(Text(empty))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # `Text`: names are data, not rich's markup
    console.print(table)
