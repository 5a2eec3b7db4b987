"""Output tokens/s of the engine alone beside transformers, PEFT, vLLM and llama.cpp, interleaved, at 1, 8 and 32 at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.peers.client import Peer, llama
from benchmarks.peers.client import vllm as start_vllm
from benchmarks.peers.hf import generate, peft_mixed, write_peft
from benchmarks.results import Results
from benchmarks.workload import NUM_ADAPTERS, eight_adapters, model_path, prompt_ids
from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.loader import pick_dtype
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.protocol import SamplingParams

CONCURRENCY = (1, 8, 32)
REQUESTS = {1: 8, 8: 32, 32: 64}  # of our fixed-length rows, so many at a time: drafts make answers end apart
PLAIN = "plain-"  # begins the names of LoRAs without their streams
END_TOKENS = 96  # cap of the answers that run to their end
WARM_UP = 30  # requests that each adapter has answered before the first round, as one in service long has


@dataclass(frozen=True)
class Turn:
    """One turn of all systems: requests at once, and prompts that nobody has seen yet, for answers of a fixed length and for
    those that run to their end."""

    count: int
    fixed: Sequence[list[int]]
    ended: Sequence[list[int]]

    @staticmethod
    def of(count: int, prompts: Iterator[list[int]]) -> Turn:
        """The next prompts. One at a time, everybody answers a few one after the other (transformers and PEFT one)."""
        fixed, ended = Turn.sizes(count)
        return Turn(count, list(islice(prompts, fixed)), list(islice(prompts, ended)))

    @staticmethod
    def sizes(count: int) -> tuple[int, int]:
        """Prompts of a turn, of either kind."""
        return REQUESTS[count], REQUESTS[count] if count == 1 else count


Run = Callable[[Turn], tuple[float, float]]  # → (output tokens/s, tokens per step)
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


class Kind(StrEnum):
    """What of ours answers."""

    BASE = "base"
    LORA = "8 LoRAs"
    TURBO = "8 Turbo LoRAs"


def with_plain(adapters: Mapping[str, AdapterWeights]) -> dict[str, AdapterWeights]:
    """Turbo LoRAs and, under names of their own, their LoRAs: in one engine, where none knows what the other has said."""
    return {**adapters, **{f"{PLAIN}{name}": replace(weights, streams=None) for name, weights in adapters.items()}}


def names_of(count: int, task: str = "snips") -> list[str]:
    """The adapter of each request: eight in turn."""
    return [f"{task}-{i % NUM_ADAPTERS}" for i in range(count)]


def slipstream(engine: OfflineEngine, tokens: int, kind: Kind, *, task: str = "snips", temperature: float = 0.0) -> Run:
    """Our engine (`with_plain`) on answers of a fixed length, as many at a time all along, or (`tokens` 0) to their end.

    The peers' answers of a fixed length all end together, so that one wave of them runs at that many all along, too.
    """

    def run(turn: Turn) -> tuple[float, float]:
        params = SamplingParams(temperature=temperature, max_tokens=tokens or END_TOKENS, ignore_eos=bool(tokens))
        prompts = turn.fixed if tokens else turn.ended
        rows = []
        for i, (prompt, turbo) in enumerate(zip(prompts, names_of(len(prompts), task), strict=True)):
            name = {Kind.BASE: None, Kind.LORA: f"{PLAIN}{turbo}", Kind.TURBO: turbo}[kind]
            rows.append(Row(prompt, replace(params, seed=i), name, 8 if kind is Kind.TURBO else 0))
        outcome = engine.run(rows, concurrency=turn.count)
        return outcome.tokens_per_s, outcome.tokens_per_step

    return run


def beside(peer: Peer, tokens: int, *, lora: bool) -> Run:
    """A peer in a process of its own on the same."""

    def run(turn: Turn) -> tuple[float, float]:
        count, prompts = turn.count, turn.fixed if tokens else turn.ended
        waves = REQUESTS[1] if count == 1 else 1
        names: Sequence[str | None] = names_of(waves * count) if lora else [None] * (waves * count)
        done = [
            peer.run(prompts[at : at + count], names[at : at + count], tokens or END_TOKENS, to_end=not tokens)
            for at in range(0, waves * count, count)
        ]
        return sum(each.tokens for each in done) / sum(each.seconds for each in done), 1.0

    return run


def transformers(model: object, tokens: int, *, lora: bool) -> Run:
    """transformers' or PEFT's `generate`."""

    def run(turn: Turn) -> tuple[float, float]:
        seconds = generate(model, turn.fixed[: turn.count], tokens, names_of(turn.count) if lora else None)
        return turn.count * tokens / seconds, 1.0

    return run


def warm(peer: Peer, prompts: Sequence[list[int]], *, lora: bool) -> None:
    """Show a peer the prompts that ours have answered before, for its prefix cache."""
    most = max(CONCURRENCY)
    for at in range(0, len(prompts), most):
        some = prompts[at : at + most]
        peer.run(some, names_of(len(some)) if lora else [None] * len(some), 1, to_end=False)


def peer_runs(
    stack: ExitStack,
    path: Path,
    kind: torch.dtype,
    adapters: Mapping[str, AdapterWeights],
    tokens: int,
    threads: int,
    caching: bool,
    past: Sequence[list[int]],
) -> dict[str, Run]:
    """Everybody else, each in its best mode, after the prompts of `past`; their processes end with `stack`."""
    dtype, folders = str(kind).removeprefix("torch."), write_peft(adapters)
    vllm = partial(start_vllm, path, dtype, prefix_caching=caching, threads=threads)
    base = stack.enter_context(vllm())
    mixed = stack.enter_context(vllm(folders))
    ngram = stack.enter_context(vllm(folders, ngram=True))
    small = stack.enter_context(llama(threads, prefix_caching=caching))
    for peer in (base, mixed, ngram, small):
        warm(peer, past, lora=peer in (mixed, ngram))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval()
    return {
        "transformers base": transformers(plain, tokens, lora=False),
        "PEFT 8 LoRAs": transformers(peft_mixed(path, kind, folders), tokens, lora=True),
        "vLLM base": beside(base, tokens, lora=False),
        "vLLM 8 LoRAs": beside(mixed, tokens, lora=True),
        "vLLM 8 LoRAs, to end": beside(mixed, 0, lora=True),
        "vLLM 8 LoRAs, n-gram, to end": beside(ngram, 0, lora=True),
        "llama.cpp base, 4 bits": beside(small, tokens, lora=False),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length of the fixed-length rows.")] = 48,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32, for all sides.")] = "auto",
    peers: Annotated[bool, typer.Option(help="Run the peers (make bench-peers) beside us.")] = True,
    task: Annotated[str, typer.Option(help="Adapters and prompts: snips, or (without peers) wikisql.")] = "snips",
    temperature: Annotated[float, typer.Option(help="Of our rows; without peers.")] = 0.0,
    prefix_caching: Annotated[bool, typer.Option(help="Ours, vLLM's and llama.cpp's. Prompts begin alike.")] = True,
) -> None:
    """Engine alone: base, eight LoRAs mixed, eight Turbo LoRAs mixed, beside transformers, PEFT, vLLM and llama.cpp."""
    torch.set_num_threads(threads)
    path, kind = model_path(), pick_dtype(dtype, torch.device("cpu"))
    dtype = str(kind).removeprefix("torch.")
    if peers and (task != "snips" or temperature):
        raise typer.BadParameter("the peers run on snips, greedily; add --no-peers", param_hint="task")
    rows = prompt_ids(task)
    most = len(rows) // sum(sum(Turn.sizes(n)) for n in CONCURRENCY) - 1
    if rounds > most:
        raise typer.BadParameter(f"{task} has new prompts for {most} rounds; ask for no more", param_hint="rounds")
    adapters = eight_adapters(task)
    engine = OfflineEngine(path, dtype, with_plain(adapters), device="cpu", disable=(), prefix_caching=prefix_caching)
    ours = partial(slipstream, engine, task=task, temperature=temperature)
    ended = {kind: ours(0, kind) for kind in (Kind.TURBO, Kind.LORA)}
    runs: dict[str, Run] = {f"Slipstream {kind}": ours(tokens, kind) for kind in Kind}
    runs |= {f"Slipstream {kind}, to end": run for kind, run in ended.items()}
    options = {
        "rounds": rounds, "tokens": tokens, "threads": threads, "dtype": dtype, "task": task, "temperature": temperature,
    }  # fmt: skip
    flags = [f"--{name} {value}" for name, value in options.items()]
    flags += [f"--no-{name}" for name, wanted in (("peers", peers), ("prefix-caching", prefix_caching)) if not wanted]
    kept = [*([task] if task != "snips" else []), *([f"t{temperature}"] if temperature else [])]
    kept += [*([] if prefix_caching else ["no-prefixes"]), *([] if peers or kept else ["alone"])]
    results = Results(
        "-".join(["engine", *kept]), f"SmolLM2-135M, {dtype}, {threads} CPU threads, engine alone", CONCURRENCY
    )
    past = prompt_ids(task, WARM_UP * NUM_ADAPTERS, split="valid")
    with ExitStack() as stack:
        if peers:
            runs |= peer_runs(stack, path, kind, adapters, tokens, threads, prefix_caching, past)
        with typer.progressbar(length=(rounds + 1) * len(CONCURRENCY) * len(runs), label="Measuring") as bar:
            for run in ended.values():
                run(Turn(max(CONCURRENCY), (), past))
            prompts = iter(rows)
            for round_ in range(rounds + 1):
                for n in CONCURRENCY:
                    turn = Turn.of(n, prompts)
                    for name, run in runs.items():
                        measured = run(turn)
                        bar.update(1)
                        if round_:  # the first round warms up
                            results.add(name, n, *measured)
    command = " ".join(["python -m benchmarks engine", *flags])
    print("\n" + results.write(PAIRS, {"command": command}))
