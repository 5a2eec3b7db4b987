"""What `slipstream capacity` says is what the engine allocates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.adapters import random_peft_adapter, random_streams, write_own_streams
from support.families import tiny
from support.real_model import smollm2_path
from support.shared import shared_path
from support.tiny_model import tiny_tokenizer
from typer.testing import CliRunner

from slipstream.adapters.load import load_adapter
from slipstream.capacity import GATED, ModelShape, read_shape, replicas, target_requests_per_s
from slipstream.cli import app
from slipstream.engine.build import build
from slipstream.engine.config import EngineConfig

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def built(folder: Path, **settings: Any) -> Any:
    return build(
        EngineConfig(str(folder), "tiny", dtype="float32", device="cpu", num_threads=1, max_draft=0, **settings)
    )


@pytest.mark.parametrize("family", sorted(GATED))
def test_bytes_are_what_the_engine_allocates(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    shape = read_shape(tmp_path / "model", value_bytes=4)
    engine = built(tmp_path / "model", kv_cache_bytes=3 << 20)
    assert engine.num_blocks * 16 == shape.kv_tokens(3 << 20)
    for rank, streams, stream_rank in ((4, 3, None), (8, 2, 4)):
        folder = tmp_path / f"adapter-{rank}"
        random_peft_adapter(model, folder, r=rank, target_modules=ALL_LINEAR)
        write_own_streams(folder, random_streams(model.config.hidden_size, streams, rank=stream_rank))
        prepared = engine.runner.prepare_adapter(load_adapter(folder))
        assert prepared.nbytes == shape.lora_bytes(rank) + shape.streams_bytes(streams, stream_rank)


@pytest.mark.model
def test_the_figures_of_the_page_are_smollm2s() -> None:
    shape = read_shape(smollm2_path())
    assert (shape.kv_token_bytes, shape.kv_tokens(1 << 30)) == (23_040, 46_592)
    assert (shape.lora_bytes(16), shape.streams_bytes(3)) == (9_768_960, 1_994_112)
    folder = shared_path("adapters", "snips-turbo")
    on_disk = sum(
        (folder / name).stat().st_size for name in ("adapter_model.safetensors", "medusa_lm_head.safetensors")
    )
    assert abs(on_disk - shape.lora_bytes(16) - shape.streams_bytes(3)) < 60_000, "the files' headers"
    page = (Path(__file__).resolve().parents[2] / "docs/operations/capacity.md").read_text()
    for figure in ("23,040", "46,592", "9.8 MB", "2.0 MB", "131,072", "83.9 MB"):
        assert figure in page


def test_the_figures_of_the_page_are_mistrals() -> None:
    shape = ModelShape(layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128)
    assert (shape.kv_token_bytes, shape.lora_bytes(16)) == (131_072, 83_886_080)


def test_replicas_are_what_the_autoscaler_would_want() -> None:
    target = target_requests_per_s(work_per_s=300, prompt_tokens=500, answer_tokens=200)
    assert target == pytest.approx(0.6)
    assert [replicas(rate, target) for rate in (0, 0.6, 0.61, 6)] == [1, 1, 2, 10]


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["capacity", *words], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return done.output


def test_the_command(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    shape = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    config.write_text(json.dumps({"model_type": "mistral", "num_key_value_heads": 8, **shape}))
    found = json.loads(run(str(config), "--streams", "0", "--requests-per-s", "20", "--work-per-s", "900", "--json"))
    assert found["kv_bytes_per_token"] == 131_072
    assert found["adapter_bytes"] == 83_886_080
    assert found["adapters_in_host_memory"] == 25
    assert (found["target_requests_per_s"], found["replicas"]) == (1.8, 12)
    assert "adapter bytes" in run(str(tmp_path))
    assert "together" in run(str(config), "--requests-per-s", "20", code=1)
    config.write_text('{"model_type": "phi"}')
    assert "Sizes are known for" in run(str(config), code=1)
    config.write_text('{"model_type": "llama"}')
    assert "num_attention_heads" in run(str(config), code=1)
    assert "no readable config.json" in run(str(tmp_path / "none"), code=1)
