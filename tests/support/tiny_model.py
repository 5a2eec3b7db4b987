"""A whole base model in a folder, made in milliseconds: a random Llama and a byte-level tokeniser with a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shutil import copytree
from typing import Any

from support.adapters import tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from slipstream.engine.config import EngineConfig
from slipstream.errors import Unavailable
from slipstream.protocol import AdapterRef

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and three special tokens: <pad> 256, <s> 257, </s> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny_model(folder: Path, **shape: Any) -> Any:
    """Write model and tokeniser; returns the model."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab=len(tokenizer), **shape)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def tiny_engine_config(folder: Path, **settings: Any) -> EngineConfig:
    """A model in `folder`, and an engine that serves it."""
    save_tiny_model(folder)
    defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 1 << 20, "num_threads": 1}
    return EngineConfig(model_path=str(folder), model_id="tiny", **{**defaults, **settings})


class NoAdapters:
    """A source that has none."""

    async def fetch(self, ref: AdapterRef, destination: Path) -> None:
        raise Unavailable(f"no adapter {ref.digest}")


class FolderAdapters:
    """Adapters by digest, from folders; `fetches` counts."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = dict(folders)
        self.fetches: list[str] = []

    async def fetch(self, ref: AdapterRef, destination: Path) -> None:
        self.fetches.append(ref.digest)
        if ref.digest not in self.folders:
            raise Unavailable(f"no adapter {ref.digest}")
        copytree(self.folders[ref.digest], destination, dirs_exist_ok=True)
