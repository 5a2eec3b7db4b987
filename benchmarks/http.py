"""Output tokens/s and time to first token over HTTP, against a running `slipstream serve`."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import openai
import typer

from benchmarks.peers.hf import write_peft
from benchmarks.report import Series, table
from benchmarks.workload import NUM_ADAPTERS, adapter_folder, eight_adapters, prompts
from slipstream.adapters.save import TurboMetadata, save_turbo
from slipstream.client import SlipstreamClient

CONCURRENCY = (1, 8, 32)


@dataclass(frozen=True)
class Answered:
    """One request's figures."""

    tokens: int
    steps: int
    first_s: float


async def publish(url: str, key: str) -> None:
    """Push the eight adapters as bench-0 … bench-7."""
    client = SlipstreamClient(url, key)
    adapters = eight_adapters()
    base = json.loads((adapter_folder("snips") / "config.json").read_text())["base_model_name_or_path"]
    for i, (name, folder) in enumerate(write_peft(adapters).items()):
        streams = adapters[name].streams
        assert streams is not None
        save_turbo(folder, streams, TurboMetadata(base_model=base))
        await client.push(folder, f"bench-{i}")


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int, spec: bool, stream: bool) -> Answered:
    """One completion of fixed length."""
    extra = {"ignore_eos": True, "speculation": spec}
    began = time.perf_counter()
    if not stream:
        done = await client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=extra
        )
        assert done.usage is not None
        return Answered(done.usage.completion_tokens, done.usage.decode_steps, time.perf_counter() - began)  # type: ignore[attr-defined]
    chunks = await client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=extra, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    first, usage = 0.0, None
    async for chunk in chunks:
        first = first or time.perf_counter() - began
        usage = chunk.usage or usage
    assert usage is not None
    return Answered(usage.completion_tokens, usage.decode_steps, first)  # type: ignore[attr-defined]


async def measure(url: str, key: str, rounds: int, tokens: int) -> None:
    """Interleaved rounds over systems and concurrency."""
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=600)
    base = (await client.models.list()).data[0].id
    texts = prompts("snips", max(CONCURRENCY))
    loras = [f"bench-{i}" for i in range(NUM_ADAPTERS)]
    systems: dict[str, tuple[Sequence[str], bool, bool]] = {
        "base": ([base], False, False),
        "8 LoRAs": (loras, False, False),
        "8 Turbo LoRAs": (loras, True, False),
        "8 Turbo LoRAs, streamed": (loras, True, True),
    }
    speed = {(name, n): Series() for name in systems for n in CONCURRENCY}
    first: list[float] = []
    for round_ in range(rounds + 1):
        for n in CONCURRENCY:
            for name, (models, spec, stream) in systems.items():
                began = time.perf_counter()
                calls = [ask(client, models[i % len(models)], texts[i], tokens, spec, stream) for i in range(n)]
                answers = await asyncio.gather(*calls)
                if round_:
                    speed[name, n].values.append(sum(a.tokens for a in answers) / (time.perf_counter() - began))
                    if stream and n == 1:
                        first += [a.first_s for a in answers]
    rows = [[name, *(str(speed[name, n]) for n in CONCURRENCY)] for name in systems]
    print(table(["over HTTP", *(f"{n} at once" for n in CONCURRENCY)], rows))
    print(f"\ntime to first token at 1, streamed: median {1000 * statistics.median(first):.0f} ms")


def main(
    url: Annotated[str, typer.Option(envvar="SLIPSTREAM_URL")] = "http://127.0.0.1:8000",
    key: Annotated[str, typer.Option(envvar="SLIPSTREAM_API_KEY")] = "",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds after one to warm up.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 48,
) -> None:
    """Over HTTP, through Ray Serve's default proxy: base, LoRA and Turbo LoRA."""

    async def run() -> None:
        await publish(url, key)
        await measure(url, key, rounds, tokens)

    asyncio.run(run())
