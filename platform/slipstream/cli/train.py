"""`slipstream train` and `slipstream turbo`: every field of `TrainingConfig` is an option, with its own description."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Protocol, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console

from adapter_registry.errors import InvalidName
from adapter_registry.records import SpeculationPolicy, check_name
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
)
from slipstream.errors import InvalidRequest, SlipstreamError
from slipstream.training.config import TrainingConfig
from slipstream.training.memory import OUT_OF_MEMORY, is_out_of_memory

if TYPE_CHECKING:
    from slipstream.training.phase import Fit
    from slipstream.training.run import TrainingResult

STOPPED = 143  # 128 + SIGTERM
# Options whose text is not simply a number, a choice or a path.
_PARSED: dict[str, tuple[str, Callable[[str], Any]]] = {
    "stream_rank": ("R|dense", lambda text: None if text == "dense" else text),
    "negatives": ("N|all", lambda text: None if text == "all" else text),
    "lora_targets": ("NAMES", lambda text: text if text == "all-linear" else tuple(text.split(","))),
    "report_to": ("NAMES", lambda text: tuple(text.split(","))),
}
_NOT_FOR_TURBO = {
    "method", "adapter", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "learning_rate", "gate", "gate_warmup",
    "lora_reference", "name", "distill_epochs",
}  # fmt: skip

_PublishOption = Annotated[
    str | None, typer.Option("--publish", help="Publish the result under this name.", show_default=False)
]
_TRAIN_HELP = """Train an adapter: a LoRA, a Turbo LoRA, or a speculator for a finished one.

    --method turbo_lora   a LoRA and its speculator, in one run (the default)
    --method lora         a LoRA alone
    --method turbo        a speculator for the base model, or with --adapter for a finished LoRA
    --method medusa       the same with Medusa-1 heads: the classic baseline, much larger

Rows: JSONL with `prompt` and `completion` or chat `messages`, or CSV with the first two as columns. A few thousand
rows with answers of at least 10 tokens are a good start. The run's folder gets checkpoints, a log, a learning curve
and a card; `adapter/` in it can be published. SIGTERM saves a checkpoint; `--resume` goes on from the newest.

Example: slipstream train --data train.jsonl --valid valid.jsonl --output runs/sql --max-minutes 15 --publish sql
"""
_TURBO_HELP = """Make a finished adapter fast: train a speculator for it, on its own answers.

ADAPTER is a published adapter's name or a folder with a LoRA. The LoRA stays as it is, so the text stays the same. A
published adapter gets the result as its next version, unless --publish names another.

Example: slipstream turbo sql --data train.jsonl --max-minutes 10
"""


class FitFor(Protocol):
    """Chooses where the phases run; `deployments` offers Ray Train."""

    def __call__(self, config: TrainingConfig) -> Fit:
        """The place for this run."""
        ...


class _Places:
    """Where phases with several workers run: nowhere, until the full installation says so."""

    fit_for: FitFor | None = None


def use_workers(fit_for: FitFor) -> None:
    """Let `--workers` run there."""
    _Places.fit_for = fit_for


def register(app: typer.Typer) -> None:
    """Add both commands to `app`."""

    def train(
        context: typer.Context,
        *,
        publish: _PublishOption = None,
        url: UrlOption = DEFAULT_URL,
        api_key: KeyOption = "",
        tenant: TenantOption = None,
        as_json: JsonOption = False,
        **options: Any,
    ) -> None:
        connection = session(context, url, api_key, tenant)
        _command(options, connection, publish, as_json)

    def turbo(
        context: typer.Context,
        target: Annotated[str, typer.Argument(metavar="ADAPTER", help="A name or a folder.", show_default=False)],
        *,
        publish: _PublishOption = None,
        url: UrlOption = DEFAULT_URL,
        api_key: KeyOption = "",
        tenant: TenantOption = None,
        as_json: JsonOption = False,
        **options: Any,
    ) -> None:
        connection = session(context, url, api_key, tenant)
        try:
            with _adapter_folder(target, connection) as (folder, name):
                options |= {"method": "turbo", "adapter": folder}
                _command(options, connection, publish or name, as_json)
        except SlipstreamError as error:
            end(error)

    app.command("train", help=_TRAIN_HELP)(_with_options(train, without=frozenset({"name"})))
    app.command("turbo", help=_TURBO_HELP)(_with_options(turbo, without=frozenset(_NOT_FOR_TURBO)))


def _with_options(command: Any, without: frozenset[str]) -> Any:
    """`command` with its `**options` spelled out, one for each field: what Typer builds a command line from."""
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [_parameter(n, f) for n, f in TrainingConfig.model_fields.items() if n not in without]
    fields.sort(key=lambda p: p.name not in ("data", "valid", "method", "output"))
    first = [p for p in own if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    rest = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
    command.__signature__ = signature.replace(parameters=[*first, *fields, *rest])
    command.__annotations__ = {p.name: p.annotation for p in (*first, *fields, *rest)}
    return command


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One field as an option. Unset options stay None, so that defaults have one home."""
    required = field.is_required() and name != "output"
    text = field.description or ""
    default = "runs/NAME" if name == "output" else field.get_default()
    if name in _PARSED:
        text = text.replace("null", _PARSED[name][0].partition("|")[2])
    if not required and default not in (None, ()):
        shown = default.value if isinstance(default, Enum) else default
        text += f" \\[default: {shown}]"
    metavar, kind = (_PARSED[name][0], str) if name in _PARSED else (None, _plain_type(field.annotation))
    flag = f"--{name.replace('_', '-')}"
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool and name != "resume" else [flag]
    option = typer.Option(*flags, help=text, metavar=metavar, show_default=False)
    annotation: Any = Annotated[kind if required else kind | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=... if required else None, annotation=annotation
    )


def _plain_type(annotation: Any) -> Any:
    """The first real type in an annotation such as `Annotated[int, …] | None`."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain_type(next(a for a in get_args(annotation) if a is not type(None)))
    return annotation


def _command(options: dict[str, Any], connection: Session, publish: str | None, as_json: bool) -> None:
    try:
        if publish is not None:
            _check_name(publish)
        config = _config(options, publish)
        if publish is not None:
            connection.run(lambda client: client.list_adapters())  # a key that fails should fail now, not in an hour
        result = _train(config)
    except SlipstreamError as error:
        end(error)
    if publish is not None:
        policy = SpeculationPolicy(enabled=result.gate.speculation, reason=result.gate.reason)
        version, _ = connection.run(lambda client: client.push(result.folder, publish, speculation=policy))
    if as_json:
        show_json({**result.to_json(), "published": version["ref"] if publish is not None else None})
        return
    typer.echo(f"Adapter: {result.folder}")
    if config.method.trains_streams:
        typer.echo(f"Speculation: {'on' if result.gate.speculation else 'off'}. {result.gate.reason}")
    if publish is not None:
        typer.echo(f"Published {version['ref']}")


def _check_name(publish: str) -> None:
    try:
        check_name(publish)
    except InvalidName as error:
        raise InvalidRequest(f"--publish: {error}", param="publish") from error


def _train(config: TrainingConfig) -> TrainingResult:
    # Imported here: `slipstream adapters list` should not wait for torch.
    from slipstream.training.phase import fit_here  # noqa: PLC0415
    from slipstream.training.progress import TerminalObserver  # noqa: PLC0415
    from slipstream.training.run import Interrupted, train  # noqa: PLC0415

    fit: Fit = fit_here
    if config.workers > 1:
        if _Places.fit_for is None:
            raise InvalidRequest("Several workers need the full installation, with Ray.", param="workers")
        fit = _Places.fit_for(config)
    try:
        with TerminalObserver(Console(stderr=True, highlight=False)) as observer:
            return train(config, observer, fit)
    except Interrupted as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(STOPPED) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InvalidRequest(OUT_OF_MEMORY, code="out_of_memory", param="micro_batch_size") from error


def _config(options: dict[str, Any], name: str | None) -> TrainingConfig:
    given = {k: v for k, v in options.items() if v is not None}
    for field, (_, parse) in _PARSED.items():
        if field in given:
            given[field] = parse(given[field])
    given.setdefault("output", Path("runs") / (name or Path(given["data"]).absolute().parent.name))
    if given.get("stream_rank", ...) is None:
        given.setdefault("conditioned", False)  # dense streams cannot be
    try:
        return TrainingConfig(**given, name=name or _name_of(Path(given["output"])))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "--" + str(first["loc"][0]).replace("_", "-") + ": " if first["loc"] else ""
        raise InvalidRequest(f"{where}{first['msg'].removeprefix('Value error, ')}.") from error


def _name_of(output: Path) -> str | None:
    """What the card of a run that is not published calls its adapter."""
    try:
        return check_name(output.absolute().name)
    except InvalidName:
        return None


@contextmanager
def _adapter_folder(target: str, connection: Session) -> Iterator[tuple[Path, str | None]]:
    """A folder as it is; a published adapter downloaded, with the name to publish the result under."""
    path = Path(target).expanduser()
    if path.is_dir():
        yield path, None
        return
    if not connection.api_key:
        raise InvalidRequest(
            f"{target} is not a folder here. For a published adapter give its name, and set SLIPSTREAM_API_KEY or give "
            "--api-key."
        )
    with tempfile.TemporaryDirectory(prefix="slipstream-turbo-") as scratch:
        connection.run(lambda client: client.fetch_files(target, Path(scratch)))
        yield Path(scratch), target.partition("@")[0].rpartition("/")[2]
