"""Run every variant over the same held-out rows, greedily, and score text and speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from jinja2.exceptions import TemplateError
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase

from adapter_registry.records import PromptFormat
from slipstream.engine.offline import OfflineEngine, Outcome, RowResult, conditional_acceptance
from slipstream.engine.offline import Row as EngineRow
from slipstream.errors import ContextOverflow, InvalidRequest
from slipstream.evaluation.result import Evaluation, Spread, VariantResult
from slipstream.evaluation.variants import Variant
from slipstream.protocol import SamplingParams
from slipstream.training.data import Row, encode_prompt

MAX_ROUNDS = 20
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """`concurrency`: rows at once, on which tokens/s depends; `max_tokens`: the longest answer, if the context has room."""

    concurrency: int = 8
    max_tokens: int = 256
    prompt_format: PromptFormat = PromptFormat.RAW

    def __post_init__(self) -> None:
        """Raise `InvalidRequest` naming the field that cannot work."""
        for name in ("concurrency", "max_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}; it must be at least 1.", param=name)


@dataclass(slots=True)
class _Side:
    """One variant's runs so far."""

    variant: Variant
    results: list[RowResult] = field(default_factory=list)
    seconds: float = 0.0
    rates: list[float] = field(default_factory=list)  # tokens/s of each round

    def add(self, outcome: Outcome) -> None:
        self.results += outcome.results
        self.seconds += outcome.seconds
        self.rates.append(outcome.tokens_per_s)


def evaluate(
    engine: OfflineEngine,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    variants: Sequence[Variant],
    options: EvaluationOptions | None = None,
    on_row: Callable[[], None] | None = None,
) -> Evaluation:
    """Compare `variants` on `rows`; `on_row` is called for each answer, `len(rows) * len(variants)` times.

    The rows are cut into rounds. In a round every variant answers the same rows, and the order of the variants rotates:
    a machine that is slow for a minute is slow for all of them. The engine must hold the variants' adapters.
    Raises `InvalidRequest` for no rows and `ContextOverflow`, with the row's number, for a prompt that is too long.
    """
    options = options or EvaluationOptions()

    def finished(index: int, result: RowResult) -> None:
        if on_row is not None:
            on_row()

    if not rows:
        raise InvalidRequest("There are no rows to evaluate on.", param="data")
    prompts = _encode(engine, tokenizer, rows, options)
    sides = [_Side(variant) for variant in variants]
    for side in sides:  # load the adapter, and let libraries settle, before the clock counts
        engine.run(_requests(prompts[: options.concurrency], side.variant, WARM_UP_TOKENS))
    for number, part in enumerate(_rounds(len(rows), options.concurrency)):
        turn = number % len(sides)
        for side in sides[turn:] + sides[:turn]:
            requests = _requests(prompts[part], side.variant, options.max_tokens)
            side.add(engine.run(requests, finished, concurrency=options.concurrency))
    texts = {s.variant.name: tuple(_text(tokenizer, r) for r in s.results) for s in sides}
    references = [row.completion.strip() for row in rows]
    scored = {s.variant.name: _score(s, sides[:i], texts[s.variant.name], references) for i, s in enumerate(sides)}
    return Evaluation(scored, texts)


def _encode(
    engine: OfflineEngine, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], options: EvaluationOptions
) -> list[list[int]]:
    prompts = []
    for row in rows:
        # A chat has no raw form, whatever format the adapter names (raw is also what it names when it names none).
        prompt_format = PromptFormat.CHAT if row.is_chat else options.prompt_format
        try:
            prompt = encode_prompt(tokenizer, row, prompt_format)
        except (ValueError, TypeError, TemplateError) as error:
            message = f"Row {row.number}: the base model's chat template refuses it, or there is none: {error}"
            raise InvalidRequest(message, param="data") from error
        if not 0 < len(prompt) < engine.max_length:
            raise ContextOverflow(
                f"Row {row.number}: the prompt has {len(prompt)} tokens; it must have at least one, and with an answer "
                f"{engine.max_length} fit. Shorten or remove the row.",
                param="data",
            )
        prompts.append(prompt)
    return prompts


def _requests(prompts: Sequence[list[int]], variant: Variant, max_tokens: int) -> list[EngineRow]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return [EngineRow(prompt, params, variant.adapter, variant.draft_cap) for prompt in prompts]


def _rounds(count: int, concurrency: int) -> list[slice]:
    """Near-equal parts of at least twice `concurrency` rows each: the tail of a round, with few rows left, stays short."""
    number = max(1, min(MAX_ROUNDS, count // (2 * concurrency)))
    edges = [count * i // number for i in range(number + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def _text(tokenizer: PreTrainedTokenizerBase, result: RowResult) -> str:
    text = tokenizer.decode(result.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.strip()


def _score(side: _Side, earlier: Sequence[_Side], texts: Sequence[str], references: Sequence[str]) -> VariantResult:
    pairs = list(zip(texts, references, strict=True))
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    tokens = sum(len(r.tokens) for r in side.results)
    return VariantResult(
        rows=len(pairs),
        exact_match=fmean(text == reference for text, reference in pairs),
        rouge_l=fmean(rouge.score(reference, text)["rougeL"].fmeasure for text, reference in pairs),
        tokens_per_step=tokens / sum(r.decode_steps for r in side.results),
        acceptance=conditional_acceptance(side.results),
        tokens_per_second=tokens / side.seconds,
        completion_tokens=tokens,
        mean_completion_tokens=tokens / len(pairs),
        speedup={
            other.variant.name: Spread.of([a / b for a, b in zip(side.rates, other.rates, strict=True)])
            for other in earlier
        },
    )
