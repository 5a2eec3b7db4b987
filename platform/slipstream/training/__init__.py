"""Training: a LoRA, its speculator, or both at once.

`from slipstream.training import TrainingConfig, train`; the command is `slipstream train`. `config` and `events` import no
torch, so the HTTP side can check a job's options without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slipstream.training.config import Method, TrainingConfig

if TYPE_CHECKING:
    from slipstream.training.run import TrainingResult, train

__all__ = ["Method", "TrainingConfig", "TrainingResult", "train"]


def __getattr__(name: str) -> Any:
    # Late, so that `import slipstream.training.config` stays light.
    if name in {"train", "TrainingResult"}:
        from slipstream.training import run  # noqa: PLC0415

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
