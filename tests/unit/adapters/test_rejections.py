"""Every rule, broken once or more: the code, a message that names the culprit, and the file in `param`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slipstream.adapters.rejection import Rule, rules_table
from slipstream.adapters.validate import inspect_adapter
from slipstream.errors import AdapterRejected
from slipstream.protocol import BaseModelSpec

PEFT, LORA = "adapter_config.json", "adapter_model.safetensors"
TURBO, STREAMS = "turbo_config.json", "turbo_streams.safetensors"
MEDUSA, HEADS = "config.json", "medusa_lm_head.safetensors"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
DROP = object()

Change = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]


def config(name: str, **fields: object) -> Change:
    """Set fields of a JSON file; DROP removes one."""

    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({k: v for k, v in value.items() if v is not DROP}))

    return change


def tensors(name: str, edit: Callable[[Tensors], object]) -> Change:
    """Rewrite a safetensors file after `edit` has changed its dictionary in place."""

    def change(folder: Path) -> None:
        held = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
        edit(held)
        save_file(held, folder / name)

    return change


def rename(name: str, old: str, new: str) -> Change:
    def edit(held: Tensors) -> None:
        for key in [key for key in held if old in key]:
            held[key.replace(old, new)] = held.pop(key)

    return tensors(name, edit)


def put(name: str, key: str, tensor: torch.Tensor) -> Change:
    return tensors(name, lambda held: held.__setitem__(key, tensor))


def drop(name: str, key: str) -> Change:
    return tensors(name, lambda held: held.pop(key))


def poison(name: str, key: str, value: float, dtype: torch.dtype = torch.float32) -> Change:
    def edit(held: Tensors) -> None:
        held[key] = held[key].to(dtype)
        held[key].view(-1)[-1] = value

    return tensors(name, edit)


def write(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content

    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def remove(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def cut(name: str, keep: float) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def header(name: str, edit: Callable[[str], str], tail: bytes = b"") -> Change:
    """Edit the header's text; the length field is made to fit."""

    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        text = edit(data[8 : 8 + length].decode()).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + tail)

    return change


def duplicate_first(text: str) -> str:
    value = json.loads(text)
    key = next(k for k in value if k != "__metadata__")
    return text.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(value[key])}}}"


def shift_offsets(text: str) -> str:
    value = json.loads(text)
    for key, entry in value.items():
        if key != "__metadata__":
            entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"]]
    return json.dumps(value)


def entry(**fields: object) -> Callable[[str], str]:
    """Set fields of the first tensor's header entry."""

    def edit(text: str) -> str:
        value = json.loads(text)
        value[next(k for k in value if k != "__metadata__")] |= fields
        return json.dumps(value)

    return edit


def symlink(folder: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/hostname")


def two_files(folder: Path) -> None:
    (folder / "more.safetensors").write_bytes((folder / HEADS).read_bytes())


def nan(dtype: torch.dtype, value: float = float("nan")) -> Change:
    return poison(LORA, f"{Q}.lora_B.weight", value, dtype)


NEW_BASE = "sha256:" + "0" * 64
DEEP = '{"peft_type": ' + "[" * 100_000
CASES: list[tuple[Rule, str, Change, str]] = [
    # the folder
    (Rule.EMPTY_FOLDER, "peft", remove(PEFT, LORA), "no adapter"),
    (Rule.PICKLE_FILE, "peft", write("adapter_model.bin", "x"), "adapter_model.bin"),
    (Rule.PICKLE_FILE, "peft", write("optimizer.PT", "x"), "optimizer.PT"),
    (Rule.PICKLE_FILE, "peft", write("state.pkl", "x"), "state.pkl"),
    (Rule.CODE_FILE, "peft", write("modeling.py", "x"), "modeling.py"),
    (Rule.NESTED_FOLDER, "peft", lambda f: (f / "checkpoint-10").mkdir(), "checkpoint-10"),
    (Rule.SYMLINK, "peft", symlink, "README.md"),
    (Rule.HIDDEN_FILE, "peft", write(".env", "x"), ".env"),
    (Rule.BAD_FILE_NAME, "peft", write("a..md", "x"), "a..md"),
    (Rule.BAD_FILE_NAME, "peft", write("täg.md", "x"), "täg.md"),
    (Rule.BAD_FILE_NAME, "peft", write("a\nb.md", "x"), "a\\nb.md"),
    (Rule.FILE_NOT_ALLOWED, "peft", write("model.gguf", "x"), "model.gguf"),
    (Rule.EMPTY_FILE, "peft", write(LORA, ""), LORA),
    (Rule.EMPTY_FILE, "peft", write(PEFT, ""), PEFT),
    (Rule.FILE_TOO_LARGE, "peft", write(PEFT, b" " * (1 << 20) + b"{}"), PEFT),
    (Rule.FILE_TOO_LARGE, "peft", write("chat_template.jinja", "x" * 70_000), "chat_template"),
    (Rule.ADAPTER_TOO_LARGE, "peft", write("big.txt", b"x" * 2_000_000), "1000000"),
    (Rule.ADAPTER_TOO_LARGE, "peft", both(*(write(f"{i}.txt", "x") for i in range(65))), "64"),
    (Rule.MISSING_FILE, "peft", remove(LORA), LORA),
    (Rule.MISSING_FILE, "peft", remove(PEFT), PEFT),
    (Rule.MISSING_FILE, "own", remove(STREAMS), STREAMS),
    (Rule.MISSING_FILE, "own", remove(TURBO), TURBO),
    (Rule.MISSING_FILE, "lorax", remove(HEADS), MEDUSA),
    (Rule.MISSING_FILE, "lorax", remove(MEDUSA), HEADS),
    (Rule.TWO_SPECULATORS, "own", write(MEDUSA, '{"medusa_num_heads": 3}'), TURBO),
    # JSON
    (Rule.BAD_JSON, "peft", write(PEFT, "{"), PEFT),
    (Rule.BAD_JSON, "peft", write(PEFT, b'{"r": "\xff"}'), "UTF-8"),
    (Rule.BAD_JSON, "peft", write(PEFT, '{"r": 4, "r": 8}'), "'r'"),
    (Rule.BAD_JSON, "peft", write(PEFT, '{"r": NaN}'), PEFT),
    (Rule.BAD_JSON, "peft", write(PEFT, DEEP), PEFT),
    (Rule.BAD_JSON, "peft", write("tokenizer_config.json", "["), "tokenizer_config.json"),
    (Rule.JSON_NOT_OBJECT, "peft", write(PEFT, "[]"), PEFT),
    (Rule.BAD_ENCODING, "peft", write("chat_template.jinja", b"\xff"), "chat_template.jinja"),
    (Rule.BAD_ENCODING, "peft", write("tokenizer_config.json", r'{"chat_template": "\ud800"}'), "tokenizer_config"),
    # tensor files
    (Rule.TRUNCATED_FILE, "peft", cut(LORA, 0.9), "cut off"),
    (Rule.TRUNCATED_FILE, "peft", cut(LORA, 0.01), "header"),
    (Rule.TRUNCATED_FILE, "peft", write(LORA, "x"), LORA),
    (Rule.BAD_HEADER, "peft", write(LORA, struct.pack("<Q", 2) + b"[]"), LORA),
    (Rule.BAD_HEADER, "peft", header(LORA, shift_offsets), "gap"),
    (Rule.BAD_HEADER, "peft", header(LORA, lambda t: t, b"tail"), "4 bytes"),
    (Rule.BAD_HEADER, "peft", header(LORA, entry(shape=[4, 33])), "offsets"),
    (Rule.BAD_HEADER, "peft", header(LORA, entry(shape=[-4, 32])), "malformed"),
    (Rule.BAD_HEADER, "peft", header(LORA, entry(extra=1)), "malformed"),
    (Rule.BAD_HEADER, "peft", header(LORA, lambda t: t.replace('"pt"', "7")), LORA),
    (Rule.HEADER_TOO_LARGE, "peft", write(LORA, struct.pack("<Q", 1 << 40) + b"{}"), "1099511627776"),
    (Rule.DUPLICATE_TENSOR, "peft", header(LORA, duplicate_first), "twice"),
    (Rule.DUPLICATE_TENSOR, "lorax", two_files, "more.safetensors"),
    (Rule.UNSUPPORTED_DTYPE, "peft", put(LORA, f"{Q}.lora_A.weight", torch.ones(4, 32, dtype=torch.float64)), "F64"),
    (Rule.UNSUPPORTED_DTYPE, "peft", put(LORA, f"{Q}.lora_A.weight", torch.ones(4, 32, dtype=torch.int8)), "I8"),
    (Rule.EMPTY_TENSOR, "peft", put(LORA, f"{Q}.lora_A.weight", torch.ones(0, 32)), "q_proj"),
    (Rule.NON_FINITE, "peft", nan(torch.float32), f"{Q}.lora_B.weight"),
    (Rule.NON_FINITE, "peft", nan(torch.float16), f"{Q}.lora_B.weight"),
    (Rule.NON_FINITE, "peft", nan(torch.bfloat16), f"{Q}.lora_B.weight"),
    (Rule.NON_FINITE, "peft", nan(torch.bfloat16, -float("inf")), f"{Q}.lora_B.weight"),
    (Rule.NON_FINITE, "own", poison(STREAMS, "turbo.2.bias", float("inf")), "turbo.2.bias"),
    # base model
    (Rule.BASE_MISSING, "peft", config(PEFT, base_model_name_or_path=None), "base_model_name_or_path"),
    (Rule.BASE_MISSING, "own", config(TURBO, base_model=DROP), "base_model"),
    (Rule.BASE_MISMATCH, "peft", config(PEFT, base_model_name_or_path="org/other-7b"), "org/other-7b"),
    (Rule.BASE_MISMATCH, "own", config(TURBO, base_model="org/other-7b"), TURBO),
    (Rule.BASE_MISMATCH, "own", config(TURBO, base_digest=NEW_BASE), NEW_BASE),
    (Rule.BASE_MISMATCH, "peft", write("slipstream.json", json.dumps({"base_digest": NEW_BASE})), "slipstream.json"),
    # PEFT config
    (Rule.PEFT_TYPE, "peft", config(PEFT, peft_type="IA3"), "IA3"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, r=DROP), "r is None"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, r=0), "r is 0"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, r=True), "r is True"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, lora_alpha=DROP), "lora_alpha"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, lora_alpha=10**400), "lora_alpha"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, use_rslora="yes"), "use_rslora"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, base_model_name_or_path=7), "base_model_name_or_path"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, base_model_name_or_path="x\n/tiny-llama"), "model id"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, rank_pattern=["q_proj"]), "rank_pattern"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, target_modules=[1]), "target_modules"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, target_modules=["q_proj"] * 5000), "4096"),
    (Rule.BAD_CONFIG_VALUE, "peft", config(PEFT, layers_to_transform="0"), "layers_to_transform"),
    (Rule.BAD_CONFIG_VALUE, "own", config(TURBO, stream_rank=0), "stream_rank"),
    (Rule.BAD_CONFIG_VALUE, "own", config(TURBO, stream_rank=DROP), "stream_rank"),
    (Rule.BAD_CONFIG_VALUE, "own", config(TURBO, base_digest="abc"), "base_digest"),
    (Rule.BAD_CONFIG_VALUE, "own", config(TURBO, prompt_format="xml"), "prompt_format"),
    (Rule.BAD_CONFIG_VALUE, "own_dense", config(TURBO, conditioned=True), "conditioned"),
    (Rule.BAD_CONFIG_VALUE, "lorax", config(MEDUSA, version="two"), "version"),
    (Rule.BAD_CONFIG_VALUE, "lorax", config(MEDUSA, base_model_name_or_path=[1]), "base_model_name_or_path"),
    *(
        (Rule.UNSUPPORTED_FEATURE, "peft", config(PEFT, **{field: value}), field)
        for field, value in {
            "modules_to_save": ["lm_head"],
            "bias": "all",
            "trainable_token_indices": [1],
            "target_parameters": ["experts.weight"],
            "layer_replication": [[0, 2]],
            "use_qalora": True,
            "use_bdlora": {"nblocks": 2},
            "arrow_config": {"top_k": 3},
            "alora_invocation_tokens": [1, 2],
            "kasa_config": {"beta": 1},
            "monteclora_config": {"n": 1},
            "velora_config": {"n": 1},
            "megatron_config": {"n": 1},
            "lora_bias": True,
            "fan_in_fan_out": True,
        }.items()
    ),
    (Rule.UNSUPPORTED_FEATURE, "peft", put(LORA, f"{Q}.lora_B.bias", torch.ones(32)), "lora_bias"),
    *(
        (Rule.BASE_CHANGING_INIT, "peft", config(PEFT, init_lora_weights=init), init)
        for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")
    ),
    (Rule.UNSAFE_PATTERN, "peft", config(PEFT, rank_pattern={"(": 4}), "regular expression"),
    (Rule.UNSAFE_PATTERN, "peft", config(PEFT, target_modules="("), "target_modules"),
    (Rule.UNSAFE_PATTERN, "peft", config(PEFT, target_modules="(.+)+x"), "costly"),
    (Rule.UNSAFE_PATTERN, "peft", config(PEFT, rank_pattern={"(a+)+b": 4}), "costly"),
    (Rule.UNSAFE_PATTERN, "peft", config(PEFT, alpha_pattern={".*.*.*.*x": 4}), "alpha_pattern"),
    (Rule.UNSAFE_PATTERN, "peft", config(PEFT, alpha_pattern={f"a{i}": 4 for i in range(3000)}), "costly"),
    # LoRA tensors
    (Rule.NO_LORA_TENSORS, "peft", tensors(LORA, lambda held: held.clear()), LORA),
    (Rule.ADAPTER_NAME_IN_KEY, "peft", rename(LORA, "lora_A.weight", "lora_A.default.weight"), "save_pretrained"),
    (Rule.ADAPTER_NAME_IN_KEY, "dora", rename(LORA, "magnitude_vector", "magnitude_vector.default"), "save_pretrained"),
    (Rule.WRONG_PREFIX, "peft", rename(LORA, "base_model.model.", ""), "base_model.model."),
    (Rule.EMBEDDING_WEIGHTS, "peft", put(LORA, "base_model.model.lm_head.weight", torch.ones(2)), "lm_head"),
    (
        Rule.EMBEDDING_WEIGHTS,
        "peft",
        put(LORA, "base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 128)),
        "embedding",
    ),
    (Rule.UNKNOWN_TENSOR, "peft", put(LORA, f"{Q}.ia3_l", torch.ones(2)), "ia3_l"),
    (Rule.UNKNOWN_TENSOR, "lorax", put(HEADS, "extra", torch.ones(2)), "extra"),
    (Rule.UNKNOWN_TENSOR, "own", put(STREAMS, "turbo.0.weight", torch.ones(32, 32)), "turbo.0.weight"),
    (Rule.UNKNOWN_TENSOR, "own", config(TURBO, conditioned=False), "turbo.0.C"),
    (Rule.UNKNOWN_TENSOR, "peft", put(LORA, "0.0.linear.bias", torch.ones(32)), "0.0.linear.bias"),
    (Rule.UNKNOWN_MODULE, "peft", rename(LORA, "layers.0.", "layers.9."), "model.layers.9.self_attn"),
    (Rule.UNKNOWN_MODULE, "peft", rename(LORA, "q_proj", "qkv_proj"), "down_proj"),
    (Rule.NOT_TARGETED, "peft", config(PEFT, target_modules=["q_proj"]), "v_proj"),
    (Rule.NOT_TARGETED, "peft", config(PEFT, target_modules=r".*\.q_proj"), "v_proj"),
    (Rule.NOT_TARGETED, "peft", config(PEFT, target_modules="(q|v)_proj"), "q_proj"),  # the whole path must match
    (Rule.NOT_TARGETED, "peft", config(PEFT, layers_to_transform=[0, 1]), "layers.2"),
    (Rule.UNPAIRED_TENSOR, "peft", drop(LORA, f"{Q}.lora_B.weight"), "lora_B"),
    (Rule.UNPAIRED_TENSOR, "peft", drop(LORA, f"{Q}.lora_A.weight"), "lora_A"),
    (Rule.WRONG_SHAPE, "peft", put(LORA, f"{Q}.lora_A.weight", torch.ones(4, 33)), "[4, 33]"),
    (Rule.WRONG_SHAPE, "peft", put(LORA, f"{Q}.lora_B.weight", torch.ones(31, 4)), "[31, 4]"),
    (Rule.WRONG_SHAPE, "peft", put(LORA, f"{Q}.lora_A.weight", torch.ones(128)), "[128]"),
    (Rule.WRONG_SHAPE, "dora", put(LORA, f"{Q}.lora_magnitude_vector", torch.ones(31)), "[31]"),
    (Rule.WRONG_SHAPE, "own", put(STREAMS, "turbo.1.A", torch.ones(5, 32)), "turbo.1.A"),
    (Rule.WRONG_SHAPE, "lorax", put(HEADS, "1.0.linear.weight", torch.ones(16, 16)), "[16, 16]"),
    (Rule.RANK_MISMATCH, "peft", config(PEFT, r=8), "rank 4"),
    (Rule.RANK_MISMATCH, "peft", config(PEFT, rank_pattern={"layers.1.self_attn.q_proj": 2}), "layers.1"),
    (Rule.RANK_TOO_LARGE, "peft", config(PEFT, r=513), "513"),
    (Rule.RANK_TOO_LARGE, "peft", config(PEFT, rank_pattern={"q_proj": 1024}), "1024"),
    (Rule.DORA_MISMATCH, "peft", config(PEFT, use_dora=True), "lacks"),
    (Rule.DORA_MISMATCH, "dora", config(PEFT, use_dora=False), "has"),
    (Rule.DORA_MISMATCH, "dora", drop(LORA, f"{Q}.lora_magnitude_vector"), "lacks"),
    # streams
    (Rule.MEDUSA_LAYERS, "lorax", config(MEDUSA, medusa_num_layers=2), "medusa_num_layers"),
    (Rule.MEDUSA_LAYERS, "medusa", config(MEDUSA, medusa_num_layers="1"), "medusa_num_layers"),
    (Rule.MEDUSA_LAYERS, "medusa", put(HEADS, "0.1.linear.weight", torch.ones(32, 32)), "0.1.linear.weight"),
    (Rule.MEDUSA_LAYERS, "medusa", rename(HEADS, "2.1.weight", "2.2.weight"), "2.2.weight"),
    (Rule.MEDUSA_VERSION, "lorax", put(HEADS, "0.1.weight", torch.ones(128, 32)), "0.1.weight"),
    (Rule.MEDUSA_VERSION, "medusa_only", config(MEDUSA, version=2), "0.1.weight"),
    (Rule.MEDUSA_VERSION, "lorax_only", config(MEDUSA, version=1), "version 1"),
    (Rule.MEDUSA_VERSION, "lorax", config(MEDUSA, version=DROP), "version 1"),
    (Rule.MEDUSA_VERSION, "medusa", config(MEDUSA, version=1.5), "version 1.5"),
    (Rule.MEDUSA_VERSION, "medusa", config(MEDUSA, version="nan"), "version nan"),
    (Rule.MISSING_TENSOR, "medusa", drop(HEADS, "1.1.weight"), "1.1.weight"),
    (Rule.MISSING_TENSOR, "medusa_only", drop(HEADS, "1.0.linear.bias"), "1.0.linear.bias"),
    (Rule.WRONG_SHAPE, "medusa", put(HEADS, "1.1.weight", torch.ones(127, 32)), "1.1.weight"),
    (Rule.WRONG_SHAPE, "medusa", put(HEADS, "1.1.weight", torch.ones(128, 16)), "1.1.weight"),
    (Rule.UNKNOWN_TENSOR, "medusa", put(HEADS, "1.1.bias", torch.ones(128)), "1.1.bias"),
    (Rule.NUM_STREAMS, "medusa", put(HEADS, "3.1.weight", torch.ones(128, 32)), "3 streams"),
    (Rule.NON_FINITE, "medusa", poison(HEADS, "2.1.weight", float("inf")), "2.1.weight"),
    (Rule.TURBO_VERSION, "own", config(TURBO, format_version=2), "2"),
    (Rule.TURBO_VERSION, "own", config(TURBO, format_version=DROP), "None"),
    (Rule.UNKNOWN_KEY, "own", config(TURBO, tree_width=4), "tree_width"),
    (Rule.UNKNOWN_KEY, "peft", write("slipstream.json", '{"prompt": "raw"}'), "prompt"),
    (Rule.NUM_STREAMS, "own", config(TURBO, num_streams=0), "1 to 8"),
    (Rule.NUM_STREAMS, "own", config(TURBO, num_streams=9), "1 to 8"),
    (Rule.NUM_STREAMS, "own", config(TURBO, num_streams=4), "4 streams"),
    (Rule.NUM_STREAMS, "own", rename(STREAMS, "turbo.2.", "turbo.3."), "3 streams"),
    (Rule.NUM_STREAMS, "lorax", config(MEDUSA, medusa_num_heads=2), "2 streams"),
    (Rule.NUM_STREAMS, "lorax", config(MEDUSA, medusa_num_heads="3"), "'3'"),
    (Rule.MISSING_TENSOR, "own", drop(STREAMS, "turbo.1.bias"), "turbo.1.bias"),
    (Rule.MISSING_TENSOR, "own", drop(STREAMS, "turbo.1.C"), "turbo.1.C"),
    (Rule.MISSING_TENSOR, "lorax", drop(HEADS, "2.0.linear.bias"), "2.0.linear.bias"),
    (Rule.MISSING_TENSOR, "own", config(TURBO, stream_rank=None, conditioned=False), "turbo.0.weight"),
    (Rule.BAD_ACCEPTANCE, "own", config(TURBO, acceptance=[0.5, 0.5, 1.5]), "1.5"),
    (Rule.BAD_ACCEPTANCE, "own", config(TURBO, acceptance=[0.5, -0.1, 0.5]), "-0.1"),
    (Rule.BAD_ACCEPTANCE, "own", config(TURBO, acceptance=[0.5]), "3 rates"),
    (Rule.BAD_ACCEPTANCE, "own", config(TURBO, acceptance=[0.5, "x", 0.5]), "'x'"),
    (Rule.BAD_ACCEPTANCE, "own", config(TURBO, acceptance={"0": 0.5}), "list of rates"),
    (Rule.BAD_ACCEPTANCE, "lorax", write("slipstream.json", '{"acceptance": [0.5, 2, 0.5]}'), "holds 2"),
    (Rule.BAD_ACCEPTANCE, "medusa", write("slipstream.json", '{"acceptance": [0.5]}'), "3 rates"),
    (Rule.BAD_ACCEPTANCE, "peft", write("slipstream.json", '{"acceptance": [0.5]}'), "no streams"),
]


@pytest.mark.parametrize(
    ("rule", "layout", "change", "names"), CASES, ids=[f"{i}-{c[0]}-{c[1]}" for i, c in enumerate(CASES)]
)
def test_refused(
    rule: Rule, layout: str, change: Change, names: str, copy_of: Callable[[str], Path], base: BaseModelSpec
) -> None:
    folder = copy_of(layout)
    change(folder)
    with pytest.raises(AdapterRejected) as caught:
        inspect_adapter(folder, base, max_bytes=1_000_000)
    error = caught.value
    assert error.code == rule.value, error.message
    assert names in error.message
    assert error.message.endswith((".", "?", "!"))
    assert str(folder) not in error.message, "a message must not tell where the server keeps uploads"
    assert error.message.isprintable()


def test_a_folder_that_is_not_there(tmp_path: Path, base: BaseModelSpec) -> None:
    with pytest.raises(AdapterRejected) as caught:
        inspect_adapter(tmp_path / "none", base)
    assert caught.value.code == Rule.EMPTY_FOLDER


def test_every_rule_has_a_case() -> None:
    # Met before a folder is inspected, and after: test_archives, test_imports.
    elsewhere = {Rule.BAD_ARCHIVE, Rule.SMOKE_TEST}
    assert {case[0] for case in CASES} == set(Rule) - elsewhere


def test_the_table_lists_every_code() -> None:
    table = rules_table()
    assert all(f"| `{rule.value}` | {rule.doc} |" in table for rule in Rule)
