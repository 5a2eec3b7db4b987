"""GGUF in, bf16 safetensors and tokenizer out. Run as a program by `slipstream.base_models.smollm2`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, built: Path, model_id: str) -> None:
    """Write the model in `gguf` to the folder `built`, in the layout that `from_pretrained` reads."""
    folder = str(gguf.parent)
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    # transformers up to 5.21 always unpacks GGUF; later ones keep the packed blocks unless told otherwise.
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class is not None:
        options["quantization_config"] = config_class(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    _check_tokens(model, tokenizer)
    model = model.to(torch.bfloat16)
    model.config.name_or_path = model_id
    model.save_pretrained(built)
    tokenizer.save_pretrained(built)


def _check_tokens(model: Any, tokenizer: Any) -> None:
    """A conversion that loses the end-of-sequence token gives a model that never stops: refuse it here."""
    ends = {tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id}
    if len(ends) != 1 or None in ends or not tokenizer.chat_template:
        raise ValueError(f"end-of-sequence tokens {sorted(map(str, ends))} disagree, or the chat template is missing")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
