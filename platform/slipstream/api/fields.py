"""The sampling fields that both OpenAI routes share: types, ranges, and what is refused or ignored by name.

JSON is read strictly: a number in quotes is a mistake worth a sentence, not a guess. `null` means "not sent".
"""

from __future__ import annotations

import re
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from slipstream.protocol import SamplingParams, Speculation

MAX_CHOICES = 128  # prompts x n of one call
_MAX_INT = 2**31 - 1
# Neither changes the answer: sent by many clients, ignored on purpose.
_IGNORED = frozenset(
    {
        "metadata",
        "store",
        "service_tier",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)


def refused(param: str, sentence: str) -> PydanticCustomError:
    """An error of pydantic's that keeps its sentence and names its field."""
    return PydanticCustomError("refused", "{sentence}", {"param": param, "sentence": sentence})


def is_text(value: str) -> bool:
    """Whether UTF-8 can say it: JSON's escapes can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: str) -> str:
    if not is_text(value):
        raise PydanticCustomError("not_text", "holds half of a surrogate pair, which is not text")
    return value


# Every string of a body is one of these, or a length is set for it: pydantic then refuses the same.
Text = Annotated[str, AfterValidator(_text)]


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool | None = None  # accepted, never done: chunks are as long as their text


def _stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _logit_bias(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or not re.fullmatch(r"[0-9]{1,9}", key):
                raise refused(
                    "logit_bias", "'logit_bias' maps token ids, written as strings, to numbers from -100 to 100."
                )
    return value


def _speculation(value: Any) -> Speculation:
    if value is None or value == "auto":
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and 0 <= value <= 8:
        return value
    raise refused("speculation", "'speculation' is \"auto\", true, false, or a maximum draft length from 0 to 8.")


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
Stop = Annotated[
    Annotated[list[StopString], Field(max_length=16)],
    BeforeValidator(_stop_list, json_schema_input_type=StopString | list[StopString]),
]
TokenId = Annotated[int, Field(ge=0, le=_MAX_INT)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(BaseModel):
    """Everything about sampling that chat and text completions have in common."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    # field -> (values that mean "not used", why anything else is refused)
    refused_fields: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}

    model: Annotated[str, Field(min_length=1, max_length=300)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_MAX_INT)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Bias],
            Field(max_length=1024),
            BeforeValidator(_logit_bias, json_schema_input_type=dict[str, Bias]),
        ]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=1, le=_MAX_INT)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[Text, Field(max_length=512)] | None = None  # stays on its side of a split
    priority: Annotated[int, Field(ge=-100, le=100)] | None = (
        None  # as vLLM's: lower ones start first; within the tenant
    )
    max_wait_s: Annotated[float, Field(gt=0, le=3600)] | None = None  # rather refused than begun later
    speculation: Annotated[
        Any,
        PlainValidator(_speculation, json_schema_input_type=Literal["auto"] | bool | Annotated[int, Field(ge=0, le=8)]),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, (unused, reason) in cls.refused_fields.items():
            if name in data and not any(data[name] is value or data[name] == value for value in (None, *unused)):
                raise refused(name, f"'{name}' is not supported here: {reason}")
        return {name: value for name, value in data.items() if name not in _IGNORED and name not in cls.refused_fields}

    @model_validator(mode="after")
    def _check_together(self) -> SamplingFields:
        limit = self.token_limit()
        if limit is not None and (self.min_tokens or 0) > limit:
            raise refused("min_tokens", "'min_tokens' is larger than the maximum number of tokens.")
        if self.stream_options is not None and not self.stream:
            raise refused(
                "stream_options", "'stream_options' is only for streams: set 'stream' to true or leave it out."
            )
        return self

    def token_limit(self) -> int | None:
        """How many tokens the answer may have; None = up to the context window."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, logprobs: int | None) -> SamplingParams:
        """The engine's parameters; a seed is drawn when the client sent none, so a retry below repeats the text."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % 2**64
        return SamplingParams(
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=_or(self.min_p, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=seed,
            max_tokens=self.token_limit(),
            min_tokens=self.min_tokens or 0,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            n=self.n or 1,
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
