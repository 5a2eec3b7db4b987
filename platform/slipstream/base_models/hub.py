"""Base models by Hugging Face id, kept in Hugging Face's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from slipstream.base_models.progress import Progress
from slipstream.errors import ConfigError, Unavailable

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# safetensors only: a pickle in a repository is never fetched, so it can never be loaded.
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]


def fetch_from_hub(repository: str, progress: Progress) -> Path:
    """The repository's folder on this machine, downloaded when it is missing."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and only this path needs it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    with progress.phase(f"Fetching {repository} from Hugging Face"):
        try:
            folder = snapshot_download(repository, allow_patterns=_WANTED)
        except GatedRepoError as error:
            raise ConfigError(
                f"{repository} needs its licence accepted on Hugging Face and a token in HF_TOKEN."
            ) from error
        except RepositoryNotFoundError as error:
            raise ConfigError(
                f"SLIPSTREAM_BASE_MODEL names {repository!r}, which is not on Hugging Face (or is private)."
            ) from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise Unavailable(
                f"{repository} is not in the local cache and Hugging Face cannot be reached. "
                "Connect once, or set SLIPSTREAM_BASE_MODEL to a local folder."
            ) from error
    return Path(folder)
