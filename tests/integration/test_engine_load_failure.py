"""The service when an adapter does not fit on the device: a clear error for its callers, and nothing for the others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.adapters import random_peft_adapter, random_streams, tiny_llama, write_lorax_streams
from support.tiny_model import FolderAdapters, save_tiny_model, tiny_engine_config

from slipstream.adapters.weights import AdapterWeights
from slipstream.engine.offline import OfflineEngine, Row
from slipstream.engine.runner import ModelRunner, PreparedAdapter
from slipstream.engine.service import EngineService
from slipstream.errors import AdapterUnavailable
from slipstream.protocol import AdapterRef, GenerateRequest, SamplingParams


async def answer(engine: EngineService, adapter: str | None, max_tokens: int, n: int = 1) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, n=n)
    ref = AdapterRef("t", adapter) if adapter else None
    call = GenerateRequest("r", "t", params, text="select", adapter=ref)
    return [t for batch in [e async for e in engine.generate(call)] for event in batch for t in event.token_ids]


async def test_out_of_memory_fails_one_adapter_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One slot, so that the second adapter also shows that the failed one has left it. A Medusa-1 one: those are big."""
    model = save_tiny_model(tmp_path)
    folders = {f"sha256:{name}": tmp_path_factory.mktemp(name) for name in ("big", "small")}
    for folder in folders.values():
        random_peft_adapter(model, folder)
    streams = random_streams(model.config.hidden_size, 3, vocab=model.config.vocab_size)
    write_lorax_streams(folders["sha256:big"], streams)
    load, full = ModelRunner.load_adapter, [True]

    def load_adapter(self: ModelRunner, slot: int, adapter: PreparedAdapter) -> None:
        if full[0] and adapter.num_streams:
            raise torch.OutOfMemoryError("CUDA out of memory")
        load(self, slot, adapter)

    monkeypatch.setattr(ModelRunner, "load_adapter", load_adapter)
    engine = EngineService(tiny_engine_config(tmp_path, adapter_slots=1), FolderAdapters(folders))
    await engine.start()
    try:
        async with asyncio.timeout(60):
            fine: list[Any] = [asyncio.create_task(answer(engine, None, 40))]
            lost = [asyncio.create_task(answer(engine, "sha256:big", 12, n)) for n in (1, 2)]
            fine.append(asyncio.create_task(answer(engine, "sha256:small", 40)))
            for task in lost:
                with pytest.raises(AdapterUnavailable, match="no room"):
                    await task
            assert [len(a) for a in await asyncio.gather(*fine)] == [40, 40]
            engine.check_health()
            full[0] = False
            assert len(await answer(engine, "sha256:big", 12)) == 12
            stats = await engine.stats()
            assert stats.drafted_tokens > 0
            assert stats.adapters["sha256:big"] == "on_device"
    finally:
        await engine.close()


def test_the_offline_engine_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    engine = OfflineEngine(model)
    engine.add_adapter("big", AdapterWeights({}, random_streams(model.config.hidden_size, vocab=128)))
    rows = [
        Row([5, 6], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True), name, 8) for name in (None, "big")
    ]
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "load_adapter", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
        with pytest.raises(AdapterUnavailable, match="'big' could not be copied"):
            engine.run(rows)
    assert [len(answer) for answer in engine.run(rows).answers] == [8, 8]
