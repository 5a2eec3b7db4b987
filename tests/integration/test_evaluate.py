"""`slipstream evaluate` from the command line to the picture, on a tiny base model and on the real one."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.adapters import TINY_ID, base_spec_of, random_peft_adapter, random_streams, write_own_streams
from support.api_app import ApiWorld
from support.real_model import smollm2_path
from support.shared import shared_path
from support.tiny_model import save_tiny_model
from typer.testing import CliRunner, Result

from slipstream.adapters.save import TurboMetadata, save_medusa
from slipstream.base_models import PreparedModel
from slipstream.cli import app
from slipstream.evaluation import EvaluationOptions, evaluate, open_adapter
from slipstream.testing import FakeEngine
from slipstream.training.data import read_rows

KEYS = {"exact_match", "rouge_l", "tokens_per_step", "acceptance", "tokens_per_second", "rows", "completion_tokens"}


class World:
    """A base model, a Turbo LoRA for it, and six rows, in a folder."""

    def __init__(self, root: Path) -> None:
        self.base = root / "tiny-llama"  # adapters for tests name tests/tiny-llama as their base
        self.model = save_tiny_model(self.base)
        self.adapter = root / "adapter"
        random_peft_adapter(self.model, self.adapter)
        self.streams = random_streams(self.model.config.hidden_size)
        write_own_streams(self.adapter, self.streams)
        self.data = root / "test.jsonl"
        rows = [{"prompt": f"prompt number {i}", "completion": " yes" * i} for i in range(1, 7)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.home = root / "home"

    def __call__(
        self, target: object, *arguments: object, data: Path | None = None, key: str = "", api: ApiWorld | None = None
    ) -> Result:
        usual = ["--data", data or self.data, "--base", self.base, "--dtype", "float32", "--max-tokens", 8]
        line = ["evaluate", target, *usual, *arguments]
        environment = {
            "SLIPSTREAM_HOME": str(self.home),
            "SLIPSTREAM_API_KEY": key,
            "COLUMNS": "220",
            "NO_COLOR": "1",
        }
        result = CliRunner().invoke(
            app, list(map(str, line)), env=environment, obj=api and httpx.ASGITransport(api.app)
        )
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_folder_as_json(world: World) -> None:
    result = world(world.adapter, "--json", "--limit", 5, "--concurrency", 2)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert list(found) == ["base", "lora", "turbo_lora"]
    assert all(set(figures) >= KEYS for figures in found.values())
    assert all(figures["rows"] == 5 and figures["tokens_per_second"] > 0 for figures in found.values())
    assert found["base"]["tokens_per_step"] == found["lora"]["tokens_per_step"] == 1.0
    assert found["lora"]["acceptance"] == []
    assert 1 <= len(found["turbo_lora"]["acceptance"]) <= 3
    assert all(0 <= share <= 1 for share in found["turbo_lora"]["acceptance"])
    assert found["turbo_lora"]["completion_tokens"] == found["lora"]["completion_tokens"]


def test_a_folder_as_a_table_and_a_picture(world: World, tmp_path: Path) -> None:
    picture = tmp_path / "out.png"
    result = world(world.adapter, "--picture", picture)
    assert result.exit_code == 0, result.output
    header, *rows = result.stdout.splitlines()
    assert header.split("  ")[0] == "VARIANT"
    assert [row.split()[0] for row in rows[:3]] == ["base", "lora", "turbo_lora"]
    assert "6 rows of test.jsonl, 8 at once, greedy, at most 8 tokens." in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "names its base only as" in result.stderr


def test_medusa_streams_alone_and_a_plain_lora(world: World, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    write_own_streams(alone, world.streams)
    medusa = tmp_path / "medusa"
    random_peft_adapter(world.model, medusa)
    own_heads = random_streams(world.model.config.hidden_size, vocab=world.model.config.vocab_size)
    save_medusa(medusa, own_heads, TurboMetadata(base_model=TINY_ID))
    assert list(json.loads(world(medusa, "--json").stdout)) == ["base", "lora", "medusa"]
    picture = tmp_path / "alone.svg"
    assert list(json.loads(world(alone, "--json", "--picture", picture).stdout)) == ["base", "turbo"]
    plain = tmp_path / "plain"
    random_peft_adapter(world.model, plain)
    assert list(json.loads(world(plain, "--json", "--picture", picture).stdout)) == ["base", "lora"]
    assert picture.stat().st_size > 1000


def test_a_published_adapter_is_downloaded_first(world: World, tmp_path: Path) -> None:
    api = ApiWorld(tmp_path / "uploads")
    api.rebuild(engines={TINY_ID: FakeEngine(base_spec_of(world.model))})
    key = asyncio.run(api.key())
    push = ["adapters", "push", str(world.adapter), "--name", "sql", "--url", "http://test", "--api-key", key]
    pushed = CliRunner().invoke(app, push, obj=httpx.ASGITransport(api.app))
    assert pushed.exit_code == 0, pushed.output
    shutil.rmtree(world.adapter)  # only the server has it now
    for name in ("sql", "sql/1", "sql@1"):
        result = world(name, "--json", "--url", "http://test", key=key, api=api)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["turbo_lora"]["rows"] == 6
    missing = world("nobody", "--url", "http://test", key=key, api=api)
    assert missing.exit_code == 1
    assert "nobody" in missing.stderr


def test_refusals_name_what_is_wrong(world: World, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    other = tmp_path / "other"
    shutil.copytree(world.adapter, other)
    for name in ("adapter_config.json", "turbo_config.json"):
        path = other / name
        path.write_text(path.read_text().replace("tests/tiny-llama", "tests/another-base"))
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((world.adapter,), {"data": tmp_path / "none.jsonl"}, "none.jsonl"),
        ((world.adapter,), {"data": bad}, "row 2"),
        ((world.adapter,), {"data": empty}, "no rows"),
        ((world.adapter, "--dtype", "int8"), {}, "--dtype is 'int8'"),
        ((world.adapter, "--base", "no such base"), {}, "--base names 'no such base'"),
        ((world.adapter, "--picture", "x.gif"), {}, "does not end in .png"),
        ((world.adapter, "--picture", tmp_path / "nowhere" / "x.png"), {}, "does not exist"),
        ((other,), {}, "name that base model with --base"),
        ((world.base,), {}, "No configuration says"),
        ((tmp_path / "nothing",), {"key": "k"}, "is not a folder"),
        (("sql",), {}, "is not a folder here"),
    ]
    for arguments, more, says in cases:
        result = world(*arguments, **more)
        assert result.exit_code == 1, (says, result.output)
        assert result.stderr.startswith("Error: "), (says, result.stderr)
        assert says in result.stderr
        assert result.stdout == ""


def test_a_digest_of_another_base_is_refused(world: World) -> None:
    config = json.loads((world.adapter / "turbo_config.json").read_text())
    config["base_digest"] = "sha256:" + "0" * 64
    (world.adapter / "turbo_config.json").write_text(json.dumps(config))
    result = world(world.adapter)
    assert result.exit_code == 1
    assert "names base sha256:000" in result.stderr


def test_wrong_usage_is_exit_2(world: World) -> None:
    assert world(world.adapter, "--concurrency", 0).exit_code == 2
    assert CliRunner().invoke(app, ["evaluate", "x"]).exit_code == 2


def test_help_teaches() -> None:
    result = CliRunner().invoke(app, ["evaluate", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "acceptance" in result.output


@pytest.mark.model
def test_the_trained_turbo_lora_pays() -> None:
    rows = read_rows(shared_path("data", "snips_slots", "test.jsonl"), 8)
    base = PreparedModel("SmolLM2-135M-Instruct", smollm2_path())
    opened = open_adapter(shared_path("adapters", "snips-turbo"), base, "float32", 8)
    found = evaluate(opened.engine, opened.tokenizer, rows, opened.variants, EvaluationOptions(8, 64))
    assert found.texts["turbo_lora"] == found.texts["lora"]
    turbo = found.variants["turbo_lora"]
    assert turbo.tokens_per_step > 1.5
    assert len(turbo.acceptance) == 3
    assert min(turbo.acceptance) > 0.3
    assert found.variants["lora"].tokens_per_step == found.variants["base"].tokens_per_step == 1.0
    assert found.variants["lora"].rouge_l > found.variants["base"].rouge_l
