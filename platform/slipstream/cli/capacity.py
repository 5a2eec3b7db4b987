"""`slipstream capacity`: what a base model's adapters and requests take, before there is a server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from slipstream.capacity import read_shape, replicas, target_requests_per_s
from slipstream.cli.session import JsonOption, end, show_json, show_table
from slipstream.errors import InvalidRequest, SlipstreamError

GIB = 1 << 30


class NumberFormat(StrEnum):
    """Of weights and KV cache."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


def capacity(
    model: Annotated[Path, typer.Argument(help="The base model's folder, or its config.json.", show_default=False)],
    *,
    dtype: Annotated[NumberFormat, typer.Option(help="Of weights and KV cache.")] = NumberFormat.BFLOAT16,
    rank: Annotated[int, typer.Option(help="Of the adapters, on all linears.", min=1)] = 16,
    streams: Annotated[int, typer.Option(help="Of each adapter; 0 = LoRAs.", min=0, max=8)] = 3,
    stream_rank: Annotated[
        int | None, typer.Option(help="Of low-rank streams; without it they are dense.", min=1, show_default=False)
    ] = None,
    kv_cache_bytes: Annotated[int, typer.Option(help="As the setting of this name.", min=1)] = GIB,
    host_adapter_bytes: Annotated[int, typer.Option(help="As the setting of this name.", min=1)] = 2 * GIB,
    adapter_slots: Annotated[int, typer.Option(help="As the setting of this name.", min=1)] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Of a typical request.", min=1)] = 500,
    answer_tokens: Annotated[int, typer.Option(help="Of a typical answer.", min=1)] = 200,
    requests_per_s: Annotated[
        float | None, typer.Option(help="That must be served; with --work-per-s.", min=0, show_default=False)
    ] = None,
    work_per_s: Annotated[
        float | None,
        typer.Option(
            help="Measured on one full replica: answer tokens a second, and a fifth of the prompts'.",
            min=0.001,
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Work out what a replica holds, and how many replicas there must be, from the model's config and your own measurement.

    Bytes are exact for models whose layers are Llama's; speed is never guessed: measure one replica.

    Example: slipstream capacity ./my-model --rank 16 --requests-per-s 20 --work-per-s 900
    """
    try:
        shape = read_shape(model, 4 if dtype is NumberFormat.FLOAT32 else 2)
        if (requests_per_s is None) != (work_per_s is None):
            raise InvalidRequest(
                "Give --requests-per-s and --work-per-s together: one says what is wanted, the other what is."
            )
    except SlipstreamError as error:
        end(error)
    adapter = shape.lora_bytes(rank) + (shape.streams_bytes(streams, stream_rank) if streams else 0)
    tokens = shape.kv_tokens(kv_cache_bytes)
    found: dict[str, float | int] = {
        "kv_bytes_per_token": shape.kv_token_bytes,
        "kv_tokens": tokens,
        "sequences_at_once": tokens // (prompt_tokens + answer_tokens),
        "adapter_bytes": adapter,
        "adapters_in_host_memory": host_adapter_bytes // adapter,
        "slot_bytes": adapter_slots * adapter,
    }
    if requests_per_s is not None and work_per_s is not None:
        target = target_requests_per_s(work_per_s, prompt_tokens, answer_tokens)
        found |= {"target_requests_per_s": round(target, 3), "replicas": replicas(requests_per_s, target)}
    if as_json:
        show_json(found)
        return
    show_table(["WHAT", "HOW MUCH"], [[name.replace("_", " "), f"{value:,}"] for name, value in found.items()], "")
