"""How often bf16 text differs: speculation on against off, alone against mixed, and the oracle against itself."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.report import table
from benchmarks.workload import TASKS, adapter_folder, model_path, prompt_ids
from slipstream.adapters.load import load_adapter
from slipstream.engine.config import FastPath
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.protocol import SamplingParams

MAX_TOKENS = 64


def different(a: list[list[int]], b: list[list[int]]) -> int:
    """Answers that are not the same token for token."""
    return sum(x != y for x, y in zip(a, b, strict=True))


@torch.inference_mode()
def oracle_flips(model: Any, prompts: list[list[int]], answers: list[list[int]]) -> tuple[int, int]:
    """Of the model's own greedy answers, how many it would not repeat when all of it is prefilled at once; tokens too."""
    rows = tokens = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        wrong = int((logits.argmax(-1) != torch.tensor(answer)).sum())
        rows += wrong > 0
        tokens += wrong
    return rows, tokens


def main(
    count: Annotated[int, typer.Option(help="Prompts of each task.")] = 100,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    oracle: Annotated[int, typer.Option(help="Prompts of each task for the oracle's own flips; 0 = skip.")] = 25,
) -> None:
    """Answers that change with speculation, and with company, over 2 × count prompts."""
    torch.set_num_threads(2)
    path = model_path()
    adapters = {task: load_adapter(adapter_folder(task)) for task in TASKS}
    everything = (FastPath.ADAPTIVE_DRAFTS,)  # all drafts that there are, copied ones as well
    engine = OfflineEngine(path, dtype, adapters, device="cpu", disable=everything)
    prompts = {task: prompt_ids(task, count) for task in TASKS}

    def run(temperature: float, drafts: int, batch: int) -> list[list[int]]:
        rows = [
            Row(p, SamplingParams(temperature=temperature, seed=i, max_tokens=MAX_TOKENS), task, drafts)
            for i in range(count)
            for task, p in ((task, prompts[task][i]) for task in TASKS)
        ]
        return [answer for at in range(0, len(rows), batch) for answer in engine.run(rows[at : at + batch]).answers]

    rows = []
    for temperature in (0.0, 0.8):
        plain = run(temperature, 0, 32)
        for label, drafts, batch in (("speculation on, 32 at once", 8, 32), ("speculation on, alone", 8, 1)):
            rows.append(
                [f"T={temperature}", label, f"{different(plain, run(temperature, drafts, batch))} / {2 * count}"]
            )
    print(table([dtype, "against off, 32 at once", "answers that differ"], rows))
    if oracle:
        _print_oracle(engine, prompts, dtype, oracle)


def _print_oracle(engine: OfflineEngine, prompts: dict[str, list[list[int]]], dtype: str, count: int) -> None:
    rows = []
    for task in TASKS:
        base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=getattr(torch, dtype))
        model = PeftModel.from_pretrained(base, adapter_folder(task)).to(getattr(torch, dtype)).eval()
        subset = prompts[task][:count]
        theirs = []
        with torch.inference_mode():
            for prompt in subset:
                ids = torch.tensor([prompt])
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS,
                    pad_token_id=0,
                )  # fmt: skip
                theirs.append(out[0, len(prompt) :].tolist())
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
        mine = engine.run([Row(p, params, task, 8) for p in subset]).answers
        answers, tokens = oracle_flips(model, subset, theirs)
        total = sum(len(t) for t in theirs)
        rows.append([task, f"{answers} / {count} ({tokens} of {total} tokens)", f"{different(mine, theirs)} / {count}"])
    print()
    print(table(["task", f"{dtype} oracle: decode against its own prefill", "ours against the oracle's decode"], rows))
