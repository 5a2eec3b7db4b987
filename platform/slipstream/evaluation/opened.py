"""An adapter folder and its base model, checked against each other and loaded into one offline engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from adapter_registry.records import PromptFormat
from slipstream.adapters.load import load_adapter
from slipstream.adapters.rejection import Rule
from slipstream.adapters.turbo_config import MAX_STREAMS
from slipstream.adapters.validate import inspect_adapter
from slipstream.base_models import PreparedModel
from slipstream.engine import loader
from slipstream.engine.offline import OfflineEngine
from slipstream.errors import AdapterRejected
from slipstream.evaluation.variants import Variant, variants_of

ADAPTER = "adapter"  # its name in the engine


@dataclass(frozen=True, slots=True)
class OpenedAdapter:
    """Everything that `evaluate` needs."""

    engine: OfflineEngine
    tokenizer: PreTrainedTokenizerBase
    variants: tuple[Variant, ...]
    prompt_format: PromptFormat
    warnings: tuple[str, ...]


def open_adapter(
    folder: Path,
    base: PreparedModel,
    dtype: str,
    max_num_seqs: int,
    max_draft: int = MAX_STREAMS,
    *,
    device: str = "auto",
) -> OpenedAdapter:
    """Check `folder` as publishing would, and load it with its base. Seconds for a small model.

    Raises `AdapterRejected` (for another base too), `ModelUnsupported` and `AdapterUnavailable`.
    """
    loaded = loader.load_model(str(base.path), dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    spec = loader.describe(loaded, base.id, str(base.path), tokenizer)
    try:
        found = inspect_adapter(folder, spec)
    except AdapterRejected as error:
        if error.code != Rule.BASE_MISMATCH:
            raise
        message = f"{error.message} To evaluate, name that base model with --base."
        raise AdapterRejected(message, code=error.code, param=error.param) from error
    weights = load_adapter(folder)
    eos = loader.eos_ids(loaded, tokenizer)
    engine = OfflineEngine(loaded, adapters={ADAPTER: weights}, eos=eos, max_num_seqs=max_num_seqs)
    return OpenedAdapter(
        engine, tokenizer, variants_of(weights, ADAPTER, max_draft), found.prompt_format, found.warnings
    )
