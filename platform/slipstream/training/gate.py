"""Whether speculation pays, decided on held-out rows before an adapter is published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from slipstream.errors import InvalidRequest
from slipstream.evaluation.result import Evaluation

WORTH_IT = 1.1  # times as fast as without; below, the risk of a slow-down under load is not worth the gain
LORA_TOLERANCE = 0.01  # of the plain LoRA's evaluation loss
METRICS = "metrics.json"


@dataclass(frozen=True, slots=True)
class Gate:
    """`speculation`: what the version's policy starts as. `expected_speedup`: None when it was not measured."""

    speculation: bool
    reason: str
    expected_speedup: float | None = None


def decide(evaluation: Evaluation | None, fast: str | None, slow: str) -> Gate:
    """`fast` and `slow`: the variants with speculation on and off; `fast` is None for an adapter without a speculator."""
    if fast is None:
        return Gate(True, "")
    if evaluation is None:
        return Gate(True, "Not measured: no held-out rows were answered.")
    steps = evaluation.variants[fast].tokens_per_step
    # Nothing is faster than the steps that it saves: what a busy machine measured beyond that is noise.
    found = min(evaluation.variants[fast].speedup[slow].median, steps)
    rows = evaluation.variants[fast].rows
    measured = f"{found:.2f} times as fast with speculation ({steps:.2f} tokens per step, {rows} held-out rows)"
    if found < WORTH_IT:
        return Gate(False, f"Only {measured}; below {WORTH_IT} it stays off.", found)
    return Gate(True, f"{measured[0].upper()}{measured[1:]}.", found)


def reference_loss(reference: Path) -> float:
    """The last `eval_lora_loss` of the run in `reference`. Raises `InvalidRequest`."""
    try:
        return float(json.loads((reference / METRICS).read_text("utf-8"))["eval_lora_loss"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{reference} has no {METRICS} with an eval_lora_loss. Give the output folder of a finished lora run that had "
            "validation rows.",
            param="lora_reference",
        ) from error


def compare_with_lora(loss: float, gate: float, reference: Path | None) -> tuple[str, bool]:
    """A sentence about the LoRA's own evaluation loss beside a plain LoRA's, and whether it is a warning.

    reference: the output folder of a `lora` run on the same rows, or None.
    """
    if reference is not None:
        plain = reference_loss(reference)
        change = loss / plain - 1
        text = f"LoRA evaluation loss {loss:.4f}, plain LoRA {plain:.4f} ({change:+.1%})"
        worse = change > LORA_TOLERANCE
        return (f"{text}: worse than 1%. Train with a smaller gate.", True) if worse else (f"{text}.", False)
    if gate == 0:
        return "gate 0: the speculator leaves the LoRA exactly as plain LoRA training would make it.", False
    return "Not compared with plain LoRA training: give lora_reference, the output folder of such a run.", False
