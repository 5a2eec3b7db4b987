"""Output tokens/s of the engine alone beside transformers and PEFT `generate`, interleaved, at 1, 8 and 32 at once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.report import Series, ratio, table
from benchmarks.workload import NUM_ADAPTERS, adapter_folder, eight_adapters, model_path, prompt_ids
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.protocol import SamplingParams

CONCURRENCY = (1, 8, 32)
System = Callable[[int], tuple[float, float]]  # requests at once → (output tokens/s, tokens per step)


def ours(
    engine: OfflineEngine, prompts: Sequence[Sequence[int]], tokens: int, *, lora: bool, drafts: int, to_end: bool
) -> System:
    """Our engine on fixed-length answers, or to the end of sequence."""

    def run(count: int) -> tuple[float, float]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=not to_end)
        rows = [Row(prompts[i], params, f"snips-{i % NUM_ADAPTERS}" if lora else None, drafts) for i in range(count)]
        outcome = engine.run(rows)
        return outcome.tokens_per_s, outcome.tokens_per_step

    return run


def generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int, adapters: Sequence[str] | None) -> System:
    """transformers' or PEFT's `generate` on one left-padded batch; fixed length."""

    def run(count: int) -> tuple[float, float]:
        width = max(len(p) for p in prompts[:count])
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts[:count]])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts[:count]])
        extra = {"adapter_names": [adapters[i % len(adapters)] for i in range(count)]} if adapters else {}
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
                pad_token_id=0, **extra,
            )  # fmt: skip
        return count * tokens / (time.perf_counter() - began), 1.0

    return run


def peft_mixed(path: Path, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """PEFT with the same eight adapters, for mixed batches by `adapter_names`."""
    names = [f"snips-{i}" for i in range(NUM_ADAPTERS)]
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    weights = eight_adapters()
    model: Any = None
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            write_peft(Path(folder), weights[name].lora)
            if model is None:
                model = PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                model.load_adapter(folder, adapter_name=name)
    return model.to(dtype).eval(), names


def write_peft(folder: Path, lora: Any) -> None:
    source = adapter_folder("snips")
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    for path, module in lora.items():
        tensors[f"base_model.model.{path}.lora_B.weight"] = module.b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; the median counts.")] = 3,
    tokens: Annotated[int, typer.Option(help="Answer length of the fixed-length rows.")] = 48,
    threads: Annotated[int, typer.Option(help="torch threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Engine alone: base, eight LoRAs mixed, eight Turbo LoRAs mixed, beside transformers and PEFT."""
    torch.set_num_threads(threads)
    path, kind = model_path(), getattr(torch, dtype)
    prompts = prompt_ids("snips", max(CONCURRENCY))
    engine = OfflineEngine(path, dtype, eight_adapters(), device="cpu")
    peft_model, names = peft_mixed(path, kind)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=kind).eval()
    systems: dict[str, System] = {
        "transformers base": generate(plain, prompts, tokens, None),
        "Slipstream base": ours(engine, prompts, tokens, lora=False, drafts=0, to_end=False),
        "PEFT 8 LoRAs": generate(peft_model, prompts, tokens, names),
        "Slipstream 8 LoRAs": ours(engine, prompts, tokens, lora=True, drafts=0, to_end=False),
        "Slipstream 8 Turbo LoRAs": ours(engine, prompts, tokens, lora=True, drafts=8, to_end=False),
        "Slipstream 8 LoRAs, to end": ours(engine, prompts, 96, lora=True, drafts=0, to_end=True),
        "Slipstream 8 Turbo LoRAs, to end": ours(engine, prompts, 96, lora=True, drafts=8, to_end=True),
    }
    speed = {(name, n): Series() for name in systems for n in CONCURRENCY}
    steps: dict[str, float] = {}
    for round_ in range(rounds + 1):
        for n in CONCURRENCY:
            for name, system in systems.items():
                value, steps[name] = system(n)
                if round_:  # the first round warms up
                    speed[name, n].values.append(value)
    _print(systems, speed, steps)


def _print(systems: dict[str, System], speed: dict[tuple[str, int], Series], steps: dict[str, float]) -> None:
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, output tokens/s, median (min–max)\n")
    rows = [[name, *(str(speed[name, n]) for n in CONCURRENCY), f"{steps[name]:.2f}"] for name in systems]
    print(table(["system", *(f"{n} at once" for n in CONCURRENCY), "tokens/step at 32"], rows))
    pairs = [
        ("Slipstream base", "transformers base"),
        ("Slipstream 8 LoRAs", "PEFT 8 LoRAs"),
        ("Slipstream 8 Turbo LoRAs", "Slipstream 8 LoRAs"),
        ("Slipstream 8 Turbo LoRAs, to end", "Slipstream 8 LoRAs, to end"),
    ]
    rows = [[f"{a} / {b}", *(ratio(speed[a, n], speed[b, n]) for n in CONCURRENCY)] for a, b in pairs]
    print()
    print(table(["ratio, round by round", *(f"{n}" for n in CONCURRENCY)], rows))
