"""The real default base model, prepared once and shared by every test that asks for it."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from slipstream.base_models import prepare_base_model

_ROOT = Path(__file__).resolve().parents[2]


def shared_home() -> Path:
    """A data folder whose model cache tests share: `SLIPSTREAM_TEST_HOME`, else one inside the repository that git
    ignores."""
    return Path(os.environ.get("SLIPSTREAM_TEST_HOME") or _ROOT / ".slipstream")


@functools.cache
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as bf16 safetensors; the first call in a fresh checkout downloads 90 MB."""
    return prepare_base_model("SmolLM2-135M-Instruct", shared_home()).path
