"""Every model family the README names, as a tiny random model: paged, chunked, preempted and batched = transformers alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.engine import Harness, Job, assert_same_tokens, oracle_greedy
from support.families import FAMILIES, SHAPE, tiny
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from slipstream.engine import batch
from slipstream.engine.attention import Segments
from slipstream.engine.config import FastPath
from slipstream.engine.loader import adopt_model
from slipstream.errors import ModelUnsupported
from slipstream.protocol import SamplingParams


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str) -> None:
    model = tiny(family)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in (1, 5, 16, 33, 70, 100)]
    # 32 tokens a step chunks the long prompts; 18 blocks of 8 cannot hold all sequences, so some are preempted
    harness = Harness(model, num_blocks=18, block_size=8, max_batched_tokens=32, max_num_seqs=6, eos=frozenset())
    jobs = [Job(p, SamplingParams(temperature=0.0, max_tokens=40), start_step=i) for i, p in enumerate(prompts)]
    answers = harness.run(jobs)
    assert harness.scheduler.counters.preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, gaps = oracle_greedy(model, prompt, 40)
        assert_same_tokens(answer, expected, gaps)


def test_a_model_outside_the_attention_interface_is_refused_by_name() -> None:
    config = CONFIG_MAPPING["falcon"](
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, alibi=False
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ModelUnsupported, match="Falcon"):
        adopt_model(model)


def test_rotary_factors_that_depend_on_company_are_refused_by_name() -> None:
    config = CONFIG_MAPPING["llama"](
        **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    )
    with pytest.raises(ModelUnsupported, match="dynamic"):
        adopt_model(AutoModelForCausalLM.from_config(config))


def test_attention_sinks_are_refused_by_name() -> None:
    torch.manual_seed(0)
    moe = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 24}
    plain_rope = {"rope_type": "default", "rope_theta": 1e4}
    config = CONFIG_MAPPING["gpt_oss"](**SHAPE, **moe, rope_parameters=plain_rope)
    with pytest.raises(ModelUnsupported, match="s_aux"):
        Harness(AutoModelForCausalLM.from_config(config).eval())


def test_a_forward_that_is_not_transformers_own_is_refused() -> None:
    """The start-up check: a head that does more than scaling and capping."""
    model = tiny("llama")
    plain = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = out.logits.flip(-1)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        with pytest.raises(ModelUnsupported, match="own logits"):
            Harness(model, copy_model=False)


def test_one_long_context_does_not_widen_the_others() -> None:
    """Sequences of very different contexts are attended in groups of their own, and still agree with transformers."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(5)
    lengths = (4, 9, 200, 30, 150)
    texts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "WIDTH_UNIT", 16)
        harness = Harness(model, eos=frozenset(), disable=(FastPath.ADAPTIVE_DRAFTS, FastPath.NATIVE_KERNELS))
        widths: list[set[int]] = []
        build = batch.build_batch

        def spy(*args: Any) -> Any:
            made = build(*args)
            assert isinstance(made.paged.layout, Segments)
            widths.append({s.length for s in made.paged.layout.segments})
            return made

        patch.setattr("slipstream.engine.runner.build_batch", spy)
        answers = harness.run([Job(t, SamplingParams(temperature=0.0, max_tokens=20)) for t in texts])
    assert max(len(w) for w in widths) >= 3
    for text, answer in zip(texts, answers, strict=True):
        expected, gaps = oracle_greedy(model, text, 20)
        assert_same_tokens(answer, expected, gaps)


def test_recurrent_layers_are_refused_by_name() -> None:
    model = tiny("llama")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelUnsupported, match="linear_attention"):
        adopt_model(model)
