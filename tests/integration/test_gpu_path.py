"""What a GPU runs, on the processor: Triton's kernels interpreted, steps padded and replayed from fixed buffers.

The text of a tiny model with adapters of several kinds is transformers + PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import interpreted  # noqa: F401  # before any kernel
from support.adapters import random_peft_adapter, random_streams, tiny_llama, write_own_streams
from support.engine import Harness, Job, assert_same_tokens, oracle_greedy

from slipstream.engine.graphs import Captured, bucket_of, record_again
from slipstream.engine.kernels import triton_kernels
from slipstream.engine.quantized import Quantization
from slipstream.engine.runner import ModelRunner
from slipstream.engine.triton_lora import TritonRows
from slipstream.protocol import SamplingParams

KINDS: dict[str, dict[str, Any]] = {
    "all-linear": {"r": 8, "target_modules": "all-linear"},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "rank-32": {"r": 32, "target_modules": ["k_proj", "down_proj"]},
}
TOKENS = 5


class Counting:
    """A `Capture` that counts recordings and replays; like a CUDA graph, each is good only while nothing has moved."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0
        self.runner: ModelRunner | None = None

    def addresses(self) -> list[int]:
        """Of the base weights, and of the stacks that the rows of this call use."""
        assert self.runner is not None
        bases = [id(group.base) for group in self.runner._bank._groups.values()]
        used = [a.stack for a in self.runner._rows.adapters if isinstance(a, TritonRows)]
        return bases + [t.data_ptr() for stack in used for part in stack.parts.values() for t in part.tensors()]

    def __call__(self, work: Callable[[], torch.Tensor]) -> Captured:
        self.recorded += 1
        captured, recorded_on = record_again(work), self.addresses()

        def replay() -> None:
            assert self.addresses() == recorded_on, "a recording outlived the tensors that it reads"
            self.replayed += 1
            captured.replay()

        return Captured(replay, captured.out)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Path], dict[str, Any]]:
    model = tiny_llama()
    folders, oracles = {}, {}
    for i, (kind, kwargs) in enumerate(KINDS.items()):
        folders[kind] = tmp_path_factory.mktemp(kind)
        oracles[kind] = random_peft_adapter(model, folders[kind], seed=i, **kwargs)
    write_own_streams(folders["all-linear"], random_streams(model.config.hidden_size, 3, rank=4, seed=1))
    return model, folders, oracles


@pytest.mark.parametrize("recorded", [False, True], ids=["launched", "recorded"])
def test_mixed_adapters_chunked_and_drafting_give_the_oracles_text(
    zoo: tuple[Any, dict[str, Path], dict[str, Any]], recorded: bool
) -> None:
    model, folders, oracles = zoo
    capture = Counting()
    kernels = triton_kernels(capture if recorded else None)
    harness = Harness(model, folders, block_size=8, max_batched_tokens=24, eos=frozenset(), kernels=kernels)
    capture.runner = harness.runner
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, model.config.vocab_size, (n,), generator=generator).tolist() for n in (5, 30, 9, 3)]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS)
    names = [*folders, None]
    jobs = [Job(text, params, name, draft_cap=3) for text, name in zip(texts, names, strict=True)]
    answers = harness.run(jobs)
    for text, name, answer in zip(texts, names, answers, strict=True):
        assert_same_tokens(answer, *oracle_greedy(oracles[name] if name else model, text, TOKENS))
    assert bool(capture.replayed) == recorded
    alike = Job([*texts[1][:28], 4, 5], params, "dora", draft_cap=3)  # goes on within a block of the second one's
    assert_same_tokens(harness.run([alike])[0], *oracle_greedy(oracles["dora"], list(alike.prompt), TOKENS))
    assert alike.sequence is not None
    assert alike.sequence.cached_prompt == 28


def test_recordings_are_used_again_until_what_they_read_moves(
    zoo: tuple[Any, dict[str, Path], dict[str, Any]],
) -> None:
    model, folders, _ = zoo
    capture = Counting()
    kernels = triton_kernels(capture)
    harness = Harness(
        model, folders, block_size=8, eos=frozenset(), kernels=kernels, quantize=Quantization.INT8
    )  # whose weights are made anew after the start-up check
    capture.runner = harness.runner
    params = SamplingParams(temperature=0.0, max_tokens=3)

    def ask(name: str | None) -> list[int]:
        return harness.run([Job([5, 6, 7, 8, 9], params, name)])[0]

    first, base = ask("all-linear"), ask(None)
    before = capture.recorded
    assert ask("all-linear") == first
    assert ask(None) == base
    assert capture.recorded == before  # the same shapes: nothing is recorded anew
    ask("dora")  # comes into the stack of the other, which gets gains
    assert capture.recorded > before
    assert ask("all-linear") == first


def test_steps_are_padded_to_the_next_bucket_and_long_ones_not_at_all() -> None:
    assert [bucket_of(n) for n in (1, 3, 8, 9, 17, 128, 129, 256, 257)] == [1, 4, 8, 16, 24, 128, 144, 256, None]
