"""`evaluate` on a tiny model: what counts as a match, what is counted, and how rows are cut into rounds."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import random_peft_adapter, random_streams
from support.tiny_model import save_tiny_model, tiny_tokenizer

from adapter_registry.records import PromptFormat
from slipstream.adapters.load import load_adapter
from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.offline import OfflineEngine, Outcome
from slipstream.engine.offline import Row as EngineRow
from slipstream.errors import ContextOverflow, InvalidRequest
from slipstream.evaluation import Evaluation, EvaluationOptions, Spread, Variant, VariantResult, evaluate, variants_of
from slipstream.evaluation.compare import _rounds
from slipstream.training.data import Row, Turn

TOKENIZER = tiny_tokenizer()
OPTIONS = EvaluationOptions(concurrency=2, max_tokens=10)
PROMPTS = ["the first", "row two", "and three", "four", "five is last"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def weights(model: Any, tmp_path: Path) -> AdapterWeights:
    random_peft_adapter(model, tmp_path)
    return AdapterWeights(load_adapter(tmp_path).lora, random_streams(model.config.hidden_size))


@pytest.fixture
def engine(model: Any, weights: AdapterWeights) -> OfflineEngine:
    return OfflineEngine(copy.deepcopy(model), adapters={"a": weights})


def rows(completions: list[str] | None = None) -> list[Row]:
    completions = completions or ["x"] * len(PROMPTS)
    return [Row(i, prompt=p, completion=c) for i, (p, c) in enumerate(zip(PROMPTS, completions, strict=True), 1)]


def test_variants_follow_what_the_adapter_has(weights: AdapterWeights) -> None:
    def names(w: AdapterWeights) -> list[tuple[str, bool, bool]]:
        return [(v.name, v.adapter is not None, v.draft_cap > 0) for v in variants_of(w, "a")]

    base, lora = ("base", False, False), ("lora", True, False)
    assert names(weights) == [base, lora, ("turbo_lora", True, True)]
    assert names(AdapterWeights(weights.lora, None)) == [base, lora]
    assert names(AdapterWeights({}, weights.streams)) == [base, ("turbo", True, True)]
    assert weights.streams is not None
    medusa = replace(weights.streams, head=torch.zeros(3, 259, 32))
    assert names(AdapterWeights(weights.lora, medusa)) == [base, lora, ("medusa", True, True)]
    assert names(AdapterWeights({}, medusa)) == [base, ("medusa", True, True)]


def test_speculation_changes_speed_and_not_text(engine: OfflineEngine, weights: AdapterWeights) -> None:
    found = evaluate(engine, TOKENIZER, rows(), variants_of(weights, "a"), OPTIONS)
    assert list(found.variants) == ["base", "lora", "turbo_lora"]
    assert found.texts["turbo_lora"] == found.texts["lora"] != found.texts["base"]
    base, lora, turbo = found.variants.values()
    assert (base.tokens_per_step, lora.tokens_per_step) == (1.0, 1.0)
    assert base.acceptance == lora.acceptance == ()
    assert 1 <= len(turbo.acceptance) <= 3
    assert lora.completion_tokens == turbo.completion_tokens
    assert lora.mean_completion_tokens == lora.completion_tokens / 5
    assert list(turbo.speedup) == ["base", "lora"]
    assert turbo.speedup["lora"].low <= turbo.speedup["lora"].median <= turbo.speedup["lora"].high
    assert not base.speedup


def test_a_match_is_equal_text_but_for_outer_white_space(engine: OfflineEngine) -> None:
    answers = evaluate(engine, TOKENIZER, rows(), [Variant("base")], OPTIONS).texts["base"]
    assert all(answers)
    references = [f"  {answers[0]}\n", answers[1], answers[2] + "!", "nothing like it", answers[4]]
    result = evaluate(engine, TOKENIZER, rows(references), [Variant("base")], OPTIONS).variants["base"]
    assert (result.rows, result.exact_match) == (5, 0.6)


def test_figures_of_answers_known_beforehand(engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows answered `a b c` + end, in 2 and 3 steps."""
    real = engine.run

    def run(requests: list[EngineRow], *rest: Any, **more: Any) -> Outcome:
        outcome = real(requests, *rest, **more)
        answer = (*TOKENIZER("a b c")["input_ids"], TOKENIZER.eos_token_id)
        changed = [
            replace(r, tokens=answer, decode_steps=2 + i, judged=(2, 1), accepted=(1 + i, 1))
            for i, r in enumerate(outcome.results)
        ]
        return Outcome(0.5, tuple(changed))

    monkeypatch.setattr(engine, "run", run)
    data = [Row(1, prompt="p", completion="a b c"), Row(2, prompt="q", completion="a c")]
    result = evaluate(engine, TOKENIZER, data, [Variant("base")], OPTIONS).variants["base"]
    assert result.exact_match == 0.5
    assert result.rouge_l == pytest.approx((1 + 0.8) / 2)
    assert result.tokens_per_step == 12 / 5
    assert result.completion_tokens == 12
    assert result.tokens_per_second == 24.0
    assert result.acceptance == (0.75, 1.0)


def test_the_end_token_counts_and_is_not_text(model: Any) -> None:
    every = frozenset(range(259))  # each token ends the answer
    engine = OfflineEngine(copy.deepcopy(model), eos=every)
    result = evaluate(engine, TOKENIZER, rows(), [Variant("base")], OPTIONS).variants["base"]
    assert result.mean_completion_tokens == 1.0
    ids = [TOKENIZER.eos_token_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == ""


def test_every_variant_answers_every_row_once_in_order(
    engine: OfflineEngine, weights: AdapterWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str | None, int, int, list[int]]] = []
    real = engine.run

    def run(requests: list[EngineRow], *rest: Any, **more: Any) -> Outcome:
        first = requests[0]
        if more:  # not the warm-up
            assert more == {"concurrency": 1}
            lengths = [len(r.prompt) for r in requests]
            calls.append((first.adapter, first.draft_cap, first.params.max_tokens or 0, lengths))
        return real(requests, *rest, **more)

    monkeypatch.setattr(engine, "run", run)
    ticks: list[int] = []
    options = EvaluationOptions(concurrency=1, max_tokens=3)
    evaluate(engine, TOKENIZER, rows(), variants_of(weights, "a"), options, lambda: ticks.append(1))
    assert len(ticks) == 15
    assert [call[:2] for call in calls] == [(None, 0), ("a", 0), ("a", 8), ("a", 0), ("a", 8), (None, 0)]
    for adapter, cap in ((None, 0), ("a", 0), ("a", 8)):
        lengths = [n for call in calls if call[:2] == (adapter, cap) for n in call[3]]
        assert lengths == [len(p) for p in PROMPTS]


@pytest.mark.parametrize(("count", "concurrency"), [(1, 1), (5, 8), (17, 2), (100, 8), (5000, 4), (3, 1)])
def test_rounds_cover_the_rows(count: int, concurrency: int) -> None:
    parts = _rounds(count, concurrency)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert 1 <= len(parts) <= 20
    if len(parts) > 1:
        assert min(len(range(count)[part]) for part in parts) >= 2 * concurrency


def test_chats_go_through_the_template(engine: OfflineEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = engine.run

    def run(requests: list[EngineRow], *rest: Any, **more: Any) -> Outcome:
        seen.append(TOKENIZER.decode(requests[0].prompt))
        return real(requests, *rest, **more)

    monkeypatch.setattr(engine, "run", run)
    turns = (Turn(role="user", content="hi"), Turn(role="assistant", content="ho"))
    evaluate(engine, TOKENIZER, [Row(1, completion="ho", messages=turns)], [Variant("base")], OPTIONS)
    assert seen[-1] == "<|user|>hi\n<|assistant|>"
    chat = EvaluationOptions(concurrency=2, max_tokens=4, prompt_format=PromptFormat.CHAT)
    evaluate(engine, TOKENIZER, [Row(1, prompt="hi", completion="ho")], [Variant("base")], chat)
    assert seen[-1] == "<|user|>hi\n<|assistant|>"
    bare = copy.deepcopy(TOKENIZER)
    bare.chat_template = None
    with pytest.raises(InvalidRequest, match="Row 1: the base model's chat template"):
        evaluate(engine, bare, [Row(1, prompt="hi", completion="ho")], [Variant("base")], chat)


def test_what_cannot_be_evaluated(engine: OfflineEngine) -> None:
    with pytest.raises(InvalidRequest, match="no rows"):
        evaluate(engine, TOKENIZER, [], [Variant("base")], OPTIONS)
    long = Row(17, prompt="x" * 256, completion="y")
    with pytest.raises(ContextOverflow, match="Row 17: the prompt has 256 tokens"):
        evaluate(engine, TOKENIZER, [*rows(), long], [Variant("base")], OPTIONS)
    with pytest.raises(InvalidRequest, match="concurrency is 0"):
        EvaluationOptions(concurrency=0)
    with pytest.raises(InvalidRequest, match="max_tokens is 0"):
        EvaluationOptions(max_tokens=0)


def test_json_of_a_result() -> None:
    result = VariantResult(2, 0.5, 0.7, 1.5, (0.8, 0.6), 40.0, 20, 10.0, {"base": Spread.of([1.0, 3.0, 1.2])})
    data = json.loads(json.dumps(Evaluation({"turbo": result}, {"turbo": ("a", "b")}).to_json()))
    assert data["turbo"]["acceptance"] == [0.8, 0.6]
    assert data["turbo"]["speedup"]["base"] == {"median": 1.2, "low": 1.0, "high": 3.0}
    assert {"exact_match", "rouge_l", "tokens_per_step", "tokens_per_second", "rows"} <= set(data["turbo"])
