"""What the SDK takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slipstream.errors import SlipstreamError

Json = dict[str, Any]


class FinetuningConfig(BaseModel):
    """How to train; what is left out keeps the server's default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str
    adapter: Literal["lora", "turbo_lora", "turbo", "medusa"] = "turbo_lora"
    epochs: int | None = None
    max_steps: int | None = None
    max_minutes: float | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = None
    streams: int | None = None  # tokens drafted ahead
    stream_rank: int | Literal["dense"] | None = None
    prompt_format: Literal["raw", "chat"] | None = None
    early_stopping: int | None = None  # evaluations without a lower loss
    seed: int | None = None
    options: Json = Field(default_factory=dict)  # any other option of `slipstream train`, by its name

    def options_body(self) -> Json:
        """The field `slipstream` of a job's body."""
        names = {
            "adapter": "method",
            "rank": "lora_rank",
            "target_modules": "lora_targets",
            "early_stopping": "patience",
        }
        sent = self.model_dump(mode="json", exclude_none=True, exclude={"base_model", "seed", "options"})
        body = {names.get(field, field): value for field, value in sent.items()}
        if body.get("stream_rank") == "dense":
            body |= {"stream_rank": None, "conditioned": False}
        return {**body, **self.options}


@dataclass(frozen=True, slots=True)
class Dataset:
    """An uploaded file of rows."""

    id: str
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Repo:
    """An adapter's name and the versions under it, newest first."""

    name: str
    description: str = ""
    versions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FinetunedAdapter:
    """A published version."""

    repo: str
    tag: int  # the version's number
    base_model: str
    kind: str  # lora, turbo_lora, turbo …
    prompt_format: str  # raw or chat
    speculation: bool  # whether requests draft unless they say otherwise
    speculation_reason: str
    acceptance: tuple[float, ...]  # of each stream, as measured when it was trained

    @property
    def reference(self) -> str:
        """What requests put into `model`: `repo@tag`."""
        return f"{self.repo}@{self.tag}"

    @classmethod
    def of(cls, version: Json) -> FinetunedAdapter:
        """From the registry's answer."""
        return cls(
            repo=version["name"],
            tag=version["version"],
            base_model=version["base_model"],
            kind=version["kind"],
            prompt_format=version["prompt_format"],
            speculation=version["speculation"]["enabled"],
            speculation_reason=version["speculation"]["reason"],
            acceptance=tuple(version["acceptance"]),
        )


@dataclass(frozen=True, slots=True)
class GeneratedText:
    """An answer."""

    generated_text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    tokens_per_step: float  # 1.0 without speculation

    @classmethod
    def of(cls, body: Json) -> GeneratedText:
        """From a whole answer of /v1/completions or /v1/chat/completions."""
        choice = body["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return cls.from_parts(text, choice["finish_reason"], body["usage"])

    @classmethod
    def from_parts(cls, text: str, finish_reason: str | None, usage: Json | None) -> GeneratedText:
        """From what a stream said."""
        counted = usage or {}
        tokens = counted.get("completion_tokens", 0)
        return cls(
            generated_text=text,
            finish_reason=finish_reason,
            prompt_tokens=counted.get("prompt_tokens", 0),
            completion_tokens=tokens,
            tokens_per_step=tokens / max(1, counted.get("decode_steps", 0)),
        )


@dataclass(frozen=True, slots=True)
class StreamedText:
    """A piece of an answer; the last one is empty and carries the whole."""

    text: str
    whole: GeneratedText | None = None

    @property
    def generated_text(self) -> str | None:
        """The whole answer, on the last piece only."""
        return self.whole.generated_text if self.whole else None


class FinetuningFailed(SlipstreamError):
    """A job that failed or was cancelled; `job` is the server's record of it."""

    code = "training_failed"

    def __init__(self, message: str, *, code: str | None = None, job: Json | None = None) -> None:
        super().__init__(message, code=code)
        self.job = job or {}
