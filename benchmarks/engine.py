"""Output tokens/s of the engine alone beside transformers, PEFT, vLLM and llama.cpp, interleaved, at 1, 8 and 32 at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.peers.client import Peer, llama
from benchmarks.peers.client import vllm as start_vllm
from benchmarks.peers.hf import generate, peft_mixed, write_peft
from benchmarks.results import Results
from benchmarks.workload import NUM_ADAPTERS, eight_adapters, model_path, prompt_ids
from slipstream.engine.loader import pick_dtype
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.protocol import SamplingParams

CONCURRENCY = (1, 8, 32)
REQUESTS = {1: 4, 8: 32, 32: 64}  # of our fixed-length rows, so many at a time: drafts make answers end apart
END_TOKENS = 96  # cap of the answers that run to their end
Run = Callable[[int], tuple[float, float]]  # requests at once → (output tokens/s, tokens per step)
PAIRS = [
    ("Slipstream base", "transformers base"),
    ("Slipstream base", "vLLM base"),
    ("Slipstream 8 LoRAs", "PEFT 8 LoRAs"),
    ("Slipstream 8 LoRAs", "vLLM 8 LoRAs"),
    ("Slipstream 8 Turbo LoRAs", "vLLM 8 LoRAs"),
    ("Slipstream 8 Turbo LoRAs", "Slipstream 8 LoRAs"),
    ("Slipstream 8 Turbo LoRAs, to end", "vLLM 8 LoRAs, to end"),
    ("Slipstream 8 Turbo LoRAs, to end", "vLLM 8 LoRAs, n-gram, to end"),
    ("Slipstream 8 Turbo LoRAs, to end", "Slipstream 8 LoRAs, to end"),
    ("Slipstream base", "llama.cpp base, 4 bits"),
    ("Slipstream 8 Turbo LoRAs", "llama.cpp base, 4 bits"),
    ("Slipstream 8 Turbo LoRAs, to end", "llama.cpp base, 4 bits"),
]


def names_of(count: int, task: str = "snips") -> list[str]:
    """The adapter of each request: eight in turn."""
    return [f"{task}-{i % NUM_ADAPTERS}" for i in range(count)]


def slipstream(
    engine: OfflineEngine,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    lora: bool,
    drafts: int,
    task: str = "snips",
) -> Run:
    """Our engine on answers of a fixed length, `count` at a time all along, or (`tokens` 0) on `count` to their end.

    The peers' answers of a fixed length all end together, so that one wave of them runs at `count` all along, too. One at a
    time, everybody answers the same few prompts one after the other.
    """

    def run(count: int) -> tuple[float, float]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens or END_TOKENS, ignore_eos=bool(tokens))
        total = REQUESTS[count] if tokens or count == 1 else count
        names = names_of(total, task) if lora else [None] * total
        rows = [Row(p, params, name, drafts) for p, name in zip(prompts, names, strict=False)]
        outcome = engine.run(rows, concurrency=count)
        return outcome.tokens_per_s, outcome.tokens_per_step

    return run


def beside(peer: Peer, prompts: Sequence[Sequence[int]], tokens: int, *, lora: bool) -> Run:
    """A peer in a process of its own on the same."""

    def run(count: int) -> tuple[float, float]:
        waves = REQUESTS[1] if count == 1 else 1
        names: Sequence[str | None] = names_of(waves * count) if lora else [None] * (waves * count)
        done = [
            peer.run(prompts[at : at + count], names[at : at + count], tokens or END_TOKENS, to_end=not tokens)
            for at in range(0, waves * count, count)
        ]
        return sum(each.tokens for each in done) / sum(each.seconds for each in done), 1.0

    return run


def transformers(model: object, prompts: Sequence[Sequence[int]], tokens: int, *, lora: bool) -> Run:
    """transformers' or PEFT's `generate`."""

    def run(count: int) -> tuple[float, float]:
        seconds = generate(model, prompts[:count], tokens, names_of(count) if lora else None)
        return count * tokens / seconds, 1.0

    return run


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length of the fixed-length rows.")] = 48,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32, for all sides.")] = "auto",
    peers: Annotated[bool, typer.Option(help="Run the peers (make bench-peers) beside us.")] = True,
    task: Annotated[str, typer.Option(help="Adapters and prompts: snips, or (without peers) wikisql.")] = "snips",
) -> None:
    """Engine alone: base, eight LoRAs mixed, eight Turbo LoRAs mixed, beside transformers, PEFT, vLLM and llama.cpp."""
    torch.set_num_threads(threads)
    path, kind = model_path(), pick_dtype(dtype, torch.device("cpu"))
    dtype = str(kind).removeprefix("torch.")
    if peers and task != "snips":
        raise typer.BadParameter("the peers run on snips; add --no-peers", param_hint="task")
    prompts = prompt_ids(task, max(REQUESTS.values()))
    adapters = eight_adapters(task)
    engine = OfflineEngine(path, dtype, adapters, device="cpu", disable=())
    ours = partial(slipstream, engine, prompts, task=task)
    runs: dict[str, Run] = {
        "Slipstream base": ours(tokens, lora=False, drafts=0),
        "Slipstream 8 LoRAs": ours(tokens, lora=True, drafts=0),
        "Slipstream 8 Turbo LoRAs": ours(tokens, lora=True, drafts=8),
        "Slipstream 8 LoRAs, to end": ours(0, lora=True, drafts=0),
        "Slipstream 8 Turbo LoRAs, to end": ours(0, lora=True, drafts=8),
    }
    name = "engine" if task == "snips" else f"engine-{task}"
    results = Results(name, f"SmolLM2-135M, {dtype}, {threads} CPU threads, engine alone", CONCURRENCY)
    with ExitStack() as stack:
        if peers:
            folders = write_peft(adapters)
            base = stack.enter_context(start_vllm(path, dtype, threads=threads))
            mixed = stack.enter_context(start_vllm(path, dtype, folders, threads=threads))
            ngram = stack.enter_context(start_vllm(path, dtype, folders, ngram=True, threads=threads))
            small = stack.enter_context(llama(threads))
            plain = AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval()
            runs |= {
                "transformers base": transformers(plain, prompts, tokens, lora=False),
                "PEFT 8 LoRAs": transformers(peft_mixed(path, kind, folders), prompts, tokens, lora=True),
                "vLLM base": beside(base, prompts, tokens, lora=False),
                "vLLM 8 LoRAs": beside(mixed, prompts, tokens, lora=True),
                "vLLM 8 LoRAs, to end": beside(mixed, prompts, 0, lora=True),
                "vLLM 8 LoRAs, n-gram, to end": beside(ngram, prompts, 0, lora=True),
                "llama.cpp base, 4 bits": beside(small, prompts, tokens, lora=False),
            }
        with typer.progressbar(length=(rounds + 1) * len(CONCURRENCY) * len(runs), label="Measuring") as bar:
            for round_ in range(rounds + 1):
                for n in CONCURRENCY:
                    for name, run in runs.items():
                        measured = run(n)
                        bar.update(1)
                        if round_:  # the first round warms up
                            results.add(name, n, *measured)
    options = {"rounds": rounds, "tokens": tokens, "threads": threads, "dtype": dtype, "task": task}
    command = " ".join(["python -m benchmarks engine", *(f"--{name} {value}" for name, value in options.items())])
    print("\n" + results.write(PAIRS, {"command": command}))
