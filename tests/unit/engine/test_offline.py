"""The offline engine against the harness, the oracle and a script whose acceptance is worked out by hand."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.adapters import random_peft_adapter, random_streams, tiny_llama
from support.engine import Harness, Job, assert_same_tokens, oracle_greedy
from torch import nn

from slipstream.adapters.load import load_adapter
from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.offline import STREAMS_ONLY, OfflineEngine, Outcome, Row, RowResult
from slipstream.engine.plan import Pick, SequenceResult, StepPlan, StepResult
from slipstream.errors import AdapterUnavailable, ContextOverflow, InvalidRequest
from slipstream.protocol import FinishReason, SamplingParams

EOS = 1
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = [[3 + (7 * i + j) % 100 for j in range(4 + 5 * i)] for i in range(5)]


@pytest.fixture
def model() -> Any:
    return tiny_llama()


def turbo(model: Any, folder: Path, seed: int = 0) -> AdapterWeights:
    random_peft_adapter(model, folder, seed=seed)
    return AdapterWeights(load_adapter(folder).lora, random_streams(model.config.hidden_size, seed=seed))


def engine_of(model: Any, **settings: Any) -> OfflineEngine:
    return OfflineEngine(copy.deepcopy(model), **settings)


def test_answers_are_the_oracles(model: Any) -> None:
    outcome = engine_of(model).run([Row(p, GREEDY) for p in PROMPTS])
    for prompt, answer in zip(PROMPTS, outcome.answers, strict=True):
        assert_same_tokens(answer, *oracle_greedy(model, prompt, 12, eos=EOS))
    assert outcome.tokens_per_step == 1.0
    assert outcome.acceptance == ()
    assert outcome.seconds > 0
    assert outcome.tokens_per_s == pytest.approx(outcome.tokens / outcome.seconds)


def test_answers_and_counts_are_the_harness(model: Any, tmp_path: Path) -> None:
    weights = turbo(model, tmp_path)
    params = SamplingParams(temperature=0.7, seed=5, max_tokens=20)
    outcome = engine_of(model, adapters={"a": weights}).run([Row(p, params, "a", 8) for p in PROMPTS])
    jobs = [Job(p, params, adapter="a", draft_cap=8) for p in PROMPTS]
    assert outcome.answers == Harness(model, {"a": weights}, disable=STREAMS_ONLY).run(jobs)
    for result, job in zip(outcome.results, jobs, strict=True):
        seq = job.sequence
        assert seq is not None
        assert (result.decode_steps, result.finish_reason) == (seq.decode_steps, seq.finish_reason)
        assert result.prompt_tokens == len(job.prompt)
        assert (sum(result.judged), sum(result.accepted)) == (seq.judged, seq.right)
        assert seq.accepted <= seq.right  # the last token may be one that was guessed and not drafted
    assert sum(sum(r.judged) for r in outcome.results) > 0


def sure(*tokens: int) -> tuple[Pick, ...]:
    """Guesses, far ahead of all others."""
    return tuple(Pick(token, 9.0) for token in tokens)


def test_acceptance_by_position_of_a_script(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model, adapters={"a": AdapterWeights({}, random_streams(model.config.hidden_size))})
    script = iter(
        [
            SequenceResult((10,), sure(11, 12, 13)),
            SequenceResult((11, 12, 99), sure(40, 41, 42)),  # right, right, wrong
            SequenceResult((50,), sure(51, EOS, 7)),  # wrong: what came after it says nothing
            SequenceResult((51, EOS, 7, 8), ()),  # right, right and the end: draft 3 was never asked for
        ]
    )

    def run(plan: StepPlan) -> StepResult:
        return StepResult({part.seq_id: next(script) for part in plan.sequences})

    monkeypatch.setattr(engine.runner, "run", run)
    outcome = engine.run([Row([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=50), "a", 8)])
    result = outcome.results[0]
    assert result.tokens == (10, 11, 12, 99, 50, 51, EOS)
    assert result.finish_reason is FinishReason.STOP
    assert (result.judged, result.accepted) == ((3, 2, 1), (2, 2, 0))
    assert outcome.acceptance == (2 / 3, 1.0, 0.0)
    assert outcome.tokens_per_step == 7 / 4


def test_acceptance_adds_up_over_rows_of_other_depths() -> None:
    def result(judged: tuple[int, ...], accepted: tuple[int, ...]) -> RowResult:
        return RowResult((9,), FinishReason.STOP, 1, 1, judged, accepted)

    outcome = Outcome(1.0, (result((4, 2), (2, 1)), result((1,), (1,)), result((), ())))
    assert outcome.acceptance == (3 / 5, 1 / 2)
    assert Outcome(1.0, ()).tokens_per_step == 0.0


def test_rows_are_let_in_as_others_end(model: Any) -> None:
    done: list[int] = []
    read: list[int] = []

    def rows() -> Iterator[Row]:
        for i in range(40):
            read.append(i)
            assert len(read) - len(done) <= 3
            yield Row(PROMPTS[i % 5], SamplingParams(temperature=0.0, max_tokens=1 + i % 4, ignore_eos=True))

    outcome = engine_of(model, max_num_seqs=8).run(rows(), lambda i, r: done.append(i), concurrency=3)
    assert sorted(done) == list(range(40))
    assert done != sorted(done), "short rows should overtake long ones"
    assert [len(r.tokens) for r in outcome.results] == [1 + i % 4 for i in range(40)]


def test_adapters_come_and_go(model: Any, tmp_path: Path) -> None:
    first, second = turbo(model, tmp_path / "1", seed=1), turbo(model, tmp_path / "2", seed=2)
    engine = engine_of(model)
    rows = [Row(p, GREEDY, "a", 8) for p in PROMPTS]
    with pytest.raises(InvalidRequest, match="Row 0 names adapter 'a'"):
        engine.run(rows)
    answers = []
    for weights in (first, second, first):
        engine.add_adapter("a", weights)
        answers.append(engine.run(rows).answers)
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]
    engine.remove_adapter("a")
    engine.remove_adapter("never there")
    with pytest.raises(InvalidRequest):
        engine.run(rows)
    for i in range(20):  # more than there are slots
        engine.add_adapter(f"many-{i}", first)
        assert engine.run([Row(PROMPTS[0], GREEDY, f"many-{i}")]).answers[0]


def test_more_adapters_than_slots_in_one_run(model: Any, tmp_path: Path) -> None:
    weights = turbo(model, tmp_path)
    engine = engine_of(model)
    for i in range(12):
        engine.add_adapter(f"a{i}", weights)
    answers = engine.run([Row(PROMPTS[1], GREEDY, f"a{i}") for i in range(12)]).answers
    assert answers == [answers[0]] * 12


def test_an_adapter_that_does_not_fit_is_refused(model: Any, tmp_path: Path) -> None:
    engine = engine_of(model)
    with pytest.raises(AdapterUnavailable, match="'wide' does not fit"):
        engine.add_adapter("wide", turbo(tiny_llama(hidden=64), tmp_path / "w"))
    with pytest.raises(AdapterUnavailable, match="'deep' does not fit"):
        engine.add_adapter("deep", turbo(tiny_llama(layers=5), tmp_path / "d"))


def test_weights_that_overflow_end_the_run(model: Any, tmp_path: Path) -> None:
    weights = turbo(model, tmp_path)
    path, module = next(iter(weights.lora.items()))
    loud = replace(module, a=module.a * 1e30, b=module.b * 1e30)
    engine = engine_of(model, adapters={"loud": AdapterWeights({path: loud}, None)})
    with pytest.raises(AdapterUnavailable, match="adapter 'loud' overflow"):
        engine.run([*(Row(p, GREEDY) for p in PROMPTS), Row([5, 6], GREEDY, "loud")])
    assert len(engine.run([Row(p, GREEDY) for p in PROMPTS]).results) == 5


def test_a_device_without_room_ends_the_run(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(model, adapters={"a": turbo(model, tmp_path)})
    rows = [Row(p, GREEDY, "a", 8) for p in PROMPTS]

    def full(slot: int, adapter: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "load_adapter", full)
        with pytest.raises(AdapterUnavailable, match="'a' could not be copied to the device"):
            engine.run(rows)
    assert len(engine.run(rows).results) == 5  # with room again


def test_a_failing_callback_leaves_nothing_behind(model: Any) -> None:
    engine = engine_of(model, max_num_seqs=2)
    expected = engine.run([Row(p, GREEDY) for p in PROMPTS]).answers

    def fail(index: int, result: RowResult) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        engine.run([Row(p, GREEDY) for p in PROMPTS], fail)
    seen: list[int] = []
    assert engine.run([Row(p, GREEDY) for p in PROMPTS], lambda i, r: seen.append(i)).answers == expected
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_answers_end_with_the_context(model: Any) -> None:
    engine = engine_of(model)
    assert engine.max_length == 256
    for wanted in (None, 500):
        params = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True)
        result = engine.run([Row([5] * 250, params)]).results[0]
        assert (len(result.tokens), result.finish_reason) == (6, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (Row([5] * 256, GREEDY), ContextOverflow),
        (Row([], GREEDY), InvalidRequest),
        (Row([128], GREEDY), InvalidRequest),
        (Row([5], SamplingParams(temperature=-1.0)), InvalidRequest),
    ],
)
def test_a_row_that_cannot_run(model: Any, row: Row, error: type[Exception]) -> None:
    engine = engine_of(model)
    with pytest.raises(error):
        engine.run([Row(PROMPTS[0], GREEDY), row])
    assert engine.run([Row(PROMPTS[0], GREEDY)]).answers[0]


def test_concurrency_must_be_one_at_least(model: Any) -> None:
    with pytest.raises(InvalidRequest, match="concurrency is 0"):
        engine_of(model).run([Row([5], GREEDY)], concurrency=0)


def test_a_model_in_memory_is_taken_over(model: Any) -> None:
    engine = OfflineEngine(model)
    assert type(model.model.layers[0].self_attn.q_proj) is not nn.Linear
    assert engine.run([Row([5, 6], GREEDY)]).answers[0]


def test_it_needs_neither_ray_nor_peft() -> None:
    code = "import sys, slipstream.engine.offline; print(sorted({'ray', 'peft', 'fastapi'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[3] / "platform"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "[]"
