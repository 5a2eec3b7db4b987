"""From a finished phase to an adapter folder that can be published."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict

from adapter_registry.records import PromptFormat
from slipstream.adapters.peft_config import PEFT_CONFIG, PEFT_TENSORS
from slipstream.adapters.save import TurboMetadata, save_medusa, save_options, save_turbo
from slipstream.adapters.turbo_config import SLIPSTREAM_CONFIG
from slipstream.training.config import Method, TrainingConfig
from slipstream.training.model import TurboModel


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """What an adapter says it belongs to."""

    id: str
    digest: str


def export_adapter(
    model: TurboModel,
    config: TrainingConfig,
    folder: Path,
    base: BaseIdentity,
    prompt_format: PromptFormat,
    acceptance: tuple[float, ...] = (),
) -> None:
    """Write the adapter in bf16 into `folder` (made if need be; files of an earlier export are replaced)."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.method.trains_lora:
        _export_lora(model, folder, base)
    metadata = TurboMetadata(base.id, base.digest, acceptance, prompt_format)
    existing = config.adapter if config.adapter is not None and (config.adapter / PEFT_CONFIG).is_file() else None
    if model.streams is None:
        save_options(folder, metadata)
    elif config.method is Method.MEDUSA:
        save_medusa(folder, model.streams.export(torch.bfloat16), metadata, existing)
    else:
        save_turbo(folder, model.streams.export(torch.bfloat16), metadata, existing)
        (folder / SLIPSTREAM_CONFIG).unlink(missing_ok=True)


def _export_lora(model: TurboModel, folder: Path, base: BaseIdentity) -> None:
    peft = model.base
    assert isinstance(peft, PeftModel)
    state = {
        n: t.detach().to(torch.bfloat16)
        for n, t in get_peft_model_state_dict(peft, save_embedding_layers=False).items()
    }
    scratch = folder / "peft"
    # PEFT strips its adapter name from the keys it is given, so it gets them as the model has them.
    full = {n: p.detach().to(torch.bfloat16) for n, p in peft.state_dict().items() if "lora_" in n}
    assert len(full) == len(state)
    peft.save_pretrained(str(scratch), state_dict=full, save_embedding_layers=False)
    config = json.loads((scratch / PEFT_CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = base.id  # not the folder that it happened to be loaded from
    config["inference_mode"] = True
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (scratch / PEFT_TENSORS).replace(folder / PEFT_TENSORS)
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
