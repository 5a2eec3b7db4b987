"""A runner that fails while it copies an adapter to the device: that adapter's sequences end, everybody else's go on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.scripted import ScriptedRunner

from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.blocks import BlockPool
from slipstream.engine.core import EngineCore, StepOutcome
from slipstream.engine.residency import Residency, ResidencyManager
from slipstream.engine.scheduler import Scheduler
from slipstream.engine.sequence import Sequence
from slipstream.protocol import FinishReason, SamplingParams


@dataclass(frozen=True)
class Named:
    """A prepared adapter that is only its digest."""

    digest: str
    nbytes: int = 100
    num_streams: int = 3


class FullDevice(ScriptedRunner):
    """Has no room for the adapters in `refused`."""

    def __init__(self, error: Exception, refused: set[str]) -> None:
        super().__init__(block_size=4)
        self.error = error
        self.refused = refused
        self.slots: dict[int, str] = {}

    def prepare_adapter(self, weights: AdapterWeights) -> Named:
        raise AssertionError("these tests bring adapters that are laid out")

    def load_adapter(self, slot: int, adapter: Named) -> None:
        if adapter.digest in self.refused:
            raise self.error
        assert slot not in self.slots
        self.slots[slot] = adapter.digest

    def unload_adapter(self, slot: int) -> None:
        del self.slots[slot]


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("invalid argument"), MemoryError()]


def make_core(runner: FullDevice, slots: int = 2) -> EngineCore[Named]:
    residency = ResidencyManager(slots, 10_000)
    return EngineCore(Scheduler(BlockPool(64, 4), residency, 32, 8), residency, runner)


def add(core: EngineCore[Named], seq_id: int, adapter: str | None) -> Sequence:
    params = SamplingParams(temperature=0.0, max_tokens=12)
    seq = Sequence(seq_id, "t", params, [seq_id, 2, 3], 3, 15, frozenset(), adapter=adapter, draft_cap=8)
    core.add(seq)
    return seq


def run(core: EngineCore[Named]) -> list[StepOutcome]:
    """Step to the end; every fetch arrives at once."""
    outcomes = []
    while core.has_work:
        outcomes.append(core.step())
        core.check_integrity()
        for digest in outcomes[-1].fetch:
            core.adapter_ready(digest, Named(digest))
        assert len(outcomes) < 200, "the engine makes no progress"
    return outcomes


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_only_the_failing_adapters_sequences_end(error: Exception) -> None:
    runner = FullDevice(error, {"big"})
    core = make_core(runner)
    fine = [add(core, 1, None), add(core, 2, "small")]
    lost = [add(core, 3, "big"), add(core, 4, "big")]
    core.step()
    for digest in ("small", "big"):
        core.adapter_ready(digest, Named(digest))
    outcome = core.step()
    assert outcome.failed == {"big": [3, 4]}
    assert core.residency.state("big") is Residency.FAILED
    core.check_integrity()
    assert not any(o.failed for o in run(core))
    assert all(s.finish_reason is FinishReason.LENGTH and s.num_answer == 12 for s in fine)
    assert all(s.finish_reason is FinishReason.ABORTED for s in lost)
    assert list(runner.slots.values()) == ["small"]
    assert core.stats().kv_blocks_free == 64


def test_the_slot_goes_to_whoever_waits_and_the_adapter_is_tried_anew() -> None:
    runner = FullDevice(ERRORS[0], {"big"})
    core = make_core(runner, slots=1)
    lost, fine = add(core, 1, "big"), add(core, 2, "small")
    outcomes = run(core)
    assert [o.failed for o in outcomes if o.failed] == [{"big": [1]}]
    assert (lost.finish_reason, fine.num_answer) == (FinishReason.ABORTED, 12)
    runner.refused.clear()
    again = add(core, 3, "big")
    outcomes = run(core)
    assert outcomes[0].fetch == ["big"], "its host copy went with the failure"
    assert again.num_answer == 12


def test_other_errors_are_not_hidden() -> None:
    core = make_core(FullDevice(AssertionError("a bug"), {"big"}))
    add(core, 1, "big")
    core.step()
    core.adapter_ready("big", Named("big"))
    with pytest.raises(AssertionError, match="a bug"):
        core.step()
