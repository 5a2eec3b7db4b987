"""What is accepted, and what is read from it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapters import random_peft_adapter
from support.shared import shared_path

from adapter_registry.records import AdapterKind, PromptFormat, manifest_digest
from slipstream.adapters.load import load_adapter
from slipstream.adapters.validate import inspect_adapter
from slipstream.protocol import BaseModelSpec

CopyOf = Callable[[str], Path]


def edit(path: Path, **fields: object) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | fields))


@pytest.mark.parametrize(
    ("layout", "kind", "rank", "num_streams", "stream_rank"),
    [
        ("peft", AdapterKind.LORA, 4, 0, None),
        ("dora", AdapterKind.LORA, 4, 0, None),
        ("own", AdapterKind.TURBO_LORA, 4, 3, 4),
        ("own_dense", AdapterKind.TURBO_LORA, 4, 2, None),
        ("own_only", AdapterKind.TURBO, 0, 3, 4),
        ("lorax", AdapterKind.TURBO_LORA, 4, 3, None),
        ("lorax_only", AdapterKind.TURBO, 0, 3, None),
        ("medusa", AdapterKind.MEDUSA, 4, 3, None),
        ("medusa_only", AdapterKind.MEDUSA, 0, 3, None),
    ],
)
def test_each_layout(
    layout: str,
    kind: AdapterKind,
    rank: int,
    num_streams: int,
    stream_rank: int | None,
    valid_folders: Path,
    base: BaseModelSpec,
) -> None:
    found = inspect_adapter(valid_folders / layout, base)
    assert (found.kind, found.rank, found.num_streams, found.stream_rank) == (kind, rank, num_streams, stream_rank)
    assert found.target_modules == (("q_proj", "v_proj") if rank else ())
    assert found.prompt_format is PromptFormat.RAW
    assert found.base_digest is None
    assert "only as 'tests/tiny-llama'" in found.warnings[0]
    held = {f.path for f in (*found.files, *found.attachments)}
    assert held == {p.name for p in (valid_folders / layout).iterdir()}
    load_adapter(valid_folders / layout)


def test_files_make_the_digest_and_attachments_do_not(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("own")
    before = inspect_adapter(folder, base)
    assert [f.path for f in before.files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "turbo_config.json",
        "turbo_streams.safetensors",
    ]
    for entry in before.files:
        data = (folder / entry.path).read_bytes()
        assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    (folder / "README.md").write_text("another card")
    (folder / "curve.png").write_bytes(b"png")
    (folder / "training_card.md").write_text("card")
    after = inspect_adapter(folder, base)
    assert [f.path for f in after.attachments] == ["README.md", "curve.png", "training_card.md"]
    assert manifest_digest(after.files) == manifest_digest(before.files)


def test_the_same_folder_has_the_same_digest_whatever_the_order_of_files(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("lorax")
    digest = manifest_digest(inspect_adapter(folder, base).files)
    data = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    (folder / "config.json").write_bytes(data)
    assert manifest_digest(inspect_adapter(folder, base).files) == digest


@pytest.mark.parametrize("name", ["tests/tiny-llama", "TINY-Llama", "/models/tiny-llama/", "C:\\models\\tiny-llama"])
def test_a_base_named_by_its_last_part(name: str, copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("peft")
    edit(folder / "adapter_config.json", base_model_name_or_path=name)
    found = inspect_adapter(folder, base)
    assert found.base_model == name
    assert len(found.warnings) == 1


@pytest.mark.parametrize("file", ["turbo_config.json", "slipstream.json"])
def test_a_matching_digest_decides_alone(file: str, copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("own")
    edit(folder / "adapter_config.json", base_model_name_or_path="/home/me/my-copy")
    edit(folder / file, base_digest=base.base_digest)
    found = inspect_adapter(folder, base)
    assert (found.base_digest, found.warnings) == (base.base_digest, ())


def test_prompt_format_and_acceptance(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("own")
    edit(folder / "turbo_config.json", prompt_format="chat", acceptance=[0.75, 0.5, 0])
    found = inspect_adapter(folder, base)
    assert found.prompt_format is PromptFormat.CHAT
    assert found.acceptance == (0.75, 0.5, 0.0)


@pytest.mark.parametrize("layout", ["own", "lorax", "medusa"])
def test_acceptance_beside_any_streams(layout: str, copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of(layout)
    edit(folder / "slipstream.json", acceptance=[0.5, 1, 0])
    assert inspect_adapter(folder, base).acceptance == (0.5, 1.0, 0.0)


def test_the_speculators_own_file_knows_best(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("own")
    edit(folder / "turbo_config.json", acceptance=[0.75, 0.5, 0])
    edit(folder / "slipstream.json", acceptance=[0.1, 0.1, 0.1])
    assert inspect_adapter(folder, base).acceptance == (0.75, 0.5, 0.0)


@pytest.mark.parametrize("version", ["1", 1, 1.0, "1.0", None])
def test_every_way_to_write_version_1(version: object, copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("medusa_only")
    value = json.loads((folder / "config.json").read_text()) | {"version": version}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
    assert inspect_adapter(folder, base).kind is AdapterKind.MEDUSA


def test_lm_heads_count_in_the_budget(valid_folders: Path) -> None:
    heads = load_adapter(valid_folders / "medusa_only").nbytes - load_adapter(valid_folders / "lorax_only").nbytes
    assert heads == 3 * 128 * 32 * 4


def test_prompt_format_of_a_plain_lora(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("peft")
    edit(folder / "slipstream.json", prompt_format="chat")
    found = inspect_adapter(folder, base)
    assert found.prompt_format is PromptFormat.CHAT
    assert "slipstream.json" in {f.path for f in found.files}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("chat_template.jinja", "{{ messages }}", "{{ messages }}"),
        ("tokenizer_config.json", '{"chat_template": "{{ x }}"}', "{{ x }}"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": ["no"]}, {"name": "default", "template": "D"}, "no"]}',
            "D",
        ),
        ("tokenizer_config.json", '{"chat_template": [{"name": "tool_use", "template": "T"}]}', None),
        ("tokenizer_config.json", "{}", None),
        ("tokenizer.json", "{}", None),
    ],
)
def test_chat_template(name: str, content: str, expected: str | None, copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("peft")
    (folder / name).write_text(content)
    found = inspect_adapter(folder, base)
    assert found.chat_template == expected
    assert name in {f.path for f in found.attachments}


def test_a_copy_of_the_bases_config_json_is_an_attachment(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("own")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = inspect_adapter(folder, base)
    assert "config.json" in {f.path for f in found.attachments}
    assert found.stream_rank == 4


def test_lorax_streams_in_several_files(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("lorax")
    held = load_file(folder / "medusa_lm_head.safetensors")
    whole = load_adapter(folder).streams
    (folder / "medusa_lm_head.safetensors").unlink()
    for k in range(3):
        part = {key: tensor for key, tensor in held.items() if key.startswith(f"{k}.")}
        save_file(part, folder / f"head-{k}.safetensors")
    assert inspect_adapter(folder, base).num_streams == 3
    split = load_adapter(folder).streams
    assert whole is not None
    assert split is not None
    assert whole.weight is not None
    assert split.weight is not None
    assert torch.equal(whole.weight, split.weight)


def test_missing_layers_and_lm_head(tiny: Any, tmp_path: Path, base: BaseModelSpec) -> None:
    random_peft_adapter(tiny, tmp_path, target_modules=["q_proj", "lm_head"], layers_to_transform=None)
    held = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: t for k, t in held.items() if "layers.1." not in k}, tmp_path / "adapter_model.safetensors")
    assert inspect_adapter(tmp_path, base).target_modules == ("lm_head", "q_proj")


def test_a_target_without_tensors_and_an_unknown_option_are_warnings(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("peft")
    edit(folder / "adapter_config.json", target_modules=["q_proj", "v_proj", "gate_up_proj"], new_in_peft_9=True)
    warnings = inspect_adapter(folder, base).warnings
    assert any("'gate_up_proj'" in w for w in warnings)
    assert any("'new_in_peft_9'" in w for w in warnings)


def test_alpha_patterns_that_disagree_are_a_warning(copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("peft")
    edit(folder / "adapter_config.json", alpha_pattern={"q_proj": 2, ".*self_attn.q_proj": 2, "v_proj": 3})
    assert len(inspect_adapter(folder, base).warnings) == 1
    edit(folder / "adapter_config.json", alpha_pattern={"q_proj": 2, ".*self_attn.q_proj": 4})
    assert any("Alpha patterns disagree" in w for w in inspect_adapter(folder, base).warnings)


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", None])
def test_targets_that_only_the_tensors_tell(targets: str | None, copy_of: CopyOf, base: BaseModelSpec) -> None:
    folder = copy_of("peft")
    edit(folder / "adapter_config.json", target_modules=targets)
    assert inspect_adapter(folder, base).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_extremes_are_finite(dtype: torch.dtype, tiny: Any, tmp_path: Path, base: BaseModelSpec) -> None:
    random_peft_adapter(tiny, tmp_path, dtype=dtype)
    held = load_file(tmp_path / "adapter_model.safetensors")
    for tensor in held.values():
        tensor.view(-1)[0] = torch.finfo(dtype).max
        tensor.view(-1)[1] = torch.finfo(dtype).min
    save_file(held, tmp_path / "adapter_model.safetensors")
    inspect_adapter(tmp_path, base)
    assert all(m.a.dtype == dtype for m in load_adapter(tmp_path).lora.values())


def test_inspection_leaves_torch_alone() -> None:
    script = "import sys, slipstream.adapters.validate as v; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def smollm2_spec() -> BaseModelSpec:
    attention = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
    mlp = {"gate_proj": (1536, 576), "up_proj": (1536, 576), "down_proj": (576, 1536)}
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(30):
        linears |= {f"model.layers.{layer}.self_attn.{name}": shape for name, shape in attention.items()}
        linears |= {f"model.layers.{layer}.mlp.{name}": shape for name, shape in mlp.items()}
    return BaseModelSpec(
        id="HuggingFaceTB/SmolLM2-135M-Instruct",
        base_digest="sha256:" + "0" * 64,
        hidden_size=576,
        vocab_size=49152,
        num_layers=30,
        context_length=8192,
        eos_token_ids=(2,),
        has_chat_template=True,
        linears=linears,
    )


@pytest.mark.parametrize("name", ["snips-turbo", "wikisql-turbo"])
def test_trained_adapters(name: str) -> None:
    folder = shared_path("adapters", name)
    found = inspect_adapter(folder, smollm2_spec())
    assert (found.kind, found.rank, found.num_streams, found.stream_rank) == (AdapterKind.TURBO_LORA, 16, 3, None)
    assert len(found.target_modules) == 7
    weights = load_adapter(folder)
    assert len(weights.lora) == 210
    assert {m.scale for m in weights.lora.values()} == {2.0}
    assert weights.streams is not None
    assert weights.streams.weight is not None
    assert weights.streams.weight.shape == (3, 576, 576)


def test_trained_adapter_against_another_size() -> None:
    small = replace(smollm2_spec(), hidden_size=512)
    with pytest.raises(Exception, match=r"need \[512") as caught:
        inspect_adapter(shared_path("adapters", "snips-turbo"), small)
    assert caught.value.code == "wrong_shape"  # type: ignore[attr-defined]
