"""Slipstream: many tenants' Turbo LoRA adapters on one shared base model.

`from slipstream import Slipstream, FinetuningConfig` is the SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.client.sdk import Slipstream
    from slipstream.client.sdk_types import FinetuningConfig

__version__ = "0.1.0"
__all__ = ["FinetuningConfig", "Slipstream", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that importing one part of the platform does not import the SDK.
    if name == "Slipstream":
        from slipstream.client.sdk import Slipstream  # noqa: PLC0415

        return Slipstream
    if name == "FinetuningConfig":
        from slipstream.client.sdk_types import FinetuningConfig  # noqa: PLC0415

        return FinetuningConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
