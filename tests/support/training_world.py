"""A base model, rows, and training runs beside each other in one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from support.training import counting_rows, quick_config, save_sharp_model, write_jsonl
from transformers import AutoTokenizer

from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.offline import OfflineEngine, Outcome
from slipstream.engine.offline import Row as EngineRow
from slipstream.protocol import SamplingParams
from slipstream.training.events import Event, Metrics
from slipstream.training.model import TRAINABLE
from slipstream.training.run import TrainingResult, train


@dataclass
class World:
    """A base model, rows, and runs beside each other in one folder."""

    root: Path

    def __post_init__(self) -> None:
        self.base = self.root / "tiny"
        save_sharp_model(self.base, layers=2)
        self.data = write_jsonl(self.root / "train.jsonl", counting_rows(24))
        self.valid = write_jsonl(self.root / "valid.jsonl", counting_rows(8, first=24))
        self.events: list[Event] = []

    def run(self, name: str = "run", watch: Callable[[Event], None] | None = None, **options: Any) -> TrainingResult:
        self.events = []

        def observe(event: Event) -> None:
            self.events.append(event)
            if watch is not None:
                watch(event)

        data = options.pop("data", self.data)
        config = quick_config(self.base, data, self.root / name, valid=self.valid, name="toy", **options)
        return train(config, observe)

    def weights(self, name: str = "run", phase: str = "phase") -> dict[str, torch.Tensor]:
        """What a run ended with."""
        found: dict[str, torch.Tensor] = load_file(self.root / name / phase / TRAINABLE)
        return found

    def losses(self, key: str = "train/lora_loss") -> list[float]:
        """Of every step of the last run."""
        return [event.data[key] for event in self.events if isinstance(event, Metrics) and key in event.data]

    def answer(self, weights: AdapterWeights | None, drafts: int, prompts: list[str], max_tokens: int = 12) -> Outcome:
        """Greedy answers in float32."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        engine = OfflineEngine(self.base, "float32", {} if weights is None else {"it": weights}, device="cpu")
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        name = None if weights is None else "it"
        return engine.run([EngineRow(tokenizer(p)["input_ids"], params, name, drafts) for p in prompts])
