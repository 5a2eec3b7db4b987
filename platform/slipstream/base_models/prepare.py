"""Which base model is meant, and where it lies once it is ready."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slipstream.base_models.folder import read_marker
from slipstream.base_models.hub import HUB_ID, fetch_from_hub
from slipstream.base_models.progress import Progress, Silent
from slipstream.base_models.smollm2 import MODEL_ID, NAME, prepare_smollm2
from slipstream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A base model that can be loaded from `path` now."""

    id: str
    path: Path


def prepare_base_model(base_model: str, home: Path, progress: Progress | None = None) -> PreparedModel:
    """Fetch, unpack or just check `base_model`: the built-in default's name, a local folder or a Hugging Face id.

    Raises `ConfigError` when it names nothing that can be served and `Unavailable` when it cannot be fetched now.
    """
    show = progress or Silent()
    if base_model == NAME:
        return PreparedModel(MODEL_ID, prepare_smollm2(home / "models", show))
    folder = Path(base_model).expanduser()
    if folder.is_dir():
        return PreparedModel(_folder_id(folder.resolve()), _checked(folder.resolve()))
    if HUB_ID.fullmatch(base_model):
        return PreparedModel(base_model, _checked(fetch_from_hub(base_model, show)))
    raise ConfigError(
        f"SLIPSTREAM_BASE_MODEL names {base_model!r}, which is neither a folder here, "
        f"nor a Hugging Face id (`owner/name`), nor {NAME!r}."
    )


def served_id(base_model: str) -> str:
    """The id that `prepare_base_model` will report, known without fetching anything."""
    if base_model == NAME:
        return MODEL_ID
    folder = Path(base_model).expanduser()
    return _folder_id(folder.resolve()) if not HUB_ID.fullmatch(base_model) or folder.is_dir() else base_model


def _folder_id(folder: Path) -> str:
    marker = read_marker(folder)
    named = marker.get("id") if marker else None
    return named if isinstance(named, str) else folder.name


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"{folder} has no *.safetensors file. Other weight formats are not loaded: they can run code."
        )
    return folder
