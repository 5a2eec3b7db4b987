"""Several ranks give what one gives: text, accepted drafts and log-probabilities, for every family and kind of adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import random_peft_adapter, random_streams, write_own_streams
from support.engine import Harness, Job, assert_same_tokens, oracle_greedy
from support.families import FAMILIES, tiny
from support.ranks import RankProcesses
from support.tiny_model import FolderAdapters, tiny_engine_config
from support.zoo import SPECULATING, Zoo, greedy, make_zoo, prompts
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from slipstream.adapters.load import load_adapter
from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.config import FastPath
from slipstream.engine.kernels import triton_kernels
from slipstream.engine.parallel.group import TorchGroup
from slipstream.engine.parallel.load import load_shard
from slipstream.engine.parallel.ranks import Lead
from slipstream.engine.service import EngineService
from slipstream.errors import ConfigError
from slipstream.protocol import AdapterRef, GenerateRequest, SamplingParams

NO_EOS = frozenset[int]()


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankProcesses]:
    processes = RankProcesses()
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return make_zoo(tmp_path_factory.mktemp("zoo"))


def jobs_of(zoo: Zoo, **params: Any) -> list[Job]:
    kinds = [*zoo[1], None]
    options = {"temperature": 0.0, "max_tokens": 20, **params}
    return [
        Job(text, SamplingParams(**options), adapter=kind, draft_cap=8, start_step=i % 3)
        for i, (kind, text) in enumerate(zip(kinds, prompts(len(kinds)), strict=True))
    ]


def counts(jobs: list[Job]) -> list[tuple[int, int, int]]:
    sequences = [job.sequence for job in jobs if job.sequence is not None]
    return [(s.decode_steps, s.drafted, s.accepted) for s in sequences]


SHARDED: dict[str, Any] = {"fully_sharded_loras": True}


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (4, {}),
        (2, SHARDED),
        (4, SHARDED),
        (2, SHARDED | {"disable": (FastPath.ADAPTIVE_DRAFTS, FastPath.GROUPED_LORA)}),
        (2, SHARDED | {"kernels": triton_kernels()}),
    ],
    ids=["2", "4", "2, sharded", "4, sharded", "2, sharded, plain", "2, sharded, triton"],
)
def test_every_kind_of_adapter_mixed_gives_the_same_text_and_accepted_drafts(
    zoo: Zoo, ranks: RankProcesses, tmp_path: Path, size: int, options: dict[str, Any]
) -> None:
    """Also where each rank has a share of A and B alone, whichever code does the sums (2, 3 and 10 do not divide by 4)."""
    model, folders, oracles = zoo
    model.save_pretrained(tmp_path)
    shape: dict[str, Any] = {"num_blocks": 48, "block_size": 8}
    one, several = jobs_of(zoo), jobs_of(zoo)
    expected = Harness(model, folders, max_batched_tokens=48, eos=NO_EOS, **shape).run(one)
    with ranks.engine(tmp_path, size, eos_ids=NO_EOS, **shape, **options) as (loaded, runner):
        harness = Harness(None, folders, max_batched_tokens=48, eos=NO_EOS, runner=runner, **shape)
        answers = harness.run(several)
        traffic = loaded.shards.group.traffic
    assert traffic.calls > 0
    for job, answer, alone in zip(several, answers, expected, strict=True):
        oracle = oracles[job.adapter] if job.adapter else model
        assert_same_tokens(answer, *oracle_greedy(oracle, list(job.prompt), 20))
        assert answer == alone
    assert counts(several) == counts(one)
    assert {job.adapter for job, found in zip(several, counts(several), strict=True) if found[1]} >= SPECULATING


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.3, "top_p": 0.8, "top_k": 40, "min_p": 0.02, "seed": 6, "logprobs": 3},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {7: 2.0, 120: -3.0}, "logprobs": 0},
    ],
    ids=["temperature", "truncated", "penalties"],
)
def test_sampled_text_and_logprobs_are_those_of_one_rank(
    zoo: Zoo, ranks: RankProcesses, tmp_path: Path, params: dict[str, Any]
) -> None:
    model, folders, _ = zoo
    model.save_pretrained(tmp_path)
    one, several = jobs_of(zoo, **params), jobs_of(zoo, **params)
    expected = Harness(model, folders, eos=NO_EOS).run(one)
    with ranks.engine(tmp_path, 2, eos_ids=NO_EOS) as (_, runner):
        answers = Harness(None, folders, eos=NO_EOS, runner=runner).run(several)
    assert answers == expected
    assert counts(several) == counts(one)
    for job, alone in zip(several, one, strict=True):
        assert len(job.logprobs) == len(alone.logprobs) == (20 if "logprobs" in params else 0)
        for mine, theirs in zip(job.logprobs, alone.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]


def test_every_rank_copies_its_part_of_a_block_that_a_prompt_begins_like(
    zoo: Zoo, ranks: RankProcesses, tmp_path: Path
) -> None:
    model, folders, _ = zoo
    model.save_pretrained(tmp_path)
    template = prompts(5)[-1]

    def ask(harness: Harness) -> list[Job]:
        jobs = [Job([*template[:at], 5, at], greedy(12), adapter="all-linear", draft_cap=8) for at in (40, 27, 13)]
        for job in jobs:
            harness.run([job])
        return jobs

    plain = Harness(model, folders, eos=NO_EOS)
    plain.scheduler.prefix_caching = False
    with ranks.engine(tmp_path, 2, eos_ids=NO_EOS) as (_, runner):
        several = ask(Harness(None, folders, eos=NO_EOS, runner=runner))
    assert [job.answer for job in several] == [job.answer for job in ask(plain)]
    assert [job.sequence.cached_prompt for job in several if job.sequence is not None] == [0, 27, 13]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_over_several_ranks_equals_transformers(
    family: str, size: int, ranks: RankProcesses, tmp_path: Path
) -> None:
    """With four ranks and two KV heads two ranks have the same one."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in (1, 16, 70)]
    with ranks.engine(tmp_path, size, eos_ids=NO_EOS, num_blocks=40, block_size=8) as (_, runner):
        harness = Harness(None, num_blocks=40, block_size=8, max_batched_tokens=32, eos=NO_EOS, runner=runner)
        answers = harness.run([Job(text, greedy(24)) for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        assert_same_tokens(answer, *oracle_greedy(model, text, 24))


@pytest.mark.parametrize(
    "shape",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "vocab_size": 259, "intermediate_size": 90},
    ],
    ids=["biases", "tied, uneven"],
)
def test_biases_ties_and_sizes_that_do_not_divide(shape: dict[str, Any], ranks: RankProcesses, tmp_path: Path) -> None:
    plain = tiny("llama").config.to_dict()
    torch.manual_seed(8)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**{**plain, **shape})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
    model.save_pretrained(tmp_path)
    text = list(range(3, 30))
    with ranks.engine(tmp_path, 4, eos_ids=NO_EOS) as (_, runner):
        answer = Harness(None, eos=NO_EOS, runner=runner).answer(text, greedy(24))
    assert_same_tokens(answer, *oracle_greedy(model, text, 24))


def test_bfloat16_candidates_are_compared_in_float32_over_all_ranks(
    zoo: Zoo, ranks: RankProcesses, tmp_path: Path
) -> None:
    """A rank's head is rounded; the best few of all ranks are scored anew, or ties would go by the rank."""
    zoo[0].save_pretrained(tmp_path)
    text = prompts(1)[0]
    with ranks.engine(tmp_path, 2, "bfloat16", eos_ids=NO_EOS) as (loaded, runner):
        drafting = Harness(None, zoo[1], eos=NO_EOS, runner=runner)
        jobs = [Job(text, greedy(), kind, draft_cap=cap) for kind in ("all-linear", "dora") for cap in (0, 8)]
        answers = drafting.run(jobs)
        assert loaded.dtype == torch.bfloat16
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]


def test_no_rank_holds_the_whole_model(zoo: Zoo, ranks: RankProcesses, tmp_path: Path) -> None:
    model = zoo[0]
    model.save_pretrained(tmp_path)
    with ranks.engine(tmp_path, 2) as (loaded, _):
        own = {name: p.numel() for name, p in loaded.model.named_parameters()}
        assert loaded.linears["model.layers.0.mlp.down_proj"] == (32, 64)  # what adapters are checked against
        assert loaded.shards.vocab_size == 128
    linear = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    assert sum(n for name, n in own.items() if "norm" not in name) <= linear / 2


def test_bytes_over_collectives_are_the_formulas(zoo: Zoo, ranks: RankProcesses, tmp_path: Path) -> None:
    """A step of n rows: an embedding and two sums a layer of n·H, and three numbers for each row that samples."""
    zoo[0].save_pretrained(tmp_path)
    with ranks.engine(tmp_path, 2, eos_ids=NO_EOS) as (loaded, runner):
        harness = Harness(None, eos=NO_EOS, runner=runner)
        harness.submit(Job(list(range(3, 20)), greedy(8)))
        harness.step()
        for rows in (1, 1):
            before = loaded.shards.group.traffic.bytes
            harness.step()
            spent = loaded.shards.group.traffic.bytes - before
            assert spent == 4 * (rows * 32 * (1 + 2 * 3) + 3 * rows)
        while harness.core.has_work:
            harness.step()


def test_fully_sharded_adapters_are_cut_in_two_and_cost_the_formulas_bytes(
    zoo: Zoo, ranks: RankProcesses, tmp_path: Path
) -> None:
    """A row of an adapter on every linear: half a rank for each of five column-wise linears, a whole one for two others."""
    model, folders, _ = zoo
    model.save_pretrained(tmp_path)
    lora = load_adapter(folders["all-linear"]).lora
    whole = sum(m.a.numel() + m.b.numel() for m in lora.values())
    with ranks.engine(tmp_path, 2, eos_ids=NO_EOS, **SHARDED) as (loaded, runner):
        prepared = runner.prepare_adapter(AdapterWeights(lora, None))
        assert prepared.nbytes == 4 * whole / 2
        harness = Harness(None, {"all": AdapterWeights(lora, None)}, eos=NO_EOS, runner=runner)
        harness.submit(Job(list(range(3, 20)), greedy(8), adapter="all"))
        for _ in ("the adapter is loaded", "the prompt is read"):
            harness.step()
        before = loaded.shards.group.traffic.bytes
        harness.step()
        spent = loaded.shards.group.traffic.bytes - before
        assert spent == 4 * (32 * (1 + 2 * 3) + 3 + 3 * 8 * (5 / 2 + 2))
        while harness.core.has_work:
            harness.step()


def test_an_adapter_that_does_not_fit_is_refused_and_everything_goes_on(
    zoo: Zoo, ranks: RankProcesses, tmp_path: Path
) -> None:
    model, folders, oracles = zoo
    model.save_pretrained(tmp_path)
    good = load_adapter(folders["all-linear"])
    bad = load_adapter(folders["plain"])
    name = next(iter(bad.lora))
    wrong = type(bad)({"model.layers.9.self_attn.q_proj": bad.lora[name]}, None)
    with ranks.engine(tmp_path, 2, eos_ids=NO_EOS) as (_, runner):
        with pytest.raises((ValueError, KeyError)):
            runner.prepare_adapter(wrong)
        harness = Harness(None, {"good": good}, eos=NO_EOS, runner=runner)
        text = prompts(1)[0]
        answer = harness.answer(text, greedy(), adapter="good", draft_cap=8)
        assert_same_tokens(answer, *oracle_greedy(oracles["all-linear"], text, 20))
        harness.core.forget_adapter("good")
        assert harness.answer(text, greedy(), adapter="good", draft_cap=8) == answer  # loaded anew, under another key


async def test_a_service_of_two_ranks_answers_as_one_of_one(zoo: Zoo, ranks: RankProcesses, tmp_path: Path) -> None:
    """The whole of it: start-up with measured costs, an adapter fetched by rank 0 alone, drafts, text."""
    config = tiny_engine_config(tmp_path)
    weights = random_streams(32, 3, rank=4, seed=1)
    folder = tmp_path / "adapter"
    random_peft_adapter(
        AutoModelForCausalLM.from_pretrained(tmp_path), folder, r=4, target_modules=["q_proj", "down_proj"]
    )
    write_own_streams(folder, weights)
    digest = "sha256:" + "1" * 64
    request = GenerateRequest(
        "r",
        "t",
        SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        text="tensor",
        adapter=AdapterRef("t", digest),
    )

    async def answer(lead: Lead | None) -> tuple[str, int]:
        engine = EngineService(config, FolderAdapters({digest: folder}), lead)
        await engine.start()
        try:
            events = [event async for step in engine.generate(request) for event in step]
            assert (await engine.describe()).linears["model.layers.0.mlp.down_proj"] == (32, 64)
        finally:
            await engine.close()
        usage = events[-1].usage
        assert usage is not None
        return "".join(event.text for event in events), usage.completion_tokens

    alone = await answer(None)
    with ranks.service(config, 2) as lead:
        assert await answer(lead) == alone


@pytest.mark.parametrize("size", [3, 5, 8])
def test_a_degree_that_does_not_divide_is_refused_naming_those_that_do(zoo: Zoo, tmp_path: Path, size: int) -> None:
    zoo[0].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="use one of 1, 2, 4"):
        load_shard(str(tmp_path), "float32", "cpu", TorchGroup(None, 0, size))
