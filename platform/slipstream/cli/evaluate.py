"""`slipstream evaluate`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slipstream.base_models import PreparedModel, prepare_base_model
from slipstream.base_models.progress import Advance
from slipstream.cli.session import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    Session,
    TenantOption,
    UrlOption,
    end,
    session,
    show_json,
    show_table,
)
from slipstream.config import load_settings
from slipstream.engine.config import DTYPES
from slipstream.errors import ConfigError, InvalidRequest, SlipstreamError
from slipstream.training.data import read_rows

if TYPE_CHECKING:
    from slipstream.evaluation import Evaluation, OpenedAdapter


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What the command line asks for."""

    target: str
    data: Path
    limit: int | None
    base: str | None
    dtype: str | None
    concurrency: int
    max_tokens: int
    max_draft: int
    picture: Path | None


def evaluate(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(help="An adapter's folder, or the name of a published one.", show_default=False)
    ],
    *,
    data: Annotated[
        Path, typer.Option(help="Held-out rows: JSONL or CSV, as for `slipstream train`.", show_default=False)
    ],
    limit: Annotated[int | None, typer.Option(help="Only the first rows.", min=1, show_default=False)] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base model: folder, Hugging Face id; default: the settings'.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default: the settings'.", show_default=False)
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Rows answered at once; tokens/s depends on it.", min=1)] = 8,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    max_draft: Annotated[int, typer.Option(help="Longest draft, whatever the number of streams.", min=1, max=8)] = 8,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the comparison into this .png (or .svg, .pdf).", show_default=False)
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = "",
    tenant: TenantOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure an adapter on rows it was not trained on, beside its base model.

    The rows are answered on this machine, greedily, by the base model (`base`), by the adapter with its speculator off
    (`lora`) and on (`turbo_lora`; `turbo` for streams without a LoRA; `medusa`). A published adapter is downloaded
    first; the server computes nothing.

    *exact match*: share of answers equal to the reference. *ROUGE-L*: overlap with it, 0 to 1. *tokens/step*: tokens for
    each run of the model; 1 without speculation. *acceptance*: how often draft 1, 2, … was right when all before it
    were. *tokens/s* is compared round by round; in brackets the lowest and highest round.

    Example: slipstream evaluate ./my-lora --data test.jsonl --limit 200 --picture evaluation.png

    Example: slipstream evaluate sql@3 --data test.jsonl --json
    """
    wanted = _Wanted(target, data, limit, base, dtype, concurrency, max_tokens, max_draft, picture)
    try:
        evaluation, opened = _run(wanted, session(context, url, api_key, tenant))
    except SlipstreamError as error:
        end(error)
    for warning in opened.warnings:
        typer.echo(f"Warning: {warning}", err=True)
    if as_json:
        show_json(evaluation.to_json())
        return
    _show(evaluation, wanted)


def _run(wanted: _Wanted, connection: Session) -> tuple[Evaluation, OpenedAdapter]:
    # Imported here: `slipstream adapters list` should not wait for torch.
    from transformers.utils import logging  # noqa: PLC0415

    from slipstream.evaluation import EvaluationOptions, open_adapter  # noqa: PLC0415
    from slipstream.evaluation import evaluate as compare  # noqa: PLC0415
    from slipstream.evaluation.picture import check_picture, draw  # noqa: PLC0415

    rows = read_rows(wanted.data, wanted.limit)
    if wanted.picture is not None:
        check_picture(wanted.picture)
    console = Console(stderr=True, highlight=False)
    logging.disable_progress_bar()  # it would draw over ours, and into log files
    with _folder(wanted.target, connection) as folder:
        base, dtype = _base(wanted, console)
        with _status(console, f"Loading {base.id}"):
            opened = open_adapter(folder, base, dtype, wanted.concurrency, wanted.max_draft)
    options = EvaluationOptions(wanted.concurrency, wanted.max_tokens, opened.prompt_format)
    with _bar(console, len(rows) * len(opened.variants)) as advance:
        evaluation = compare(opened.engine, opened.tokenizer, rows, opened.variants, options, advance)
    if wanted.picture is not None:
        name = Path(wanted.target).name
        title = f"{name} on {wanted.data.name}: {len(rows)} rows, {wanted.concurrency} at once, greedy"
        draw(evaluation, wanted.picture, title)
    return evaluation, opened


@contextmanager
def _folder(target: str, connection: Session) -> Iterator[Path]:
    """The adapter's files: where they lie, or downloaded to a folder that is gone afterwards."""
    path = Path(target).expanduser()
    if path.is_dir():
        yield path
        return
    if target.startswith((".", "/", "~")) or not connection.api_key:
        raise InvalidRequest(
            f"{target} is not a folder here. For a published adapter give its name, and set SLIPSTREAM_API_KEY or give "
            "--api-key."
        )
    with tempfile.TemporaryDirectory(prefix="slipstream-evaluate-") as scratch:
        connection.run(lambda client: client.fetch_files(target, Path(scratch)))
        yield Path(scratch)


def _base(wanted: _Wanted, console: Console) -> tuple[PreparedModel, str]:
    """The prepared base model, and the number format to run it in."""
    settings = load_settings()
    model = settings.models[0]
    dtype = wanted.dtype or model.dtype
    if dtype not in DTYPES:
        raise InvalidRequest(f"--dtype is {dtype!r}; use one of {', '.join(DTYPES)}.", param="dtype")
    try:
        return prepare_base_model(wanted.base or model.base_model, settings.home, _Phases(console)), dtype
    except ConfigError as error:
        if wanted.base is None:
            raise
        raise InvalidRequest(error.message.replace("SLIPSTREAM_BASE_MODEL", "--base"), param="base") from error


class _Phases:
    """Shows what preparing a base model is at; nothing is left of it on the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def phase(self, title: str, total_bytes: int | None = None) -> Iterator[Advance]:
        """One phase."""
        with _status(self._console, title):
            yield lambda done: None


@contextmanager
def _status(console: Console, text: str) -> Iterator[None]:
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[], None]]:
    # On stderr, so that --json on stdout stays clean; and for people only.
    columns = (TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _show(evaluation: Evaluation, wanted: _Wanted) -> None:
    names = list(evaluation.variants)
    against = names[:-1]
    header = ["VARIANT", "EXACT MATCH", "ROUGE-L", "TOKENS/STEP", "ACCEPTANCE", "TOKENS/S"]
    rows = []
    for name, r in evaluation.variants.items():
        ratios = [
            f"{s.median:.2f}× ({s.low:.2f}–{s.high:.2f})" if (s := r.speedup.get(other)) else "-" for other in against
        ]
        acceptance = " ".join(f"{share:.2f}" for share in r.acceptance) or "-"
        figures = [f"{100 * r.exact_match:.1f}%", f"{r.rouge_l:.3f}", f"{r.tokens_per_step:.2f}", acceptance]
        rows.append([name, *figures, f"{r.tokens_per_second:.0f}", *ratios])
    show_table([*header, *(f"× {other.upper()}" for other in against)], rows, "")
    count = evaluation.variants[names[0]].rows
    typer.echo(
        f"{count} rows of {wanted.data.name}, {wanted.concurrency} at once, greedy, at most {wanted.max_tokens} tokens."
    )
    if wanted.picture is not None:
        typer.echo(f"Picture: {wanted.picture}")
