"""One engine on one rank and on two, side by side on this machine's cores: step time, and bytes over collectives."""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import tempfile
import time
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.report import Series, ratio, table
from benchmarks.workload import model_path
from slipstream.engine.build import follow
from slipstream.engine.config import EngineConfig
from slipstream.engine.parallel.ranks import Follower, Lead
from slipstream.engine.service import EngineService
from slipstream.errors import Unavailable
from slipstream.protocol import AdapterRef, GenerateRequest, SamplingParams

HOST = "127.0.0.1"
COUNTS = (1, 8, 32)
SIZES = {"one rank": 1, "two ranks": 2}


class _NoAdapters:
    async def fetch(self, ref: AdapterRef, destination: Path) -> None:
        raise Unavailable(f"no adapter {ref.digest}")


def random_model(folder: Path) -> None:
    """SmolLM2-135M's shape but for 8 query and 4 KV heads, which two ranks can share."""
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=8, num_key_value_heads=4,
        head_dim=72, vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)


async def step_ms(engine: EngineService, count: int, tokens: int) -> float:
    """Milliseconds a decode step, with `count` requests at once."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = [GenerateRequest(f"r{i}", "bench", params, token_ids=tuple(range(i + 5, i + 40))) for i in range(count)]
    times: list[list[float]] = [[] for _ in requests]

    async def one(i: int, request: GenerateRequest) -> None:
        async for _ in engine.generate(request):
            times[i].append(time.perf_counter())

    await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))
    last = times[-1]
    return 1000 * statistics.median(b - a for a, b in pairwise(last[2:]))


def _engine(pipe: Connection, config: EngineConfig, size: int) -> None:
    """A process with one engine: answers numbers of requests with step times until it is told None."""

    async def serve() -> None:
        lead = Lead(HOST, size) if size > 1 else None
        if lead is not None:
            follower = Follower(lead.meeting, 1, size, HOST)
            multiprocessing.get_context("spawn").Process(target=follow, args=(config, follower)).start()
        engine = EngineService(config, _NoAdapters(), lead)
        await engine.start()
        pipe.send(0.0)
        while (asked := await asyncio.to_thread(pipe.recv)) is not None:
            pipe.send(await step_ms(engine, *asked))
        await engine.close()

    asyncio.run(serve())


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 32,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Step time with tensor_parallel_size 1 (two threads) and 2 (one thread each), in turn."""
    found = {(name, n): Series() for name in SIZES for n in COUNTS}
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder))
        pipes = {}
        for name, size in SIZES.items():
            config = EngineConfig(
                model_path=folder, model_id="random", dtype=dtype, device="cpu", num_threads=2 // size
            )
            pipes[name], far = multiprocessing.Pipe()
            multiprocessing.get_context("spawn").Process(target=_engine, args=(far, config, size)).start()
        for pipe in pipes.values():
            pipe.recv()
        for round_ in range(rounds + 1):
            for n in COUNTS:
                for name, pipe in pipes.items():
                    pipe.send((n, tokens))
                    value = pipe.recv()
                    if round_:  # the first round warms up
                        found[name, n].values.append(value)
        for pipe in pipes.values():
            pipe.send(None)
    heads = [f"{n} at once" for n in COUNTS]
    print(table(["ms a step, median (min–max)", *heads], [[s, *(str(found[s, n]) for n in COUNTS)] for s in SIZES]))
    row = ["two ranks / one rank", *(ratio(found["two ranks", n], found["one rank", n]) for n in COUNTS)]
    print(table(["ratio, round by round", *heads], [row]))
