"""Everything a training run can be told. Torch-free: the HTTP side validates a job's options with it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from adapter_registry.records import Name, PromptFormat


class Method(StrEnum):
    """What is trained."""

    LORA = "lora"  # a LoRA alone
    TURBO_LORA = "turbo_lora"  # a LoRA and its streams, in one run
    TURBO = "turbo"  # streams alone, for the base model or for a finished LoRA
    MEDUSA = "medusa"  # Medusa-1 heads with their own LM heads, on the frozen model (arXiv 2401.10774)

    @property
    def trains_lora(self) -> bool:
        """Whether LoRA weights move."""
        return self in (Method.LORA, Method.TURBO_LORA)

    @property
    def trains_streams(self) -> bool:
        """Whether there is a speculator."""
        return self is not Method.LORA


class TrainingOptions(BaseModel):
    """The part of a run that is the same for a command, a Python call and a job: how to train."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: Method = Field(Method.TURBO_LORA, description="lora, turbo_lora, turbo or medusa.")
    prompt_format: PromptFormat | None = Field(
        None, description="raw or chat; by default chat for `messages` rows, else raw."
    )
    epochs: Annotated[int, Field(ge=1, le=1000)] = Field(3, description="Passes over the data.")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(None, description="Stop after so many optimiser steps.")
    max_minutes: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Stop after so many minutes of training, answering the training prompts included; the schedules are "
        "stretched to end with them.",
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] = Field(16, description="Rows of one optimiser step.")
    micro_batch_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Rows of one forward pass; by default the whole batch."
    )
    max_length: Annotated[int, Field(ge=8)] = Field(1024, description="Longer rows (in tokens) are left out.")
    lora_rank: Annotated[int, Field(ge=1, le=512)] = Field(16, description="LoRA rank.")
    lora_alpha: Annotated[float, Field(gt=0)] = Field(
        32, description="LoRA alpha; the update is scaled by alpha / rank."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Dropout before each LoRA.")
    lora_targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Linear layers that get a LoRA, by the end of their names."
    )
    streams: Annotated[int, Field(ge=1, le=8)] = Field(5, description="Number of streams (or Medusa heads), K.")
    stream_rank: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        128, description="Rank of a stream; null for dense streams."
    )
    conditioned: bool = Field(True, description="Streams also see the embedding of the token just decided.")
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(5e-4, description="Peak learning rate of the LoRA.")
    stream_learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        2e-3, description="Peak learning rate of the streams."
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.05, description="Share of the run with a rising learning rate."
    )
    gate: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="How much of the streams' gradient reaches the LoRA; 0 leaves the LoRA exactly as it would be."
    )
    gate_warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.2, description="Share of the run before the gate opens.")
    soft_targets: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="Weight of the model's own distribution, beside the data's next token, as the streams' target."
    )
    stream_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Stream k weighs decay^(k+1) in the loss."
    )
    negatives: Annotated[int, Field(ge=0)] | None = Field(
        2048,
        description="The streams' training softmax runs over the tokens that occur in the data's answers and so many "
        "random others, drawn anew each step; null: over the whole vocabulary, for several times the cost.",
    )
    self_distill: bool | None = Field(
        None,
        description="Train the speculator on the model's own answers, as turbo and medusa do by default; for turbo_lora it "
        "adds a second phase with the LoRA frozen.",
    )
    warm_start: bool = Field(False, description="Go on from the streams that the adapter already has (turbo).")
    distill_rows: Annotated[int, Field(ge=1)] = Field(
        2000, description="Prompts that are answered for self-distillation; never more than the phase's steps will see."
    )
    distill_epochs: Annotated[int, Field(ge=1, le=1000)] = Field(
        6, description="Passes over those answers in turbo_lora's second phase; max_steps ends it too."
    )
    clip: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Largest gradient norm, of LoRA and streams separately."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, about a third slower.")
    bf16: bool | None = Field(
        None,
        description="Compute in bfloat16 (LoRA, streams, optimiser stay in float32); by default where the processor has it.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="Order of the data, initial weights and dropout."
    )
    eval_every: Annotated[int, Field(ge=1)] = Field(50, description="Optimiser steps between two evaluations.")
    eval_rows: Annotated[int, Field(ge=1)] = Field(200, description="Rows of the validation data used each time.")
    save_every: Annotated[int, Field(ge=1)] = Field(50, description="Optimiser steps between two checkpoints.")
    patience: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Stop after so many evaluations without a lower loss, and keep the best."
    )
    gate_rows: Annotated[int, Field(ge=0)] = Field(
        48, description="Held-out rows answered at the end, to decide whether speculation pays; 0 skips it."
    )

    @model_validator(mode="after")
    def _fits(self) -> TrainingOptions:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.conditioned and self.stream_rank is None and self.method in (Method.TURBO, Method.TURBO_LORA):
            raise ValueError("dense streams (stream_rank null) cannot be conditioned: set conditioned to false")
        return self

    @property
    def distills(self) -> bool:
        """Whether the speculator gets the model's own answers."""
        frozen = self.method in (Method.TURBO, Method.MEDUSA)
        return self.method.trains_streams and (frozen if self.self_distill is None else self.self_distill)


class TrainingConfig(TrainingOptions):
    """A whole run: the options, and what and where."""

    base: str = Field("SmolLM2-135M-Instruct", description="Base model: a Hugging Face id, a folder, or the default.")
    data: Path = Field(description="Training rows: .jsonl or .csv with prompt and completion, or .jsonl with messages.")
    valid: Path | None = Field(None, description="Validation rows, in the same form.")
    output: Path = Field(description="The run's folder: checkpoints, log, card and the adapter itself.")
    adapter: Path | None = Field(None, description="A finished LoRA's folder: what turbo and medusa speed up.")
    lora_reference: Path | None = Field(
        None, description="The output folder of a `lora` run on the same data; a turbo_lora is compared with its loss."
    )
    name: Name | None = Field(None, description="The adapter's name, for its card.")
    resume: bool = Field(False, description="Go on from the newest checkpoint in `output`.")
    device: str = Field("auto", description="Torch device; auto takes a GPU when there is one.")
    threads: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Torch threads; by default torch's own choice."
    )
    state_cache_gib: Annotated[float, Field(ge=0)] = Field(
        4.0,
        description="Main memory for what a finished model says to the training rows, where only a speculator is trained: "
        "passes after the first are then several times faster. 0 turns it off.",
    )
    workers: Annotated[int, Field(ge=1)] = Field(1, description="Ray Train workers that share each batch.")
    fsdp: bool = Field(False, description="Shard the model over the workers (FSDP): for models that do not fit on one.")
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), description="Trackers to write to.")

    @model_validator(mode="after")
    def _adapter_fits(self) -> TrainingConfig:
        if self.adapter is not None and self.method.trains_lora:
            raise ValueError(f"method {self.method} trains a new LoRA; an existing adapter goes with turbo or medusa")
        return self
