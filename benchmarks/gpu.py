"""A GPU's decode steps on a Mistral-7B-shaped random model in bf16: memory floor, many adapters, forced acceptance, scaling.

Needs a CUDA device (torch, transformers and Triton; no Ray, no PEFT, no data). `--shape tiny --device cpu` goes through the
same steps anywhere, and measures nothing.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from importlib.util import find_spec
from typing import Annotated

import torch
import typer
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig

from benchmarks.forced import run as run_forced
from benchmarks.report import table
from benchmarks.results import Results
from slipstream.adapters.weights import AdapterWeights, LoraModule, StreamWeights
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.protocol import SamplingParams

SHAPES = {
    "mistral-7b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "max_position_embeddings": 32768,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 1024,
    },
}  # fmt: skip
ACCEPTANCE = (0.95, 0.85, 0.75)
ADAPTERS, RANK, STREAMS, STREAM_RANK = 32, 16, 7, 256
BATCHES = (1, 4, 16, 32, 64, 128, 256)
DRAFTS = (0, 1, 3, 5, 7)
PROMPT = 32  # tokens


def random_adapter(model: nn.Module, seed: int) -> AdapterWeights:
    """A small random LoRA on every linear of the decoder, and low-rank streams."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return 0.01 * torch.randn(*shape, generator=generator)

    lora = {
        name: LoraModule(randn(RANK, m.in_features), randn(m.out_features, RANK), 1.0)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "lm_head" not in name
    }
    hidden = next(m for n, m in model.named_modules() if n.endswith("lm_head")).in_features
    a, b = randn(STREAMS, STREAM_RANK, hidden), randn(STREAMS, hidden, STREAM_RANK)
    return AdapterWeights(lora, StreamWeights(torch.zeros(STREAMS, hidden), a=a, b=b))


def copy_speed(device: torch.device) -> float:
    """Bytes a second that the device's memory gives: half of what a large copy moves, read and written."""
    source = torch.empty(1 << 30 if device.type == "cuda" else 1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        _synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * len(source) / min(times)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(count: int, tokens: int, adapters: int, drafts: int, vocab: int) -> list[Row]:
    """Requests of fixed length on so many adapters in turn (0 = the base)."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocab, (count, PROMPT), generator=generator).tolist()
    return [Row(p, params, f"a{i % adapters}" if adapters else None, drafts) for i, p in enumerate(prompts)]


def step_s(engine: OfflineEngine, count: int, tokens: int, adapters: int, vocab: int) -> float:
    """Seconds of a decode step without drafts: what twice as many tokens take longer."""
    engine.run(rows_of(count, 4, adapters, 0, vocab))
    short, long = (engine.run(rows_of(count, n, adapters, 0, vocab)).seconds for n in (tokens, 2 * tokens))
    return (long - short) / tokens


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "mistral-7b",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the command.")] = "cuda",
    rounds: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length.")] = 96,
    largest: Annotated[int, typer.Option(help="Largest batch of the scaling table.")] = BATCHES[-1],
) -> None:
    """On a GPU: step against memory floor, 32 adapters against the base, forced acceptance, batch × drafts."""
    torch.manual_seed(0)
    where = torch.device(device)
    config = MistralConfig(**SHAPES[shape])
    with where:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    adapters = {f"a{i}": random_adapter(model, i) for i in range(ADAPTERS)}
    read = sum(p.numel() * p.element_size() for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    engine = OfflineEngine(
        model, adapters=adapters, eos=frozenset(), max_num_seqs=largest, max_batched_tokens=max(2048, 8 * largest),
        kv_cache_bytes=(8 << 30) if where.type == "cuda" else (1 << 28),
    )  # fmt: skip
    floor = read / copy_speed(where)
    vocab = config.vocab_size
    alone, base, mixed = [], [], []
    for _ in range(rounds):
        alone.append(step_s(engine, 1, tokens, 0, vocab))
        base.append(step_s(engine, ADAPTERS, tokens, 0, vocab))
        mixed.append(step_s(engine, ADAPTERS, tokens, ADAPTERS, vocab))
    step, ratio = statistics.median(alone), statistics.median(m / b for m, b in zip(mixed, base, strict=True))
    lines = [
        ["decode step, 1 sequence, base", f"{1000 * step:.2f} ms", f"{step / floor:.2f} of the floor"],
        [
            f"{ADAPTERS} adapters of rank {RANK} at batch {ADAPTERS}",
            f"{1000 * statistics.median(mixed):.2f} ms",
            f"{ratio:.2f} of base",
        ],
    ]
    print(table([f"{shape}, bf16", "measured", "goal 1.25 / 1.10"], lines))
    batches = tuple(b for b in BATCHES if b <= largest)
    results = Results("gpu", f"{shape}, bf16, drafts right with {ACCEPTANCE}, by drafts a step", batches)
    for _ in range(rounds):
        for n in batches:
            plain = engine.run(rows_of(n, tokens, min(n, ADAPTERS), 0, vocab))
            results.add("K = 0", n, plain.tokens_per_s, plain.tokens_per_step)
            for k in DRAFTS[1:]:
                rows = [replace(row, draft_cap=k) for row in rows_of(n, tokens, min(n, ADAPTERS), 0, vocab)]
                found = run_forced(engine, rows, ACCEPTANCE, plain.answers)
                results.add(f"K = {k}", n, found.tokens_per_s, found.tokens_per_step)
    pairs = [(f"K = {k}", "K = 0") for k in DRAFTS[1:]]
    if where.type == "cuda" and find_spec("matplotlib") is not None:
        command = f"python -m benchmarks.gpu --shape {shape} --rounds {rounds} --tokens {tokens}"
        print(results.write(pairs, {"command": command, "device": torch.cuda.get_device_name(where)}))
    else:
        print(results.markdown(pairs))


if __name__ == "__main__":  # by itself: the other commands want what such a machine may not have
    typer.run(main)
