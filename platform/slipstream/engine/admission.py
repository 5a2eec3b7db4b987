"""From a `GenerateRequest` to sequences: tokenise, check every number, bound everything. Raises client errors only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from slipstream.engine.noise import choice_seed
from slipstream.errors import ContextOverflow, InvalidRequest
from slipstream.protocol import GenerateRequest, SamplingParams

MAX_CHOICES = 64
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class Admitted:
    """A checked request: prompt ids, the longest its sequences may grow, each choice's parameters, and the draft cap."""

    prompt: list[int]
    max_total: int
    choices: tuple[SamplingParams, ...]
    draft_cap: int


class Admission:
    """The checks of one engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_model_len: int, max_draft: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_draft = max_draft
        # No prompt with more characters than this can fit: checked before the tokeniser sees megabytes.
        self._max_chars = max_model_len * max(len(t) for t in tokenizer.get_vocab())

    def admit(self, request: GenerateRequest) -> Admitted:
        """Check and tokenise. Raises `InvalidRequest` naming the field, or `ContextOverflow`."""
        check_params(request.params, self._vocab_size)
        prompt = self._prompt_ids(request)
        self._check_progress(request)
        room = self._max_model_len - len(prompt)
        wanted = request.params.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            raise ContextOverflow(
                f"The model's context is {self._max_model_len} tokens; the prompt has {len(prompt)}"
                + (f" and max_tokens is {wanted}" if wanted is not None else "")
                + ". Shorten the prompt or lower max_tokens.",
                param="messages" if request.messages is not None else "prompt",
            )
        seeds = [choice_seed(request.params.seed, i) for i in range(request.params.n)]
        choices = tuple(replace(request.params, seed=seed, n=1) for seed in seeds)
        return Admitted(prompt, len(prompt) + (wanted or room), choices, self._draft_cap(request.speculation))

    def _draft_cap(self, speculation: bool | int | None) -> int:
        if speculation is False:
            return 0
        if speculation is None or speculation is True:
            return self._max_draft
        if speculation < 0:
            raise InvalidRequest(
                'speculation must be true, false, "auto" or a draft length of 0 or more.', param="speculation"
            )
        return min(speculation, self._max_draft)

    def _check_progress(self, request: GenerateRequest) -> None:
        """A gateway's own words: wrong ones are a bug, which must not reach the step."""
        if request.progress and len(request.progress) != request.params.n:
            raise InvalidRequest("progress has to name every choice.", param="progress")
        limit = request.params.max_tokens
        for choice in request.progress:
            if any(not 0 <= token < self._vocab_size for token in choice.token_ids):
                raise InvalidRequest("progress holds a token outside the vocabulary.", param="progress")
            if not choice.finished and limit is not None and len(choice.token_ids) >= limit:
                raise InvalidRequest("progress is over max_tokens.", param="progress")

    def _prompt_ids(self, request: GenerateRequest) -> list[int]:
        if request.token_ids is not None:
            ids = list(request.token_ids)
            if any(not 0 <= t < self._vocab_size for t in ids):
                raise InvalidRequest(f"prompt holds a token id outside 0 … {self._vocab_size - 1}.", param="prompt")
        elif request.messages is not None:
            ids = self._chat_ids(request)
        else:
            text = request.text or ""
            self._check_length(len(text), "prompt")
            ids = list(self._tokenizer(text)["input_ids"])
        if not ids:
            raise InvalidRequest("The prompt is empty; send at least one token.", param="prompt")
        return ids

    def _chat_ids(self, request: GenerateRequest) -> list[int]:
        messages = request.messages or ()
        self._check_length(sum(len(m.content) for m in messages), "messages")
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidRequest(
                "This model has no chat template; send the prompt to /v1/completions instead.", param="messages"
            )
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (ValueError, TypeError, TemplateError) as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_length(self, chars: int, param: str) -> None:
        if chars > self._max_chars:
            raise ContextOverflow(
                f"The prompt has {chars} characters, which cannot fit the model's context of {self._max_model_len} tokens.",
                param=param,
            )


def check_params(p: SamplingParams, vocab_size: int) -> None:
    """Raise `InvalidRequest` naming the first parameter that is out of range."""
    _between("temperature", p.temperature, 0.0, 100.0)
    _between("top_p", p.top_p, 0.0, 1.0, open_low=True)
    _between("min_p", p.min_p, 0.0, 1.0)
    _between("repetition_penalty", p.repetition_penalty, 0.0, 100.0, open_low=True)
    _between("presence_penalty", p.presence_penalty, -2.0, 2.0)
    _between("frequency_penalty", p.frequency_penalty, -2.0, 2.0)
    _between("top_k", p.top_k, 0, 2**31)
    _between("n", p.n, 1, MAX_CHOICES)
    _between("min_tokens", p.min_tokens, 0, 2**31)
    if p.max_tokens is not None:
        _between("max_tokens", p.max_tokens, 1, 2**31)
        if p.min_tokens > p.max_tokens:
            raise InvalidRequest("min_tokens is larger than max_tokens.", param="min_tokens")
    if p.logprobs is not None:
        _between("logprobs", p.logprobs, 0, MAX_LOGPROBS)
    for token, bias in p.logit_bias.items():
        if not 0 <= token < vocab_size:
            raise InvalidRequest(f"logit_bias names token {token}; ids are 0 … {vocab_size - 1}.", param="logit_bias")
        _between("logit_bias", bias, -100.0, 100.0)
    if any(not 0 <= t < vocab_size for t in p.stop_token_ids):
        raise InvalidRequest(f"stop_token_ids must lie in 0 … {vocab_size - 1}.", param="stop_token_ids")
    if any(not s for s in p.stop):
        raise InvalidRequest("stop holds an empty string.", param="stop")


def _between(name: str, value: float, low: float, high: float, open_low: bool = False) -> None:
    if not low <= value <= high or (open_low and value == low):  # NaN compares false; huge integers compare fine
        bracket = "(" if open_low else "["
        raise InvalidRequest(f"{name} is {value}; it must lie in {bracket}{low:g}, {high:g}].", param=name)
