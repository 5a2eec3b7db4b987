"""From settings to what an engine replica is built from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deployments.replica_plan import ReplicaPlan, engine_config, on_its_cores
from deployments.serve_local import for_this_machine
from slipstream.config import ModelSettings, load_settings
from slipstream.engine.config import EngineConfig


def built(**settings: object) -> EngineConfig:
    plan = ReplicaPlan(ModelSettings.model_validate(settings), "m", Path("/home-of-it"), "file:///x")
    return engine_config(plan, Path("/model"))


def test_every_setting_of_the_engine_reaches_it() -> None:
    wanted: dict[str, object] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 100,
        "max_batched_tokens": 20,
        "max_num_seqs": 3,
        "max_waiting": 4,
        "kv_cache_bytes": 1 << 21,
        "block_size": 8,
        "prefix_caching": False,
        "max_draft": 2,
        "fully_sharded_loras": True,
        "adapter_slots": 5,
        "host_adapter_bytes": 1 << 22,
        "adapter_fetch_timeout_s": 7.0,
    }
    config = built(**wanted)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_the_defaults_are_the_engines_own() -> None:
    config, own = built(), EngineConfig(model_path="/model", model_id="m")
    for name in ("max_model_len", "prefix_caching", "max_draft", "adapter_fetch_timeout_s"):
        assert getattr(config, name) == getattr(own, name)


def test_adapters_are_fetched_beside_the_cache() -> None:
    assert built().scratch_dir == "/home-of-it/cache/adapters"


@pytest.mark.parametrize("ranks", [1, 2])
def test_on_one_machine_all_cores_between_the_ranks(ranks: int) -> None:
    settings = for_this_machine(load_settings(tensor_parallel_size=ranks, drain_s=60))
    assert settings.models[0].engine_threads == max(1, len(os.sched_getaffinity(0)) // ranks)
    assert (settings.drain_s, settings.gateway_drain_s) == (10, 10), "Ctrl-C is not to take longer"


@pytest.mark.parametrize(("cpus", "threads", "expected"), [(0.5, None, 1), (2, None, 2), (2.5, None, 3), (2, 7, 7)])
def test_on_a_cluster_the_cores_that_were_set_aside(cpus: float, threads: int | None, expected: int) -> None:
    model = ModelSettings(engine_cpus=cpus, engine_threads=threads)
    assert on_its_cores(model).engine_threads == expected
