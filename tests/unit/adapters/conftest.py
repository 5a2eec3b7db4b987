"""One valid folder of each layout, made once; tests copy the one they break."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.adapters import (
    base_spec_of,
    random_peft_adapter,
    random_streams,
    tiny_llama,
    write_lorax_streams,
    write_own_streams,
)

from slipstream.protocol import BaseModelSpec


@pytest.fixture(scope="session")
def tiny() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def base(tiny: Any) -> BaseModelSpec:
    return base_spec_of(tiny)


@pytest.fixture(scope="session")
def valid_folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`peft`, `dora`, `own`, `own_dense`, `lorax`, `medusa`, and `own_only`, `lorax_only`, `medusa_only` without a LoRA."""
    root = tmp_path_factory.mktemp("valid")
    random_peft_adapter(tiny, root / "peft")
    random_peft_adapter(tiny, root / "dora", use_dora=True)
    for name in ("own", "own_dense", "lorax", "medusa"):
        shutil.copytree(root / "peft", root / name)
    for name in ("own", "own_only"):
        write_own_streams(root / name, random_streams(32, 3, rank=4, conditioned=True))
    write_own_streams(root / "own_dense", random_streams(32, 2, rank=None))
    for name in ("lorax", "lorax_only"):
        write_lorax_streams(root / name, random_streams(32, 3, rank=None))
    for name in ("medusa", "medusa_only"):
        write_lorax_streams(root / name, random_streams(32, 3, vocab=128))
    return root


@pytest.fixture
def copy_of(valid_folders: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of one valid folder."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(valid_folders / name, tmp_path / name))

    return copy
