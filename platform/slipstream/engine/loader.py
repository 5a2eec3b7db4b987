"""Loading a base model: transformers' own code, our attention, and a check that the two really meet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_utils import PreTrainedModel

from slipstream.engine import attention
from slipstream.engine.parallel.shards import Shards
from slipstream.errors import ModelUnsupported
from slipstream.protocol import BaseModelSpec

# Token ids of the start-up check. Every vocabulary has them, and not among its first, special ones: after those a model's
# answer hangs on its last bit (SmolLM2-135M in bfloat16: 49% off its own float32 after 1, 2, 3 …, 6% after such as these).
PROBE = (17, 22, 27, 32, 37, 19, 24, 29)
# What may differ between two copies of the same model without changing a single logit.
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config", "use_cache")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model in eval mode on its device, before its linears are swapped."""

    model: PreTrainedModel
    decoder: nn.Module
    head: nn.Linear
    embedding: nn.Module
    config: Any  # the text config
    device: torch.device
    dtype: torch.dtype
    probe_logits: torch.Tensor  # float32 [len(PROBE), V], by eager attention; of a rank, its own columns
    linears: Mapping[str, tuple[int, int]]  # (out, in) of each, of the whole model
    shards: Shards  # which part of it this is


def pick_device(wanted: str) -> torch.device:
    """ "auto" is CUDA when there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """ "auto" is the narrowest float that the device computes with at full speed.

    A CPU without bfloat16 instructions emulates them: on AVX2 a matrix product took 7 to 30 times as long as in float32.
    """
    if wanted != "auto":
        found: torch.dtype = getattr(torch, wanted)
        return found
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def load_model(path: str, dtype: str, device: str) -> LoadedModel:
    """Load any decoder-only causal LM that transformers' attention interface covers. Raises `ModelUnsupported`."""
    config = AutoConfig.from_pretrained(path)
    target = pick_device(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=pick_dtype(dtype, target), attn_implementation=attention.register()
        )
    except (ValueError, OSError) as error:
        raise ModelUnsupported(f"{path} could not be loaded as a causal language model: {error}") from error
    return adopt_model(model.to(target))


def adopt_model(
    model: PreTrainedModel, shards: Shards | None = None, linears: Mapping[str, tuple[int, int]] | None = None
) -> LoadedModel:
    """Check a model in memory and take it over. `shards`, `linears`: for a rank's part, and the whole model's linears."""
    config = model.config.get_text_config()
    shards = shards or Shards.whole(config)
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelUnsupported(
            f"{name} does not use transformers' attention interface, so its keys and values cannot be paged. "
            "Use a model that does: Llama, Mistral, Qwen2, Qwen3, Gemma and Phi are checked."
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelUnsupported(
            f"{name} is quantised; its linears cannot carry adapters yet. Use the unquantised model."
        )
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if foreign:
        raise ModelUnsupported(f"{name} has layers of kind {', '.join(foreign)}, whose state cannot be paged.")
    _check_rope(config, name)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ModelUnsupported(f"{name} has no plain linear LM head.")
    model.eval().requires_grad_(False)
    parameter = next(model.parameters())
    reference = _eager_logits(model, parameter.device, shards)
    if linears is None:
        linears = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if type(m) is nn.Linear}
    model.set_attn_implementation(attention.register())
    return LoadedModel(
        model,
        model.get_decoder(),
        head,
        model.get_input_embeddings(),
        config,
        parameter.device,
        parameter.dtype,
        reference,
        linears,
        shards,
    )


def _check_rope(config: Any, name: str) -> None:
    """Some rotary embeddings choose their factors by the longest position of the whole step: company would change text."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {str(rope.get("rope_type"))} | {str(r.get("rope_type")) for r in rope.values() if isinstance(r, dict)}
    batch_dependent = sorted(kinds & {"dynamic", "longrope"})
    if batch_dependent:
        raise ModelUnsupported(
            f"{name} uses {batch_dependent[0]} rotary scaling, which depends on the longest sequence in the batch, so that "
            "one request would change another's text. Use a model or configuration without it."
        )


@torch.inference_mode()
def _eager_logits(model: PreTrainedModel, device: torch.device, shards: Shards) -> torch.Tensor:
    """transformers' own eager logits of `PROBE`: what our attention, linears and head must reproduce."""
    model.set_attn_implementation("eager")

    def add_up(module: nn.Module, args: object, out: torch.Tensor) -> None:
        shards.group.all_reduce_(out)

    summed = [m for n, m in model.named_modules() if type(m) is nn.Linear and shards.cut(n).reduces]
    hooks = [module.register_forward_hook(add_up) for module in summed]
    logits: torch.Tensor = model(input_ids=torch.tensor([PROBE], device=device), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits.float()


def context_length(config: Any) -> int:
    """Longest sequence the model was made for, in tokens."""
    return int(config.max_position_embeddings)


def cache_shapes(loaded: LoadedModel) -> list[tuple[int, int]]:
    """(kv_heads, head_dim) of each layer, from the config; the start-up check finds out when that is not the truth."""
    config = loaded.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return [(int(heads), int(dim))] * int(config.num_hidden_layers)


def eos_ids(loaded: LoadedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """Every id that ends an answer: the generation config's, the model's and the tokenizer's."""
    found: set[int] = set()
    for source in (getattr(loaded.model, "generation_config", None), loaded.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return frozenset(found)


def describe(loaded: LoadedModel, model_id: str, path: str, tokenizer: PreTrainedTokenizerBase) -> BaseModelSpec:
    """What adapters are checked against."""
    config = loaded.config
    return BaseModelSpec(
        id=model_id,
        base_digest=base_digest(Path(path)),
        hidden_size=int(config.hidden_size),
        vocab_size=loaded.shards.vocab_size,
        num_layers=int(config.num_hidden_layers),
        context_length=context_length(config),
        eos_token_ids=tuple(sorted(eos_ids(loaded, tokenizer))),
        has_chat_template=bool(getattr(tokenizer, "chat_template", None)),
        linears=loaded.linears,
    )


def base_digest(folder: Path) -> str:
    """`sha256:<hex>` over the config (without fields that change no logit) and every tensor's name, dtype, shape and bytes.

    Over tensors rather than files, so that sharding or a newer transformers' way of writing files does not change it.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {k: v for k, v in sorted(config.items()) if k not in VOLATILE_CONFIG}
    rows = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open is not a mapping
                t = tensors.get_tensor(name).contiguous()
                data = t.flatten().view(torch.uint8).numpy()
                rows.append([name, str(t.dtype), list(t.shape), hashlib.sha256(data).hexdigest()])
    if not rows:
        raise ModelUnsupported(f"{folder} holds no .safetensors file; save the model with safetensors.")
    text = json.dumps({"config": kept, "tensors": sorted(rows)}, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
