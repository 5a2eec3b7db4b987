"""Adapters of every kind, mixed in one batch, against transformers + PEFT; and speculation that never changes a token."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.adapters import random_streams, tiny_llama
from support.engine import Harness, Job, assert_same_tokens, oracle_greedy
from support.zoo import SPECULATING, Zoo, greedy, make_zoo, prompts

from slipstream.adapters.load import load_adapter
from slipstream.adapters.weights import AdapterWeights, StreamWeights
from slipstream.engine.config import FastPath
from slipstream.engine.quantized import Quantization
from slipstream.protocol import FinishReason, SamplingParams


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def test_every_kind_alone_and_mixed_equals_peft(zoo: Zoo) -> None:
    model, folders, oracles = zoo
    kinds = [*folders, None]
    texts = prompts(len(kinds))
    harness = Harness(model, folders, num_blocks=48, block_size=8, max_batched_tokens=48, eos=frozenset())
    jobs = [
        Job(text, greedy(), adapter=kind, draft_cap=8, start_step=i % 3)
        for i, (kind, text) in enumerate(zip(kinds, texts, strict=True))
    ]
    mixed = harness.run(jobs)
    alone = Harness(model, folders, eos=frozenset())
    for kind, text, answer in zip(kinds, texts, mixed, strict=True):
        expected, gaps = oracle_greedy(oracles[kind] if kind else model, text, 20)
        assert_same_tokens(answer, expected, gaps)
        assert_same_tokens(alone.answer(text, greedy(), adapter=kind), expected, gaps)
    drafted = {j.adapter: j.sequence.drafted for j in jobs if j.sequence is not None}
    assert {k for k, n in drafted.items() if n} >= SPECULATING  # others copy


@pytest.mark.parametrize(
    "disable", [(), *[(path,) for path in FastPath], tuple(FastPath)], ids=lambda paths: "+".join(paths) or "nothing"
)
def test_no_fast_path_changes_the_text(zoo: Zoo, disable: tuple[FastPath, ...]) -> None:
    model, folders, oracles = zoo
    halves = copy.deepcopy(model)
    for parameter in halves.parameters():
        parameter.data = parameter.half().float()  # weights that fit float16, as trained ones do: another packing
    texts = prompts(len(folders))
    for base in (model, halves):
        harness = Harness(base, folders, block_size=8, eos=frozenset(), disable=disable)
        jobs = [Job(text, greedy(), kind, draft_cap=8) for kind, text in zip(folders, texts, strict=True)]
        answers = harness.run(jobs)
        if base is model:
            for kind, text, answer in zip(folders, texts, answers, strict=True):
                assert_same_tokens(answer, *oracle_greedy(oracles[kind], text, 20))
        else:
            slow = Harness(base, folders, block_size=8, eos=frozenset(), disable=tuple(FastPath))
            assert answers == slow.run([replace(job, sequence=None, logprobs=[]) for job in jobs])


@torch.inference_mode()
def reference_drafts(
    model: Any, weights: AdapterWeights, tokens: list[int], prompt_len: int, presence: float
) -> list[int]:
    """The likeliest drafts after `tokens` in float64, by the definition of `StreamWeights`; `model` carries the LoRA."""
    base = getattr(model, "base_model", model).model if hasattr(model, "peft_config") else model
    ids = torch.tensor([tokens])
    h = base.model(input_ids=ids[:, :-1]).last_hidden_state[0, -1]
    embedding = base.get_input_embeddings()(ids[0, -1])
    s = weights.streams
    assert s is not None
    drafts: list[int] = []
    for k in range(s.num_streams):
        if s.weight is not None:
            inner = s.weight[k].double() @ h
        else:
            assert s.a is not None
            assert s.b is not None
            low = s.a[k].double() @ h
            inner = s.b[k].double() @ (low + s.c[k].double() @ embedding if s.c is not None else low)
        state = h + torch.nn.functional.silu(inner + s.bias[k].double())
        logits = s.head[k].double() @ state if s.head is not None else base.get_output_embeddings()(state).clone()
        logits[sorted({*tokens[prompt_len:], *drafts})] -= presence
        drafts.append(int(logits.argmax()))
    return drafts


SAMPLED = SamplingParams(temperature=0.9, seed=3, max_tokens=8)


@pytest.mark.parametrize(
    "params",
    [greedy(8), SAMPLED, replace(SAMPLED, logprobs=2), replace(SAMPLED, presence_penalty=1.5)],
    ids=["greedy", "sampled", "logprobs", "penalised"],
)
def test_drafts_are_the_streams_likeliest_in_a_mixed_batch(zoo: Zoo, params: SamplingParams) -> None:
    """Every draft of every step, shared heads beside own ones, against a reference written by hand."""
    model, folders, oracles = zoo
    kinds = [*sorted(SPECULATING), "plain", "medusa-only", None]
    exact = {k: copy.deepcopy(oracles[k]).double() for k in SPECULATING}
    weights = {k: load_adapter(folders[k]) for k in SPECULATING}
    harness = Harness(model, folders, eos=frozenset())
    jobs = [Job(t, params, adapter=k, draft_cap=8) for t, k in zip(prompts(len(kinds)), kinds, strict=True)]
    checked = dict.fromkeys(SPECULATING, 0)

    def check(tick: int) -> None:
        for job in jobs:
            seq = job.sequence
            if seq is not None and seq.guesses:
                assert job.adapter is not None
                own, model_of = weights[job.adapter], exact[job.adapter]
                expected = reference_drafts(model_of, own, seq.tokens, seq.prompt_len, params.presence_penalty)
                assert [guess.token for guess in seq.guesses] == expected[: len(seq.guesses)]
                checked[job.adapter] += len(seq.guesses)

    harness.run(jobs, after_step=check)
    assert all(count >= 8 for count in checked.values()), checked


@torch.no_grad()
def counting_model(hidden: int = 128, vocab: int = 64) -> tuple[Any, torch.Tensor]:
    """A model whose next token is always the last one plus 1, and the final hidden state of each token [V, H]."""
    model = tiny_llama(hidden=hidden, vocab=vocab)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    states = model.model.norm(model.get_input_embeddings().weight)  # all of one length: the nearest one wins
    model.get_output_embeddings().weight.copy_(states.roll(1, 0))
    return model, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perfect_heads_are_always_right(dtype: torch.dtype) -> None:
    """Head k knows the token k + 2 ahead. The base's head does not: the same streams without heads are never right."""
    model, states = counting_model()
    model = model.to(dtype)
    hidden = states.shape[1]
    head = torch.stack([states.roll(2 + k, 0) for k in range(3)])
    idle = StreamWeights(torch.zeros(3, hidden), torch.zeros(3, hidden, hidden))
    adapters = {"medusa": AdapterWeights({}, replace(idle, head=head)), "shared": AdapterWeights({}, idle)}
    for company in (False, True):
        harness = Harness(model, adapters, eos=frozenset())
        jobs = [Job([5, 9], greedy(21), adapter="medusa", draft_cap=8)]
        if company:
            jobs += [Job([7, 3], greedy(21), adapter="shared", draft_cap=8), Job([2, 30], greedy(21))]
        answers = harness.run(jobs)
        assert answers == [[(job.prompt[-1] + 1 + i) % 64 for i in range(21)] for job in jobs]
        medusa, *others = [job.sequence for job in jobs]
        assert medusa is not None
        assert (medusa.decode_steps, medusa.drafted, medusa.accepted) == (6, 15, 15)
        assert all(seq is not None and seq.accepted == 0 for seq in others)


def test_own_heads_are_counted_and_must_fit(zoo: Zoo) -> None:
    model, folders, _ = zoo
    runner = Harness(model).runner
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    weights = load_adapter(folders["medusa-only"])
    assert weights.streams is not None
    without = replace(weights, streams=replace(weights.streams, head=None))
    heads = 8 * vocab * hidden * 4
    assert runner.prepare_adapter(weights).nbytes == runner.prepare_adapter(without).nbytes + heads
    for other in (random_streams(hidden, vocab=vocab - 1), random_streams(2 * hidden, vocab=vocab)):
        with pytest.raises(ValueError, match=r"do(es)? not fit"):
            runner.prepare_adapter(AdapterWeights({}, other))


SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "cold": SamplingParams(temperature=0.2),
    "warm-top-p": SamplingParams(temperature=0.8, top_p=0.9),
    "hot": SamplingParams(temperature=1.3, top_k=40, min_p=0.01),
    "penalties": SamplingParams(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4),
    "greedy-penalties": SamplingParams(temperature=0.0, repetition_penalty=1.2, frequency_penalty=1.0),
    "bias": SamplingParams(temperature=0.8, logit_bias={5: 4.0, 9: -100.0, 17: 2.5}, min_tokens=4),
}


@pytest.mark.parametrize("mode", SAMPLING)
def test_speculation_and_company_never_change_a_token(zoo: Zoo, mode: str) -> None:
    """Off, on with every k, alone and mixed, chunked and preempted: the same seed gives the same tokens."""
    model, folders, _ = zoo
    kinds = ["all-linear", "dora", "patterns", "streams-only", "rslora", "medusa-only", None]
    texts = prompts(len(kinds))
    params = [replace(SAMPLING[mode], seed=100 + i, max_tokens=20) for i in range(len(kinds))]

    def run(harness: Harness, cap: int) -> list[list[int]]:
        jobs = [
            Job(t, p, adapter=k, draft_cap=cap, start_step=i)
            for i, (t, p, k) in enumerate(zip(texts, params, kinds, strict=True))
        ]
        return harness.run(jobs)

    eos = frozenset({2}) if mode == "bias" else frozenset[int]()
    plain = Harness(model, folders, eos=eos)
    expected = [plain.answer(t, p, adapter=k) for t, p, k in zip(texts, params, kinds, strict=True)]
    assert expected == run(plain, 0)
    for cap in (1, 2, 3, 8):
        cramped = Harness(model, folders, num_blocks=22, block_size=4, max_batched_tokens=16, max_num_seqs=5, eos=eos)
        assert expected == run(cramped, cap)
        assert eos or cramped.scheduler.counters.preemptions > 0


def test_different_seeds_differ_and_noise_is_not_shared_between_positions(
    zoo: Zoo,
) -> None:
    model, _, _ = zoo
    harness = Harness(model, eos=frozenset())
    text = prompts(1)[0]
    answers = {tuple(harness.answer(text, SamplingParams(temperature=1.0, seed=s, max_tokens=12))) for s in range(8)}
    assert len(answers) == 8
    assert all(len(set(a)) > 1 for a in answers)


def test_logprobs_are_the_models_own(zoo: Zoo) -> None:
    model, folders, oracles = zoo
    text = prompts(1)[0]
    job = Job(
        text, SamplingParams(temperature=0.7, seed=3, max_tokens=8, logprobs=3), adapter="all-linear", draft_cap=8
    )
    harness = Harness(model, folders, eos=frozenset())
    harness.run([job])
    with torch.inference_mode():
        logits = oracles["all-linear"](input_ids=torch.tensor([text + job.answer])).logits[0].log_softmax(-1)
    assert len(job.logprobs) == 8
    for i, (token, got) in enumerate(zip(job.answer, job.logprobs, strict=True)):
        row = logits[len(text) + i - 1]
        assert got.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [t for t, _ in got.top] == row.topk(3).indices.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_overflows_hurts_nobody_else(zoo: Zoo, dtype: torch.dtype) -> None:
    """Finite on disk, infinite in the forward: its own request breaks; company, and whoever gets its blocks, does not."""
    model, folders, _ = zoo
    model = copy.deepcopy(model).to(dtype)
    evil = load_adapter(folders["all-linear"])
    huge = {path: replace(m, a=m.a * 1e30, b=m.b * 1e30) for path, m in evil.lora.items()}
    harness = Harness(
        model, {**folders, "evil": AdapterWeights(huge, evil.streams)}, num_blocks=24, block_size=8, eos=frozenset()
    )
    harness.scheduler.prefix_caching = False
    texts = prompts(4)
    sampled = SamplingParams(temperature=0.7, seed=1, max_tokens=12, presence_penalty=0.5)
    alone = [harness.answer(texts[0], greedy(12)), harness.answer(texts[1], sampled, adapter="plain")]
    for draft_cap in (0, 8):
        jobs = [
            Job(texts[0], greedy(12)),
            Job(texts[1], sampled, adapter="plain"),
            Job(texts[2], greedy(12), adapter="evil", draft_cap=draft_cap),
            Job(texts[3], sampled, adapter="evil", draft_cap=draft_cap),
        ]
        answers = harness.run(jobs)
        assert answers[:2] == alone
        assert answers[2:] == [[], []]
        assert all(j.sequence is not None and j.sequence.finish_reason is FinishReason.ABORTED for j in jobs[2:])
        assert [harness.answer(texts[0], greedy(12)), harness.answer(texts[1], sampled, adapter="plain")] == alone
        assert harness.answer(texts[2], greedy(12), adapter="evil", draft_cap=draft_cap) == []  # nobody beside it


def test_weights_that_overflow_in_the_engines_dtype_are_refused(
    zoo: Zoo,
) -> None:
    model, folders, _ = zoo
    harness = Harness(copy.deepcopy(model).to(torch.float16), eos=frozenset())
    weights = load_adapter(folders["plain"])
    huge = {path: replace(m, a=m.a * 1e8) for path, m in weights.lora.items()}
    with pytest.raises(ValueError, match="overflow"):
        harness.runner.prepare_adapter(AdapterWeights(huge, None))


def test_slots_are_reused_under_pressure(zoo: Zoo) -> None:
    """Two slots, nine adapters, all at once: each waits its turn and answers as it does alone."""
    model, folders, _ = zoo
    texts = prompts(len(folders))
    roomy = Harness(model, folders, eos=frozenset())
    expected = [roomy.answer(t, greedy(6), adapter=k) for t, k in zip(texts, folders, strict=True)]
    tight = Harness(model, folders, slots=2, eos=frozenset())
    jobs = [Job(t, greedy(6), adapter=k) for t, k in zip(texts, folders, strict=True)]
    assert tight.run(jobs) == expected


def test_prefix_cache_never_crosses_tenants_or_adapters(zoo: Zoo) -> None:
    model, folders, _ = zoo
    text = prompts(8)[-1]
    harness = Harness(model, folders, eos=frozenset())

    def cached(adapter: str | None, tenant: str) -> int:
        job = Job(text, greedy(4), adapter=adapter, tenant=tenant)
        harness.run([job])
        assert job.sequence is not None
        return job.sequence.cached_prompt

    assert cached(None, "a") == 0
    assert cached(None, "a") == len(text) // 16 * 16
    assert cached(None, "b") == 0
    assert cached("plain", "a") == 0
    assert cached("plain", "a") > 0
    assert cached("rslora", "a") == 0


@pytest.mark.parametrize("params", [greedy(20), SamplingParams(temperature=0.9, seed=3, max_tokens=20)])
def test_prompts_that_leave_a_template_anywhere_answer_as_they_do_without_a_cache(
    zoo: Zoo, params: SamplingParams
) -> None:
    model, folders, _ = zoo
    template, ends = prompts(5)[-1], prompts(4)
    found = {}
    for caching in (False, True):
        harness = Harness(model, folders, num_blocks=64, eos=frozenset())
        harness.scheduler.prefix_caching = caching
        jobs = [
            Job(template[: 41 - 10 * i] + end, params, adapter=kind, draft_cap=8)
            for kind in (None, "plain", "all-linear")
            for i, end in enumerate(ends)
        ]
        answers = [harness.run([job])[0] for job in jobs]
        found[caching] = answers, [job.sequence.cached_prompt for job in jobs if job.sequence is not None]
    assert found[True][0] == found[False][0]
    assert found[True][1] == [0, 31, 21, 11] * 3
    assert found[False][1] == [0] * 12


@pytest.mark.parametrize("quantize", list(Quantization))
def test_a_quantised_base_serves_every_adapter_and_speculation_changes_nothing(
    zoo: Zoo, quantize: Quantization
) -> None:
    model, folders, _ = zoo
    harness = Harness(model, folders, eos=frozenset(), quantize=quantize)
    texts = prompts(len(folders))

    def answers(draft_cap: int) -> list[list[int]]:
        jobs = [Job(text, greedy(), kind, draft_cap) for kind, text in zip(folders, texts, strict=True)]
        found = harness.run(jobs)
        drafted = sum(job.sequence.drafted for job in jobs if job.sequence is not None)
        assert bool(drafted) == bool(draft_cap)
        return found

    plain, drafting = answers(0), answers(8)
    assert all(len(answer) == 20 for answer in plain)
    # The kernels round activations to bfloat16, so ties may fall either way: rare, and never promised (decision 2).
    assert sum(a != b for a, b in zip(plain, drafting, strict=True)) <= 2
